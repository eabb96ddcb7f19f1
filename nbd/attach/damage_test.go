package attach

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// damagedDevice shows bytes of a mapped file that was cut short, until a reader reports
// it. Then it has them in memory, as after a fetch.
type damagedDevice struct {
	*blocktest.Memory
	m       mmap.MMap
	reports atomic.Int64
	known   [testSize / blockmap.BlockSize]atomic.Bool
}

func newDamaged(t *testing.T) *damagedDevice {
	path := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(path, pattern(0, testSize), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := &damagedDevice{Memory: blocktest.NewMemory(testSize)}
	d.Fill(pattern(0, testSize), 0)
	if d.m, err = mmap.Map(f, mmap.RDONLY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.m.Unmap() })
	if err := f.Truncate(testSize / 2); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *damagedDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(testSize) != nil {
		return v, false
	}
	for at := e.Start; at < e.End; {
		n := min(e.End-at, blockmap.BlockSize-at%blockmap.BlockSize)
		if d.known[at/blockmap.BlockSize].Load() {
			part, ok := d.Memory.View(blockmap.Range(at, n))
			if !ok {
				return v, false
			}
			v.Append(part.Segments()[0].Bytes, nil, 0)
			part.Release()
		} else {
			v.Append(d.m[at:at+n], d, uint64(at))
		}
		at += n
	}
	return v, true
}

func (d *damagedDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}

func (d *damagedDevice) Unpin(uint64)        {}
func (d *damagedDevice) Pinned(uint64) int64 { return blockmap.BlockSize }
func (d *damagedDevice) Damaged(at uint64) {
	d.reports.Add(1)
	d.known[at/blockmap.BlockSize].Store(true)
}

// touch finds a page that cannot be read, wherever it is, and however p begins.
func TestTouch(t *testing.T) {
	d := newDamaged(t)
	for _, c := range []struct {
		e    blockmap.Extent
		good bool
	}{
		{blockmap.Range(0, 0), true},
		{blockmap.Range(0, testSize/2), true},
		{blockmap.Range(100, testSize/2-100), true},
		{blockmap.Range(testSize/2-4096, 4097), false},
		{blockmap.Range(testSize/2-1, 2), false},
		{blockmap.Range(testSize/2-5000, 5001), false},
		{blockmap.Range(testSize/2, 1), false},
		{blockmap.Range(0, testSize), false},
	} {
		if err := touch(d.m[c.e.Start:c.e.End]); (err == nil) != c.good {
			t.Errorf("%v: %v", c.e, err)
		}
	}
}

// A file of the cache that was cut short costs a fetch, and no reader an error.
func TestDamage(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDamaged(t)
		n := attachTo(t, d, readOnly{dev}, Options{Queues: 1})
		f := open(t, n.Path, unix.O_RDONLY|unix.O_DIRECT)
		for _, e := range []blockmap.Extent{
			blockmap.Range(0, 65536),
			blockmap.Range(testSize/2-8192, 16384), // across the end of the file
			blockmap.Range(testSize*3/4, 4096),
			blockmap.Range(testSize*3/4+512, 4096),
			blockmap.Range(testSize-(256<<10), 256<<10),
		} {
			f.mustRead(e, pattern(e.Start, e.Len()))
			f.mustRead(e, pattern(e.Start, e.Len()))
		}
		if dev.reports.Load() == 0 {
			t.Error("nobody has reported the damage")
		}
		if st := n.Stats(); st.Errors != 0 {
			t.Errorf("%+v", st)
		}
	})
}
