package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"thaw/blockmap"
)

func TestBackend(t *testing.T) {
	const testSize = 64 << 10
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize/2))
	b := &Backend{Device: dev}
	if n, err := b.Size(); n != testSize || err != nil {
		t.Errorf("Size: %d, %v", n, err)
	}
	if err := iotest.TestReader(io.NewSectionReader(b, 0, testSize), dev.Content(blockmap.Range(0, testSize))); err != nil {
		t.Error(err)
	}
	p := make([]byte, 100)
	for _, test := range []struct {
		off  int64
		n    int
		want error
	}{{0, 100, nil}, {testSize - 30, 30, io.EOF}, {testSize, 0, io.EOF}, {testSize + 1, 0, io.EOF}} {
		if n, err := b.ReadAt(p, test.off); n != test.n || err != test.want {
			t.Errorf("ReadAt %d: %d, %v", test.off, n, err)
		}
	}
	if _, err := b.ReadAt(p, -1); !errors.Is(err, blockmap.ErrOutOfRange) {
		t.Errorf("ReadAt -1: %v", err)
	}
	if n, err := b.WriteAt(pattern(5, 100), 50); n != 100 || err != nil {
		t.Errorf("WriteAt: %d, %v", n, err)
	}
	if !bytes.Equal(dev.Content(blockmap.Range(50, 100)), pattern(5, 100)) {
		t.Error("wrong data written")
	}
	if _, err := b.WriteAt(p, testSize-50); !errors.Is(err, blockmap.ErrOutOfRange) {
		t.Errorf("WriteAt beyond the end: %v", err)
	}
	if err := b.Sync(); err != nil || dev.Dirty() != 0 {
		t.Errorf("Sync: %v, %d writes are not flushed", err, dev.Dirty())
	}

	dev.Evict(blockmap.Range(0, 4096))
	dev.OnFault = func(context.Context, blockmap.Extent) error { return errBroken }
	if _, err := b.ReadAt(p, 0); err != errBroken {
		t.Errorf("ReadAt of unavailable bytes: %v", err)
	}
	r := &Backend{Device: readOnly{dev}}
	if _, err := r.WriteAt(p, 0); err != blockmap.ErrReadOnly {
		t.Errorf("WriteAt: %v", err)
	}
	if err := r.Sync(); err != nil {
		t.Errorf("Sync: %v", err)
	}
	dev.NoPins(t)
}
