package blockmap_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// frameOf returns content as a blob holds it, and its chunk.
func frameOf(t testing.TB, content []byte) (blockmap.Chunk, []byte) {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	frame := enc.EncodeAll(content, nil)
	return blockmap.Chunk{Digest: blockmap.ChunkDigest(content), Stored: uint32(len(frame)), Count: uint32(len(content) / blockmap.BlockSize)}, frame
}

func TestChunkDecoder(t *testing.T) {
	content := bytes.Repeat([]byte("the content of a chunk, 32 bytes"), 3*blockmap.BlockSize/32)
	c, frame := frameOf(t, content)
	_, longer := frameOf(t, append(bytes.Clone(content), 0))
	_, shorter := frameOf(t, content[1:])
	other := bytes.Clone(content)
	other[5000]++
	_, wrong := frameOf(t, other)
	bomb, _ := frameOf(t, make([]byte, 64<<20))
	bomb.Count = 1 // the frame holds 64 MiB
	_, huge := frameOf(t, make([]byte, 64<<20))

	d := blockmap.NewChunkDecoder(2)
	defer d.Close()
	for _, buf := range [][]byte{nil, make([]byte, 0, 10), make([]byte, 1<<20)} {
		got, err := d.Decode(&c, frame, buf)
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if cap(buf) >= len(content) && &got[0] != &buf[0] {
			t.Error("the content is not in the buffer that has room for it")
		}
	}
	for name, x := range map[string]struct {
		chunk   blockmap.Chunk
		frame   []byte
		corrupt bool
	}{
		"nothing":         {c, nil, false},
		"no frame":        {c, []byte("no frame at all"), true},
		"half of it":      {c, frame[:len(frame)/2], true},
		"longer":          {c, longer, true},
		"shorter":         {c, shorter, false},
		"other content":   {c, wrong, false},
		"64 MiB of zeros": {bomb, huge, true},
	} {
		got, err := d.Decode(&x.chunk, x.frame, nil)
		if !errors.Is(err, blockmap.ErrDigest) || errors.Is(err, blockmap.ErrCorrupt) != x.corrupt {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if err := c.Verify(other); !errors.Is(err, blockmap.ErrDigest) {
		t.Error(err)
	}

	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				if got, err := d.Decode(&c, frame, nil); err != nil || !bytes.Equal(got, content) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
}

func FuzzChunkDecoder(f *testing.F) {
	content := bytes.Repeat([]byte("thaw"), blockmap.BlockSize/4)
	c, frame := frameOf(f, content)
	f.Add(frame)
	f.Add(frame[:10])
	f.Add([]byte{})
	d := blockmap.NewChunkDecoder(1)
	f.Cleanup(d.Close)
	f.Fuzz(func(t *testing.T, frame []byte) {
		got, err := d.Decode(&c, frame, nil)
		if err == nil && !bytes.Equal(got, content) {
			t.Fatalf("%d bytes differ from the chunk", len(got))
		}
		// A frame of a bundle has at most the content that its head says.
		if part, err := d.DecompressSize(100, frame, nil); err == nil && len(part) > 100 {
			t.Fatalf("a frame of 100 bytes has %d", len(part))
		} else if err != nil && !errors.Is(err, blockmap.ErrDigest) {
			t.Fatal(err)
		}
		if err != nil && !errors.Is(err, blockmap.ErrDigest) {
			t.Fatal(err)
		}
	})
}
