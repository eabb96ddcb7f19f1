package registry

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// maxRanges bounds the ranges of a request. 16 save most of the cost of requests, see
// BenchmarkRanges, with a header of some 300 bytes.
const maxRanges = 16

// Ranges returns how many ranges a call of OpenRanges may ask for at present. It is 1 for
// files, for servers that do not send several ranges in one answer, and while the first
// answer that shows this is awaited.
func (r *Repo) Ranges() int {
	if m, ok := r.reader.(*remote); ok {
		return m.first().src.several.most()
	}
	return 1
}

// OpenRanges reads several ranges of a blob, which must not overlap, in one request, one
// behind the other. It returns a nil reader without an error where Ranges is 1, or has
// become 1 by this call: the caller then reads each by OpenRange. For the rest it is like
// OpenRange.
func (r *Repo) OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error) {
	digest := hashFrom(blob)
	m, ok := r.reader.(*remote)
	if !ok || len(ranges) > maxRanges {
		return nil, nil
	}
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b blockmap.Extent) int { return cmp.Compare(a.Start, b.Start) })
	var end int64
	for _, x := range sorted {
		if x.End <= x.Start || x.Start < end {
			return nil, fmt.Errorf("read blob %s of %s: the ranges %v overlap or are empty", digest, r, ranges)
		}
		end = x.End
	}
	b, err := m.patiently(ctx, func(patient bool) (_ *Body, err error) {
		var asks *endpoint
		if patient {
			if asks, err = m.copying(digest, true); err != nil {
				return nil, err
			}
		}
		b, release, err := race(ctx, m, digest, m.givers(digest, "", asks), func(ctx context.Context, e *endpoint) (*Body, error) {
			return e.openRanges(ctx, digest, ranges)
		}, func(b *Body) {
			if b != nil {
				b.rc.Close()
			}
		})
		switch {
		case err != nil:
			return nil, err
		case b == nil:
			release()
			return nil, errOneRange
		}
		b.release = release
		return b, nil
	})
	switch {
	case errors.Is(err, errOneRange):
		return nil, nil // and not a *Body that is nil
	case err != nil:
		return nil, fmt.Errorf("read blob %s of %s: %w", digest, r, err)
	}
	return b, nil
}

// several says whether a source sends several ranges in one answer. Object storage that
// registries redirect to often does not, and may answer with the whole blob. So only one
// request asks for several, until its answer shows what the source does.
type several struct{ state atomic.Int32 }

const (
	severalUnknown int32 = iota
	severalAsked
	severalYes
	severalNo
)

func (s *several) most() int {
	switch s.state.Load() {
	case severalUnknown, severalYes:
		return maxRanges
	}
	return 1
}

// openRanges returns nil without an error if the source does not send several ranges.
func (e *endpoint) openRanges(ctx context.Context, digest v1.Hash, ranges []blockmap.Extent) (*Body, error) {
	s, mirror := &e.src.several.state, e.src.mirrorOf != ""
	if !e.src.givesRanges() {
		return nil, nil
	}
	if s.Load() != severalYes && !s.CompareAndSwap(severalUnknown, severalAsked) {
		return nil, nil
	}
	// A request without an answer leaves this unknown.
	defer s.CompareAndSwap(severalAsked, severalUnknown)
	header := []byte("bytes=")
	var n int64
	for i, x := range ranges {
		if i > 0 {
			header = append(header, ',')
		}
		header = fmt.Appendf(header, "%d-%d", x.Start, x.End-1)
		n += x.Len()
	}
	resp, err := e.ask(ctx, digest, string(header))
	if err != nil {
		return nil, err
	}
	switch status := resp.StatusCode; {
	case status == http.StatusPartialContent || status == http.StatusOK:
	case status == http.StatusBadRequest || status == http.StatusRequestedRangeNotSatisfiable || status == http.StatusNotImplemented:
		// It may have refused the ranges.
	default:
		return nil, e.refusal(resp)
	}
	boundary := ""
	if t, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err == nil && t == "multipart/byteranges" {
		boundary = params["boundary"]
	}
	if resp.StatusCode == http.StatusOK && mirror && !isPage(resp.Header) && !e.state(digest).pulling.gives {
		return nil, e.whole(digest, resp) // of several ranges it may still know
	}
	if mirror && encodingOf(resp.Header) != "" {
		boundary = ""
	}
	if boundary == "" || resp.StatusCode != http.StatusPartialContent {
		resp.Body.Close()
		e.src.oneRange(fmt.Sprintf("it answers %s with %q", resp.Status, resp.Header.Get("Content-Type")))
		return nil, nil
	}
	p := &parts{body: resp.Body, r: bufio.NewReaderSize(resp.Body, 4<<10), boundary: []byte("--" + boundary), ranges: ranges, src: e.src, size: -1}
	if err := p.next(); err != nil {
		resp.Body.Close()
		if errors.Is(err, errParts) {
			return nil, nil
		}
		return nil, err
	}
	s.Store(severalYes)
	if mirror {
		e.gives(digest)
	}
	e.remember(digest, resp)
	watched, _ := resp.Body.(*watchedBody)
	return &Body{rc: p, left: n, e: e, digest: digest, watched: watched}, nil
}

// oneRange notes that a source sends only one range in an answer.
func (s *source) oneRange(why string) {
	if s.several.state.Swap(severalNo) != severalNo {
		s.log.Debug("the server does not send several ranges in one answer, so thaw makes more requests", "source", s.name, "why", why)
	}
}

// errParts is an answer whose parts are not the ranges that were asked for, or that is no
// multipart body. The source is not asked for several ranges any more, so the next try gets
// another answer.
var errParts = fmt.Errorf("%w: the parts of the answer are not what was asked for", ErrUnavailable)

// parts reads the bytes of the parts of a multipart/byteranges body (RFC 9110, 14.6); its
// Body checks that none is missing. The parts must come in the order of the ranges. So the
// length of each is known, and its bytes need not be searched for the boundary.
type parts struct {
	body     io.ReadCloser
	r        *bufio.Reader
	boundary []byte // with the dashes before it
	ranges   []blockmap.Extent
	left     int64 // bytes of the part that are left
	after    bool  // the end of a part comes first
	size     int64 // of the blob, as the parts say; -1: they have not said
	src      *source
}

func (p *parts) Read(b []byte) (int, error) {
	if p.left == 0 {
		if len(p.ranges) == 0 {
			return 0, io.EOF
		}
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	if int64(len(b)) > p.left {
		b = b[:p.left]
	}
	n, err := p.r.Read(b)
	p.left -= int64(n)
	return n, err
}

// Close reads the closing delimiter if all else was read, so that the connection can be used
// again. It does not matter what the delimiter is, or whether it comes.
func (p *parts) Close() error {
	if p.left == 0 && len(p.ranges) == 0 {
		// The server sends it with the last part.
		if w, ok := p.body.(*watchedBody); ok {
			w.limit(w.drain)
		}
		_, _ = io.CopyN(io.Discard, p.r, int64(len(p.boundary))+64)
	}
	return p.body.Close()
}

// maxPartHeader bounds the lines before a part: an empty one, the delimiter,
// and its header.
const maxPartHeader = 32

// next goes to the part that holds the next range.
func (p *parts) next() error {
	bad := func(format string, args ...any) error {
		err := fmt.Errorf("%w: %w", errParts, fmt.Errorf(format, args...))
		p.src.oneRange(err.Error())
		return err
	}
	want := p.ranges[0]
	if p.after {
		// The line end behind a part belongs to the delimiter, RFC 2046, 5.1.1.
		if end, err := p.r.Peek(2); err == nil && string(end) != "\r\n" {
			return bad("a part is longer or shorter than it says")
		}
		_, _ = p.r.Discard(2)
	}
	begun, found := false, false
	for range maxPartHeader {
		line, err := p.r.ReadSlice('\n')
		switch {
		case err == bufio.ErrBufferFull:
			return bad("a line of a part's header is longer than %d bytes", p.r.Size())
		case err == io.EOF:
			return fmt.Errorf("%w before the part from byte %d", ErrTruncated, want.Start)
		case err != nil:
			return err
		}
		line = bytes.TrimRight(line, " \t\r\n")
		switch {
		case !begun:
			if begun = bytes.Equal(line, p.boundary); !begun && (len(line) > 0 || p.after) {
				return bad("%.80q where the part from byte %d should begin", line, want.Start)
			}
		case len(line) == 0:
			if !found {
				return bad("a part has no Content-Range")
			}
			p.left, p.ranges, p.after = want.Len(), p.ranges[1:], true
			return nil
		default:
			name, value, _ := strings.Cut(string(line), ":")
			if textproto.CanonicalMIMEHeaderKey(name) != "Content-Range" {
				continue
			}
			first, last, size, err := parseContentRange(strings.TrimSpace(value))
			if err != nil {
				return bad("%w", err)
			}
			if size >= 0 && p.size >= 0 && size != p.size {
				return bad("the blob has %d bytes, and %d in the part before", size, p.size)
			}
			p.size = max(size, p.size)
			if first != want.Start || last != want.End-1 {
				return bad("got bytes %d-%d, expected %d-%d", first, last, want.Start, want.End-1)
			}
			found = true
		}
	}
	return bad("the header of a part has more than %d lines", maxPartHeader)
}
