package zone

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"thaw/blockmap"
)

// Bounds on what a peer may say, in bytes.
const (
	maxPath  = 256
	maxImage = 512
)

// ask is what every request says.
type ask struct {
	zone, from string
	image      string // HOST/REPOSITORY@sha256:DIGEST
	origin     bool   // the peer takes this host for the owner
}

// chunksAsk asks for chunks of a stream. Only a request for one chunk says more.
type chunksAsk struct {
	ask
	stream      blockmap.Digest
	first, last int
	leaves      blockmap.LeafSet // those that the peer wants first; 0: none
	stored      int64            // bytes of the stored form, which the peer takes; 0: it does not
}

// maxStored bounds the bytes of a chunk as a registry has it.
const maxStored = 2 * blockmap.MaxChunkBlocks * blockmap.BlockSize

// pieceAsk asks for a piece of a blob.
type pieceAsk struct {
	ask
	blob blockmap.Digest
	e    blockmap.Extent
}

// parseAsk reads the query of a request.
func parseAsk(r *http.Request, image bool) (a ask, q url.Values, err error) {
	if q, err = url.ParseQuery(r.URL.RawQuery); err != nil {
		return a, nil, errors.New("the query cannot be read")
	}
	one := func(name string) string {
		v := q[name]
		if len(v) > 1 {
			err = fmt.Errorf("%s is given %d times", name, len(v))
		}
		return q.Get(name)
	}
	a = ask{zone: one("zone"), from: one("from"), image: one("image")}
	switch one("origin") {
	case "":
	case "1":
		a.origin = true
	default:
		err = errors.New("origin is not 1")
	}
	one("leaves")
	one("stored")
	switch {
	case err != nil:
	case !ValidName(a.from):
		err = errors.New("from is not the name of a member")
	case image && !isImage(a.image):
		err = errors.New("image is not HOST/REPOSITORY@sha256:DIGEST")
	}
	return a, q, err
}

// isImage reports whether s has the form of a reference by digest. Whoever opens it looks
// closer.
func isImage(s string) bool {
	at := strings.LastIndex(s, "@sha256:")
	if at <= 0 || len(s) > maxImage || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return false
	}
	_, err := blockmap.ParseDigest(s[at+len("@sha256:"):])
	slash := strings.IndexByte(s[:at], '/')
	return err == nil && slash > 0 && slash < at-1
}

// repositoryOf is the repository of a reference for which isImage holds.
func repositoryOf(image string) string { return image[:strings.LastIndex(image, "@sha256:")] }

// parseChunks reads a request for /v1/streams/{stream}/chunks/{first}-{last}.
func parseChunks(r *http.Request) (c chunksAsk, err error) {
	a, q, err := parseAsk(r, true)
	if err != nil {
		return c, err
	}
	c.ask = a
	part := strings.Split(r.URL.Path, "/") // "", v1, streams, ID, chunks, RANGE
	if len(part) != 6 || part[4] != "chunks" {
		return c, errPath
	}
	if c.stream, err = blockmap.ParseDigest(part[3]); err != nil {
		return c, errors.New("the stream is not a digest")
	}
	if c.first, c.last, err = parseRange(part[5]); err != nil {
		return c, err
	}
	if c.first/RunChunks != c.last/RunChunks {
		return c, fmt.Errorf("the chunks are not of one run of %d", RunChunks)
	}
	if s := q.Get("leaves"); s != "" {
		leaf, last, err := parseRange(s)
		if err != nil {
			return c, err
		}
		if c.first != c.last || last >= blockmap.MaxLeaves {
			return c, errors.New("leaves are of one chunk")
		}
		c.leaves = blockmap.LeafRange(leaf, last-leaf+1)
	}
	if s := q.Get("stored"); s != "" {
		if c.stored, err = parseNumber(s, maxStored+1); err != nil || c.stored == 0 || c.first != c.last {
			return c, errors.New("stored is not the bytes of one chunk in the registry")
		}
	}
	return c, nil
}

// parsePiece reads a request for /v1/blobs/{digest}/{off}-{end}.
func parsePiece(r *http.Request) (p pieceAsk, err error) {
	if p.ask, _, err = parseAsk(r, true); err != nil {
		return p, err
	}
	part := strings.Split(r.URL.Path, "/") // "", v1, blobs, DIGEST, RANGE
	if len(part) != 5 {
		return p, errPath
	}
	if p.blob, err = blockmap.ParseDigest(strings.TrimPrefix(part[3], "sha256:")); err != nil {
		return p, errors.New("the blob is not a digest")
	}
	off, end, ok := strings.Cut(part[4], "-")
	if p.e.Start, err = parseNumber(off, 1<<62); err == nil {
		p.e.End, err = parseNumber(end, 1<<62)
	}
	if !ok || err != nil || p.e.Len() <= 0 || p.e.Len() > PieceBytes || p.e.Start%PieceBytes != 0 || p.e.Start/PieceBytes >= 1<<32 {
		return p, fmt.Errorf("the range is not a piece of %d bytes or less", PieceBytes)
	}
	return p, nil
}

var errPath = errors.New("there is no such path")

// parseRange reads FIRST-LAST, both of which are in it.
func parseRange(s string) (first, last int, err error) {
	a, b, ok := strings.Cut(s, "-")
	x, err := parseNumber(a, 1<<31)
	if err != nil || !ok {
		return 0, 0, errors.New("the range is not FIRST-LAST")
	}
	y, err := parseNumber(b, 1<<31)
	if err != nil || y < x {
		return 0, 0, errors.New("the range is not FIRST-LAST")
	}
	return int(x), int(y), nil
}

// parseNumber reads a number below a limit, in its only form.
func parseNumber(s string, below int64) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n >= below || strconv.FormatInt(n, 10) != s {
		return 0, errors.New("not a number")
	}
	return n, nil
}
