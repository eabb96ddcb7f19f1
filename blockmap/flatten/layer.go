package flatten

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"math"
	"net/url"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// What Linux takes at most, in bytes.
const (
	maxName      = 255
	maxSymlink   = 4095 // of the target
	maxXattrName = 255
	maxXattr     = 64 << 10 // of the value

	// maxXattrs is what all attributes of a file may take, with xattrCost bytes
	// for each beside name and value. It is much more than ext4 has room for,
	// which is complained of when it is known which files the image has.
	maxXattrs = 64 << 10
	xattrCost = 16
)

func xattrSize(x *ext4.Xattr) int { return xattrCost + len(x.Name) + len(x.Value) }

// maxHoles is what the sparse files of a layer may have of holes together, in
// bytes: a header of 512 bytes can ask for 16 TiB of zeros, which take minutes.
const maxHoles = 64 << 30

// The types of a file in its mode, as in stat(2).
const (
	modeType    = 0o170000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFifo    = 0o010000
)

// Whiteouts, as the layer section of the OCI image spec names them.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // of aufs: bookkeeping, but for
	whiteoutOpaque = ".wh..wh..opq"

	// Of the files that have several names, aufs keeps one more in this
	// directory, and a layer can have hard links to that alone.
	plinkDir = ".wh..wh.plnk/"
)

// converter converts layers, several at once.
type converter struct {
	*compressor
	windows *semaphore.Weighted // bytes of memory for the windows of zstd layers
	log     *slog.Logger
}

func newConverter(chunkSize, level int, log *slog.Logger) (*converter, error) {
	c, err := newCompressor(chunkSize, level, runtime.GOMAXPROCS(0))
	if err != nil {
		return nil, err
	}
	return &converter{c, semaphore.NewWeighted(blockmap.MaxWindow), log}, nil
}

// convert reads the tar of a layer, compressed or not, and writes the contents
// of its files to out as a stream. It returns the TOC of the layer. diffID is
// what the uncompressed tar is to hash to.
func (c *converter) convert(ctx context.Context, r io.Reader, diffID blockmap.Digest, out io.Writer) (*blockmap.Table, []byte, error) {
	plain, err := decompress(ctx, r, c.windows)
	if err != nil {
		return nil, nil, err
	}
	defer plain.Close()
	sum := sha256.New()
	p := newPacker(ctx, c.compressor, out)
	var toc tocWriter
	err = readTar(ctx, io.TeeReader(plain, hashWriter{sum}), p, &toc, c.log)
	if err == nil && blockmap.Digest(sum.Sum(nil)) != diffID {
		err = fmt.Errorf("the layer is not the one that the image config names: its content has digest sha256:%x, not %v", sum.Sum(nil), diffID)
	}
	table, err := p.close(err)
	if err != nil {
		return nil, nil, err
	}
	blob, err := toc.close(table)
	return table, blob, err
}

// hashWriter is a hash without its io.StringWriter and the like.
type hashWriter struct{ h hash.Hash }

func (w hashWriter) Write(p []byte) (int, error) { return w.h.Write(p) }

func readTar(ctx context.Context, r io.Reader, p *packer, toc *tocWriter, log *slog.Logger) error {
	in := &tally{r: r}
	tr := tar.NewReader(in)
	files := &sparseFile{r: tr, in: in, left: maxHoles}
	drop := dropper(log)
	last := ""
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		switch {
		case err == io.EOF:
			// The digest covers what follows the end mark as well, and
			// compressed layers have their checksum at the very end.
			if _, err := io.Copy(io.Discard, r); err != nil {
				return fmt.Errorf("read the layer to its end: %w", err)
			}
			return nil
		case errors.Is(err, tar.ErrInsecurePath): // clean and the tree see to that
		case err != nil && n == 0:
			return fmt.Errorf("read the first entry of the layer's tar: %w", err)
		case err != nil:
			return fmt.Errorf("read the layer's tar behind entry %d, %s: %w", n, quoted(last), err)
		}
		last = h.Name
		if toc.full() {
			return errTOCLimit
		}
		e, err := fromHeader(h, drop)
		if err == nil && e != nil {
			if e.kind == kindFile && e.inode.Mode&modeType == modeRegular {
				e.inode.Size = h.Size
				e.inode.Data, err = p.file(files.next(), h.Size)
			}
		}
		if err != nil {
			return fmt.Errorf("layer entry %s: %w", quoted(h.Name), err)
		}
		if e != nil {
			toc.add(e)
		}
	}
}

// tally counts what is read.
type tally struct {
	r io.Reader
	n int64
}

func (t *tally) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.n += int64(n)
	return n, err
}

// sparseFile reads the files of a tar, and bounds the bytes that are not in the
// tar, which are holes.
type sparseFile struct {
	r     io.Reader
	in    *tally
	left  int64 // bytes of holes
	holes int64 // of this file
}

// next says that another file begins.
func (s *sparseFile) next() io.Reader {
	s.left -= max(s.holes, 0)
	s.holes = 0
	return s
}

func (s *sparseFile) Read(p []byte) (int, error) {
	before := s.in.n
	n, err := s.r.Read(p)
	s.holes += int64(n) - (s.in.n - before)
	if s.holes > s.left {
		return 0, fmt.Errorf("a sparse file: those of the layer have more than %d GiB of holes", maxHoles>>30)
	}
	return n, err
}

// clean makes a path relative to the root, without ".", ".." or double slashes.
// "" is the root.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// fromHeader turns a tar header into an entry, or into nothing where it says
// nothing about a file. It tells drop of attributes that are left out.
func fromHeader(h *tar.Header, drop func(attribute, entry string)) (*entry, error) {
	if len(h.Name) > maxPath {
		return nil, fmt.Errorf("a name of %d bytes: Linux takes %d", len(h.Name), maxPath)
	}
	e := &entry{name: clean(h.Name)}
	dir, base := path.Split(e.name)
	plink := dir == plinkDir
	if !plink && (strings.HasPrefix(dir, whiteoutMeta) || strings.Contains(dir, "/"+whiteoutMeta)) {
		return nil, nil
	}
	if strings.HasPrefix(base, whiteoutPrefix) && !plink {
		switch {
		case base == whiteoutOpaque:
			e.kind, e.name = kindOpaque, clean(dir)
		case strings.HasPrefix(base, whiteoutMeta):
			return nil, nil
		default:
			name := base[len(whiteoutPrefix):]
			if name == "" || name == "." || name == ".." {
				return nil, errors.New("a whiteout of no name")
			}
			e.kind, e.name = kindWhiteout, dir+name
		}
		return e, checkName(e.name)
	}
	if err := checkName(e.name); err != nil {
		return nil, err
	}
	if plink && h.Typeflag == tar.TypeDir {
		return nil, nil
	}
	in := new(ext4.Inode)
	in.Mode = uint32(h.Mode) & 0o7777
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		in.Mode |= modeRegular
	case tar.TypeDir:
		in.Mode |= modeDir
	case tar.TypeLink:
		if len(h.Linkname) > maxPath {
			return nil, fmt.Errorf("a hard link to a name of %d bytes: Linux takes %d", len(h.Linkname), maxPath)
		}
		e.kind, e.link = kindHardLink, clean(h.Linkname)
		return e, nil
	case tar.TypeSymlink:
		in.Mode |= modeSymlink
		in.Target, e.link = h.Linkname, h.Linkname
		switch n := len(h.Linkname); {
		case n == 0:
			return nil, errors.New("a symbolic link to nothing")
		case n > maxSymlink:
			return nil, fmt.Errorf("a symbolic link whose target has %d bytes: it can have %d", n, maxSymlink)
		case strings.IndexByte(h.Linkname, 0) >= 0:
			return nil, errors.New("a symbolic link with a NUL in its target")
		}
	case tar.TypeChar:
		in.Mode |= modeChar
	case tar.TypeBlock:
		in.Mode |= modeBlock
	case tar.TypeFifo:
		in.Mode |= modeFifo
	case tar.TypeXGlobalHeader:
		return nil, nil
	default:
		return nil, fmt.Errorf("an entry of type %q, which is not a file", h.Typeflag)
	}
	if e.name == "" && in.Mode&modeType != modeDir {
		return nil, errors.New("the root is not a directory")
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("device number %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		in.Major, in.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	if h.Uid < 0 || h.Uid > math.MaxUint32 || h.Gid < 0 || h.Gid > math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	in.UID, in.GID = uint32(h.Uid), uint32(h.Gid)
	in.Mtime = timeOf(h.ModTime)
	in.Atime, in.Ctime = in.Mtime, in.Mtime
	if !h.AccessTime.IsZero() {
		in.Atime = timeOf(h.AccessTime)
	}
	if !h.ChangeTime.IsZero() {
		in.Ctime = timeOf(h.ChangeTime)
	}
	e.inode = in
	return e, xattrs(h, e, drop)
}

// checkName looks at each part of a clean name.
func checkName(name string) error {
	for part := range strings.SplitSeq(name, "/") {
		if len(part) > maxName {
			return fmt.Errorf("a name of more than %d bytes", maxName)
		}
		if strings.IndexByte(part, 0) >= 0 {
			return errors.New("a name with a NUL in it")
		}
	}
	return nil
}

func timeOf(t time.Time) ext4.Time { return ext4.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())} }

// xattrs takes the extended attributes from a pax header: as GNU tar, star and
// Docker write them, and as libarchive does where it is alone.
func xattrs(h *tar.Header, e *entry, drop func(attribute, entry string)) error {
	const schily, libarchive = "SCHILY.xattr.", "LIBARCHIVE.xattr."
	values := make(map[string]string)
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, libarchive); ok {
			name, err := url.PathUnescape(name)
			if err != nil {
				return fmt.Errorf("extended attribute %s: %w", quoted(k), err)
			}
			if !keeps(name) {
				drop(name, e.name)
				continue
			}
			b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
			if err != nil {
				return fmt.Errorf("extended attribute %s: %w", quoted(name), err)
			}
			values[name] = string(b)
		}
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, schily); ok {
			if keeps(name) {
				values[name] = v
			} else {
				drop(name, e.name)
			}
		}
	}
	total := 0
	for name, v := range values {
		if len(name) > maxXattrName {
			return fmt.Errorf("the name of extended attribute %q has %d bytes: it can have %d", name[:40]+"…", len(name), maxXattrName)
		}
		if len(v) > maxXattr {
			return fmt.Errorf("extended attribute %q has %d bytes: it can have %d", name, len(v), maxXattr)
		}
		x := ext4.Xattr{Name: name, Value: []byte(v)}
		if total += xattrSize(&x); total > maxXattrs {
			return fmt.Errorf("%d extended attributes, of more than %d bytes together", len(values), maxXattrs)
		}
		e.inode.Xattrs = append(e.inode.Xattrs, x)
	}
	slices.SortFunc(e.inode.Xattrs, func(a, b ext4.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// keeps says whether Linux keeps an attribute on ext4. Others, such as
// com.apple.provenance, are dropped, as other programs that unpack images do.
func keeps(attribute string) bool {
	space, name, _ := strings.Cut(attribute, ".")
	return name != "" && (space == "user" || space == "trusted" || space == "security") ||
		attribute == "system.posix_acl_access" || attribute == "system.posix_acl_default"
}

// dropper tells log of attributes that are left out, of each name once.
func dropper(log *slog.Logger) func(attribute, entry string) {
	seen := make(map[string]bool)
	return func(attribute, entry string) {
		if len(attribute) > maxXattrName {
			attribute = attribute[:maxXattrName]
		}
		if seen[attribute] || len(seen) >= 100 {
			return
		}
		seen[attribute] = true
		log.Warn("an extended attribute that Linux cannot keep is left out", "name", attribute, "entry", entry)
	}
}

// commonWindow is the largest window of most zstd layers. Layers with larger ones,
// up to blockmap.MaxWindow, are converted one by one.
const commonWindow = 8 << 20

// decompress looks at the first bytes of a layer, which are believed before its
// media type: images whose media types are wrong are in use. windows is what
// memory there is for the windows of all zstd layers.
func decompress(ctx context.Context, r io.Reader, windows *semaphore.Weighted) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	head, err := b.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read the layer: %w", err)
	}
	var plain io.Reader = b
	var close func()
	switch {
	case isTar(head): // whatever its first file is called
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("read the gzip layer: %w", err)
		}
		plain = z
	case len(head) >= 4 && (string(head[:4]) == "\x28\xb5\x2f\xfd" || head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18"):
		memory := int64(commonWindow)
		var h zstd.Header
		if h.Decode(head) == nil && !h.Skippable && h.WindowSize > commonWindow {
			memory = blockmap.MaxWindow
		}
		if err := windows.Acquire(ctx, memory); err != nil {
			return nil, context.Cause(ctx)
		}
		z, err := blockmap.NewZstdReader(b)
		if err != nil {
			windows.Release(memory)
			return nil, fmt.Errorf("read the zstd layer: %w", err)
		}
		plain, close = z, func() { z.Close(); windows.Release(memory) }
	default:
		for magic, by := range map[string]string{"\xfd7zXZ\x00": "xz", "BZh": "bzip2", "\x04\x22\x4d\x18": "lz4"} {
			if strings.HasPrefix(string(head), magic) {
				return nil, fmt.Errorf("the layer is compressed by %s: thaw reads layers that are compressed by gzip or zstd, or not at all; build the image with such layers", by)
			}
		}
	}
	return newReadAhead(plain, close), nil
}

// A tar is of blocks of 512 bytes. A header has, at 148, a checksum: the sum of
// its bytes, those of the checksum taken as spaces, in octal.
const (
	tarBlock    = 512
	tarSum      = 148
	tarSumBytes = 8
)

// isTar says whether head is a header with a checksum that is right.
func isTar(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	want, err := strconv.ParseUint(strings.Trim(string(head[tarSum:tarSum+tarSumBytes]), " \x00"), 8, 32)
	if err != nil {
		return false
	}
	sum := uint64(tarSumBytes * ' ')
	for i, c := range head[:tarBlock] {
		if i < tarSum || i >= tarSum+tarSumBytes {
			sum += uint64(c)
		}
	}
	return sum == want
}

// readAhead decompresses on a goroutine of its own, a few blocks ahead of who
// hashes and packs.
type readAhead struct {
	blocks chan block
	free   chan []byte
	stop   chan struct{}
	done   chan struct{}
	cur    block
	at     int
}

type block struct {
	b   []byte
	err error
}

func newReadAhead(r io.Reader, closeSource func()) *readAhead {
	const ahead, size = 4, 256 << 10
	a := &readAhead{
		blocks: make(chan block, ahead), free: make(chan []byte, ahead+2),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for range ahead {
		a.free <- make([]byte, size)
	}
	go func() {
		defer close(a.done)
		if closeSource != nil {
			defer closeSource()
		}
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-a.stop:
				return
			}
			// Not io.ReadFull: it calls a clean end and a layer cut short by
			// the same name.
			n, err := 0, error(nil)
			for n < size && err == nil {
				var m int
				m, err = r.Read(b[n:size])
				n += m
			}
			a.blocks <- block{b[:n], err}
			if err != nil {
				return
			}
		}
	}()
	return a
}

func (a *readAhead) Read(p []byte) (int, error) {
	for a.at == len(a.cur.b) {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.b != nil {
			a.free <- a.cur.b
		}
		a.cur, a.at = <-a.blocks, 0
	}
	n := copy(p, a.cur.b[a.at:])
	a.at += n
	return n, nil
}

// Close ends the goroutine; whoever feeds it must not block for ever.
func (a *readAhead) Close() error {
	close(a.stop)
	for {
		select {
		case <-a.blocks:
		case <-a.done:
			return nil
		}
	}
}
