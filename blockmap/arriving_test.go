package blockmap

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
)

// arrivingChunk is a chunk of size bytes that compresses to about a third, its content, and
// its frame.
func arrivingChunk(t testing.TB, size int) (c *Chunk, content, frame []byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 1))
	content = make([]byte, size)
	for i := range content {
		if content[i] = byte(rng.Uint32()); i%4 != 0 {
			content[i] &= 1
		}
	}
	return &Chunk{Count: uint32(size / BlockSize), Digest: ChunkDigest(content)}, content, zstdFrame(t, content)
}

func zstdFrame(t testing.TB, content []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(content, nil)
}

// A chunk that arrives in parts has the leaves that have come hashed, and is verified at the
// end as one that has come at once.
func TestArriving(t *testing.T) {
	for _, size := range []int{BlockSize, LeafSize - BlockSize, LeafSize, LeafSize + BlockSize, 5*LeafSize + 3*BlockSize, MaxChunkBlocks * BlockSize} {
		c, content, _ := arrivingChunk(t, size)
		for _, step := range []int{1000, LeafSize, size} {
			a := NewArriving(c, make([]byte, size))
			for n := 0; n < size; n += step {
				copy(a.Content[n:], content[n:min(n+step, size)])
				a.Came(min(n+step, size))
				if a.n != min(n+step, size)/LeafSize {
					t.Fatalf("%d of %d bytes: %d leaves are hashed", n+step, size, a.n)
				}
			}
			if err := a.Verify(c); err != nil {
				t.Errorf("%d bytes by %d: %v", size, step, err)
			}
			if err := a.Verify(c); err != nil {
				t.Errorf("%d bytes by %d, again: %v", size, step, err)
			}
			other := *c
			other.Digest[0]++
			if err := a.Verify(&other); !errors.Is(err, ErrDigest) {
				t.Errorf("another chunk: %v", err)
			}
			other = *c
			other.Count++
			if err := a.Verify(&other); !errors.Is(err, ErrDigest) {
				t.Errorf("a chunk of another size: %v", err)
			}
		}
		for _, at := range []int{0, size / 2, size - 1} {
			a := NewArriving(c, bytes.Clone(content))
			a.Content[at]++
			a.Came(size)
			if err := a.Verify(c); !errors.Is(err, ErrDigest) {
				t.Errorf("byte %d of %d is wrong: %v", at, size, err)
			}
		}
	}
}

// A frame is decompressed as it comes. One that is no frame, or has more or fewer bytes than
// the chunk, is refused, and takes no memory.
func TestDecompressArriving(t *testing.T) {
	const size = 3*LeafSize + BlockSize
	c, content, frame := arrivingChunk(t, size)
	d := NewChunkDecoder(1)
	defer d.Close()
	for name, r := range map[string]io.Reader{"at once": bytes.NewReader(frame), "by bytes": iotest.OneByteReader(bytes.NewReader(frame)), "with its end": iotest.DataErrReader(bytes.NewReader(frame))} {
		a := NewArriving(c, make([]byte, size))
		if err := d.DecompressArriving(r, a); err != nil || !bytes.Equal(a.Content, content) || a.Verify(c) != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := bytes.Clone(content)
	bomb := zstdFrame(t, make([]byte, 128<<20))
	for name, frame := range map[string][]byte{
		"nothing": nil, "no frame": content[:1000], "a byte more": append(bytes.Clone(frame), 0), "cut": frame[:len(frame)/2],
		"a shorter content": zstdFrame(t, content[:size-BlockSize]), "a longer content": zstdFrame(t, append(long, 1)), "two frames": slices.Concat(frame, frame),
		"128 MiB": bomb,
	} {
		a := NewArriving(c, make([]byte, size))
		if err := d.DecompressArriving(bytes.NewReader(frame), a); !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A frame that claims a window of 4 MiB: the descriptor after the magic number says that a
	// byte of the window follows, which is an exponent.
	large := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 12 << 3}, 0x01, 0x00, 0x00)
	if err := d.DecompressArriving(bytes.NewReader(large), NewArriving(c, make([]byte, size))); !errors.Is(err, zstd.ErrWindowSizeExceeded) && !errors.Is(err, zstd.ErrDecoderSizeExceeded) || !errors.Is(err, ErrDigest) {
		t.Errorf("a large window: %v", err)
	}
	// An error of the source is no fault of the frame.
	broken := errors.New("broken")
	err := d.DecompressArriving(io.MultiReader(bytes.NewReader(frame[:len(frame)/2]), iotest.ErrReader(broken)), NewArriving(c, make([]byte, size)))
	if !errors.Is(err, broken) || errors.Is(err, ErrDigest) {
		t.Errorf("the source breaks: %v", err)
	}
}

// FuzzDecompressArriving decompresses any bytes, at once and as they arrive. What is right as
// it arrives is right at once; the other way round, a large window is refused.
func FuzzDecompressArriving(f *testing.F) {
	const size = LeafSize + BlockSize
	c, content, frame := arrivingChunk(f, size)
	f.Add(frame)
	f.Add(frame[:len(frame)-1])
	f.Add(zstdFrame(f, content[:100]))
	f.Add(append(zstdFrame(f, content[:LeafSize]), zstdFrame(f, content[LeafSize:])...))
	d := NewChunkDecoder(1)
	f.Cleanup(d.Close)
	f.Fuzz(func(t *testing.T, frame []byte) {
		got, err := d.Decode(c, frame, make([]byte, size))
		a := NewArriving(c, make([]byte, size))
		arrivingErr := d.DecompressArriving(bytes.NewReader(frame), a)
		if arrivingErr == nil {
			arrivingErr = a.Verify(c)
		}
		var h zstd.Header
		large := h.Decode(frame) == nil && h.WindowSize > maxArrivingWindow
		if err != nil && arrivingErr == nil || err == nil && arrivingErr != nil && !large || arrivingErr == nil && !bytes.Equal(got, a.Content) {
			t.Fatalf("at once: %v; as it arrives: %v", err, arrivingErr)
		}
		if arrivingErr != nil && !errors.Is(arrivingErr, ErrDigest) {
			t.Fatal(arrivingErr)
		}
	})
}

// BenchmarkArriving decompresses and verifies a chunk of 1 MiB: at once, and as it arrives.
func BenchmarkArriving(b *testing.B) {
	c, content, frame := arrivingChunk(b, 1<<20)
	d := NewChunkDecoder(1)
	defer d.Close()
	b.Run("at-once", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.Decode(c, frame, content); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("arriving", func(b *testing.B) {
		for b.Loop() {
			a := NewArriving(c, content)
			err := d.DecompressArriving(bytes.NewReader(frame), a)
			if err == nil {
				err = a.Verify(c)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
