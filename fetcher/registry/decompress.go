package registry

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// An archive may have archiveBase bytes of content, and archiveFactor more for each of
	// its own bytes. Only zeros compress better, or an attack.
	archiveBase   = 16 << 30
	archiveFactor = 256

	// diskReserve is how much stays free on the disk for decompressed archives.
	diskReserve = 256 << 20
)

// plainTar returns the tar that f holds: f itself, or a new file if f is compressed.
func plainTar(ctx context.Context, f *os.File, temp string) (*os.File, error) {
	r, kind, err := decompress(ctxReader{ctx, f})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if kind == "" {
		return f, nil
	}
	defer r.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	dir := cmp.Or(temp, os.TempDir())
	out, err := unnamedFile(dir)
	if err != nil {
		return nil, fmt.Errorf("decompress %s: make a temporary file in %s: %w", f.Name(), dir, err)
	}
	w := &sparseWriter{f: out, dir: dir, left: archiveLimit(fi.Size())}
	if _, err = io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, 1<<20)); err == nil {
		err = w.end()
	}
	if err != nil {
		out.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("decompress %s, which is compressed by %s: %w", f.Name(), kind, err)
	}
	return out, nil
}

func archiveLimit(size int64) int64 { return archiveBase + archiveFactor*min(size, 1<<50) }

// sparseWriter writes a file from its beginning, with holes for zeros. It fails before the
// disk is full.
type sparseWriter struct {
	f       *os.File
	dir     string // of f
	left    int64  // bytes that may still be written
	off     int64
	checked int64 // bytes that may be written until the free space is checked again
}

var zeroPage [64 << 10]byte

func (w *sparseWriter) Write(p []byte) (int, error) {
	n := len(p)
	if w.left -= int64(n); w.left < 0 {
		return 0, errors.New("its content is much larger than that of any image archive of its size: it is not an image, or was made to fill disks")
	}
	for len(p) > 0 {
		part := p[:min(len(p), len(zeroPage))]
		p = p[len(part):]
		if !bytes.Equal(part, zeroPage[:len(part)]) {
			if err := w.room(len(part)); err != nil {
				return 0, err
			}
			if _, err := w.f.WriteAt(part, w.off); err != nil {
				return 0, w.full(err)
			}
		}
		w.off += int64(len(part))
	}
	return n, nil
}

// room checks the free space now and then.
func (w *sparseWriter) room(n int) error {
	if w.checked -= int64(n); w.checked > 0 {
		return nil
	}
	w.checked = diskReserve / 8
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(w.f.Fd()), &st); err != nil {
		return nil // the write will fail if there is none
	}
	if free := int64(st.Bavail) * st.Bsize; st.Blocks > 0 && free < min(diskReserve, int64(st.Blocks)*st.Bsize/16)+int64(n) {
		return w.full(unix.ENOSPC)
	}
	return nil
}

func (w *sparseWriter) full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("the directory %s is full after %d MiB: name another by --temp, or by TMPDIR: %w", w.dir, w.off>>20, err)
	}
	return err
}

// end sets the length of the file, which may end in a hole.
func (w *sparseWriter) end() error { return w.f.Truncate(w.off) }

// decompress finds the compression of r by its first bytes. kind is its name, or empty if r is
// not compressed; r may have been read from then.
func decompress(r io.Reader) (plain io.ReadCloser, kind string, err error) {
	b := bufio.NewReaderSize(r, 1<<20)
	head, err := b.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	begins := func(s string) bool { return bytes.HasPrefix(head, []byte(s)) }
	switch {
	case isTar(head): // its first member may be called like a compression's mark
		return nil, "", nil
	case begins("\x1f\x8b"):
		z, err := newGzipReader(b)
		return z, "gzip", err
	case begins("\x28\xb5\x2f\xfd"), len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18":
		z, err := newZstdReader(b)
		return z, "zstd", err
	case begins(xzMagic):
		z, err := newXZReader(b)
		return z, "xz", err
	case begins("BZh") && len(head) >= 10 && string(head[4:10]) == "1AY&SY":
		return newBzip2Reader(b), "bzip2", nil
	}
	for magic, name := range map[string]string{
		"\x04\x22\x4d\x18": "lz4", "LZIP": "lzip", "PK\x03\x04": "zip", "\x89LZO": "lzop", "7z\xbc\xaf\x27\x1c": "7z",
	} {
		if begins(magic) {
			return nil, "", fmt.Errorf("it is compressed by %s, which is not supported: use gzip, zstd, xz or bzip2", name)
		}
	}
	return nil, "", nil // the walk will tell what it is
}

// A tar is of blocks of 512 bytes. A header has, at 148, a checksum: the sum of
// its bytes, those of the checksum taken as spaces, in octal.
const (
	tarBlock    = 512
	tarSum      = 148
	tarSumBytes = 8
)

// isTar says whether head is a tar header with a right checksum.
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

// ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
