package fetcher

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// checkedReader gives bytes in pieces, and calls check before the last one.
type checkedReader struct {
	p     []byte
	check func()
}

func (r *checkedReader) Read(b []byte) (int, error) {
	if len(r.p) == 0 {
		return 0, io.EOF
	}
	n := min(len(b), 16<<10, max(len(r.p)-1, 1))
	if n == len(r.p) {
		r.check()
	}
	copy(b, r.p[:n])
	r.p = r.p[n:]
	return n, nil
}

// A frame is decompressed while it arrives, so that little is left to do when its last byte is
// here. A wrong frame is read to its end all the same: whoever decompresses all of it says
// what is wrong with it.
func TestChunksAreDecompressedWhileTheyArrive(t *testing.T) {
	content := bytes.Repeat([]byte("some content that compresses a little 0123456789 "), 1<<15)[:1<<20]
	for i := range content {
		content[i] += byte(i * i >> 9)
	}
	table, blob := blocktest.Stream(t, [][]byte{content})
	c := &table.Chunks[0]
	d := blockmap.NewChunkDecoder(1)
	defer d.Close()
	checked := false
	in := &inbound{decoder: d, p: make([]byte, len(blob)), frame: blockmap.NewArriving(c, make([]byte, len(content)))}
	in.body = &checkedReader{blob, func() {
		if checked = true; !bytes.Equal(in.frame.Content[:len(content)/2], content[:len(content)/2]) {
			t.Error("the first half is not decompressed when the last byte is to come")
		}
	}}
	if err := in.rest(); err != nil || !checked || in.n != int64(len(blob)) || !bytes.Equal(in.p, blob) || in.frame == nil || in.frame.Verify(c) != nil {
		t.Errorf("%d of %d bytes, %v", in.n, len(blob), err)
	}
	wrong := bytes.Clone(blob)
	wrong[len(wrong)/3] ^= 0x55
	copy(wrong[:4], "none")
	in = &inbound{decoder: d, body: bytes.NewReader(wrong), p: make([]byte, len(blob)), frame: blockmap.NewArriving(c, make([]byte, len(content)))}
	if err := in.rest(); err != nil || in.n != int64(len(blob)) || !bytes.Equal(in.p, wrong) || in.frame != nil {
		t.Errorf("a wrong frame: %d of %d bytes, %v", in.n, len(blob), err)
	}
	in = &inbound{decoder: d, body: bytes.NewReader(blob[:len(blob)/2]), p: make([]byte, len(blob)), frame: blockmap.NewArriving(c, make([]byte, len(content)))}
	if err := in.rest(); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, blockmap.ErrDigest) {
		t.Errorf("a body that is cut: %v", err)
	}
	in = &inbound{decoder: d, body: bytes.NewReader(content), p: make([]byte, len(content)), arriving: nil}
	in.arriving = blockmap.NewArriving(c, in.p)
	if err := in.rest(); err != nil || in.arriving.Verify(c) != nil {
		t.Errorf("uncompressed: %v", err)
	}
}
