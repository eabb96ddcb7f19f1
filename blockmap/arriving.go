package blockmap

import (
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Arriving is the content of a chunk that is verified while it arrives, leaf by leaf: so
// little is left to do when its last byte is here. It is used by one goroutine.
type Arriving struct {
	// Content is that of the chunk, as far as it has arrived.
	Content []byte

	list [MaxLeaves]Digest
	n    int // leaves in list
}

// NewArriving makes an Arriving of a chunk whose content arrives in content.
func NewArriving(c *Chunk, content []byte) *Arriving { return &Arriving{Content: content[:c.Size()]} }

// Came says that the first n bytes are here. Nobody changes them any more.
func (a *Arriving) Came(n int) {
	for end := (a.n + 1) * LeafSize; end <= n; end += LeafSize {
		a.list[a.n] = LeafDigest(a.Content[end-LeafSize : end])
		a.n++
	}
}

// Verify is Chunk.Verify for a content of which all bytes have come.
func (a *Arriving) Verify(c *Chunk) error {
	if len(a.Content) != c.Size() {
		return ErrDigest
	}
	a.Came(len(a.Content))
	list := a.list[:a.n]
	if rest := a.Content[a.n*LeafSize:]; len(rest) > 0 {
		list = append(list, LeafDigest(rest))
	}
	if ListDigest(list) != c.Digest {
		return ErrDigest
	}
	return nil
}

// maxArrivingWindow bounds the window of a frame that arrives: the decoder takes that much
// memory, which the source of the frame can choose.
const maxArrivingWindow = 2 << 20

// DecompressArriving reads the frame of a chunk until the end of r, and decompresses what is
// there while the rest arrives. It refuses a frame with a large window, as ErrDigest, which
// Decompress may take. An error of r is returned as it is.
func (d *ChunkDecoder) DecompressArriving(r io.Reader, a *Arriving) error {
	z, _ := d.readers.Get().(*zstd.Decoder)
	if z == nil {
		var err error
		z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxArrivingWindow), zstd.WithDecoderMaxMemory(MaxChunkBlocks*BlockSize))
		if err != nil {
			panic(err) // only an option that makes no sense is an error
		}
	}
	defer d.readers.Put(z)
	defer func() { _ = z.Reset(nil) }() // it keeps no reference to r
	from := &arrivingReader{r: r}
	if err := z.Reset(from); err != nil {
		return err
	}
	n := 0
	var err error
	for err == nil && n < len(a.Content) {
		var m int
		m, err = z.Read(a.Content[n:])
		n += m
		a.Came(n)
	}
	if err == nil {
		var more [1]byte
		if m, end := io.ReadFull(z, more[:]); m > 0 {
			err = errors.New("it has more bytes than the chunk")
		} else if end != io.EOF {
			err = end
		}
	}
	switch {
	case from.err != nil && from.err != io.EOF:
		return from.err
	case err != nil:
		return &frameError{err}
	}
	return nil
}

// arrivingReader keeps the error of a reader, as it is.
type arrivingReader struct {
	r   io.Reader
	err error
}

func (r *arrivingReader) Read(p []byte) (n int, err error) {
	if n, err = r.r.Read(p); err != nil {
		r.err = err
	}
	return n, err
}
