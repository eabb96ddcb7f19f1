package registry

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// A compressed file may be several streams, one behind the other, and zeros behind
// the last: tapes and tools that write whole blocks pad a file to a multiple of
// these. tar and docker read such files, so thaw does. Anything else behind the last
// stream is refused: gzip(1) ignores it with a warning, but then nobody sees that a
// file is damaged.

var errJunk = errors.New("something follows its end that is neither another compressed stream nor zeros: " +
	"the file is damaged, or something was appended to it")

// padding returns io.EOF if only zeros are left of r.
func padding(r *bufio.Reader) error {
	for {
		if _, err := r.Peek(1); err != nil {
			return err
		}
		p, _ := r.Peek(r.Buffered())
		if len(bytes.TrimLeft(p, "\x00")) > 0 {
			return errJunk
		}
		_, _ = r.Discard(len(p))
	}
}

// gzipReader decompresses the members of a gzip file.
type gzipReader struct {
	*gzip.Reader
	r *bufio.Reader // the decompressor does not read beyond the end of a member
}

func newGzipReader(r *bufio.Reader) (io.ReadCloser, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return &gzipReader{z, r}, nil
}

func (g *gzipReader) Read(p []byte) (int, error) {
	for {
		n, err := g.Reader.Read(p)
		if n > 0 && err == io.EOF {
			err = nil // the next Read returns it again
		}
		if n > 0 || err != io.EOF {
			return n, err
		}
		if head, _ := g.r.Peek(2); string(head) != "\x1f\x8b" {
			return 0, padding(g.r)
		}
		if err := g.Reset(g.r); err != nil {
			return 0, err
		}
		g.Multistream(false)
	}
}

// endless is the input of a decompressor that looks for the mark of another stream behind each
// stream. At the end of the file it returns zeros in the place of a mark. So the decompressor
// always reports a missing mark, whether the file is padded or not. If it reaches the end of
// its input instead, it has used the zeros as bytes of a stream that was cut short.
type endless struct {
	r       *bufio.Reader
	mark    int   // length of the mark that a stream begins with
	extra   int   // zeros returned behind the file
	at      int64 // bytes returned
	nonzero int64 // the value of at behind the last byte that was not zero
}

func (e *endless) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err == io.EOF {
		if n = min(len(p), e.mark-e.extra); n == 0 && len(p) > 0 {
			return 0, io.EOF
		}
		clear(p[:n])
		e.extra += n
		err = nil
	}
	if last := bytes.TrimRight(p[:n], "\x00"); len(last) > 0 {
		e.nonzero = e.at + int64(len(last))
	}
	e.at += int64(n)
	return n, err
}

func (e *endless) ReadByte() (byte, error) {
	b, err := e.r.ReadByte()
	if err == io.EOF && e.extra < e.mark {
		e.extra++
		err = nil
	}
	if err != nil {
		return 0, err
	}
	e.at++
	if b != 0 {
		e.nonzero = e.at
	}
	return b, nil
}

// end translates the error of a decompressor. noMark says that the last bytes that it read were
// not the mark of another stream.
func (e *endless) end(err error, noMark bool) error {
	switch {
	case err == io.EOF:
		return io.ErrUnexpectedEOF
	case !noMark:
		return err
	case e.nonzero > e.at-int64(e.mark):
		return errJunk
	}
	return padding(e.r)
}

// zstdReader decompresses the frames of a zstd file.
type zstdReader struct {
	*zstd.Decoder
	in *endless
}

func newZstdReader(r *bufio.Reader) (io.ReadCloser, error) {
	in := &endless{r: r, mark: 4}
	z, err := blockmap.NewZstdReader(in)
	if err != nil {
		return nil, err
	}
	return &zstdReader{z, in}, nil
}

func (z *zstdReader) Read(p []byte) (int, error) {
	n, err := z.Decoder.Read(p)
	return n, z.in.end(err, errors.Is(err, zstd.ErrMagicMismatch))
}

func (z *zstdReader) Close() error {
	z.Decoder.Close()
	return nil
}

// bzip2Reader decompresses the streams of a bzip2 file.
type bzip2Reader struct {
	z  io.Reader
	in *endless
}

func newBzip2Reader(r *bufio.Reader) io.ReadCloser {
	in := &endless{r: r, mark: 2}
	return &bzip2Reader{bzip2.NewReader(in), in}
}

// errNoBzip2 is the error of compress/bzip2 for two bytes behind a stream that are not the mark of
// another one.
const errNoBzip2 = bzip2.StructuralError("bad magic value in continuation file")

func (b *bzip2Reader) Read(p []byte) (int, error) {
	n, err := b.z.Read(p)
	return n, b.in.end(err, err == errNoBzip2)
}

func (b *bzip2Reader) Close() error { return nil }
