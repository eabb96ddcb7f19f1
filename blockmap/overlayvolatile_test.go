package blockmap_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

func TestVolatileConforms(t *testing.T) {
	content := overlayContent(100)
	open := func(t *testing.T, room int64) blockmap.WritableDevice {
		return openOverlay(t, t.TempDir(), newBase(content), blockmap.OverlayOptions{Volatile: true, Boot: blockmap.BootID{1}, Limit: room})
	}
	blocktest.TestWritableDevice(t, blocktest.Writable{
		Content: content,
		Open:    func(t *testing.T) blockmap.WritableDevice { return open(t, 0) },
		Limited: open,
	})
}

// A volatile overlay syncs nothing once it is made, and has all writes after the end of its
// process, also in two levels. Where the kernel may not have had them, it is refused: it
// never reads as it was before.
func TestVolatileOutlivesTheProcess(t *testing.T) {
	content := overlayContent(100)
	base := newBase(content)
	fsys, dir, boot := blocktest.NewFS(), filepath.Join(t.TempDir(), "overlay"), blockmap.BootID{1}
	var syncs atomic.Int64
	fsys.Fail(func(op, path string) error {
		if op == "sync" && filepath.Dir(path) == dir {
			syncs.Add(1)
		}
		return nil
	})
	open := func() (*blockmap.Overlay, error) {
		return blockmap.OpenOverlay(dir, base, blockmap.OverlayOptions{FS: fsys, Boot: boot, Volatile: true})
	}
	d, err := open()
	must(t, err)
	made := syncs.Load()
	if made == 0 {
		t.Fatal("no sync is counted")
	}
	want := bytes.Clone(content)
	write := func(d *blockmap.Overlay, at int, p []byte) {
		t.Helper()
		must(t, d.WriteAt(t.Context(), p, int64(at)))
		copy(want[at:], p)
	}
	check := func(d *blockmap.Overlay) {
		t.Helper()
		got := make([]byte, len(want))
		must(t, blockmap.ReadInto(t.Context(), d, blockmap.Range(0, d.Size()), got))
		if !bytes.Equal(got, want) {
			t.Fatal("other bytes")
		}
	}
	write(d, 5000, bytes.Repeat([]byte{1}, 20000))
	must(t, d.Zero(t.Context(), blockmap.Range(8*blockmap.BlockSize, blockmap.BlockSize), false))
	clear(want[8*blockmap.BlockSize : 9*blockmap.BlockSize])
	must(t, d.Flush(t.Context()))
	if n := syncs.Load(); n != made || d.Stats().Syncs != 0 {
		t.Errorf("a flush syncs: %d syncs, %d before; %+v", n, made, d.Stats())
	}

	// The process ends, in order and by a kill.
	must(t, d.Close())
	if n := syncs.Load(); n != made {
		t.Errorf("Close syncs: %d syncs, %d before", n, made)
	}
	d, err = open()
	must(t, err)
	check(d)
	write(d, 100, bytes.Repeat([]byte{2}, 50000))
	_, err = d.Freeze(t.Context())
	must(t, err)
	write(d, 40000, bytes.Repeat([]byte{3}, 30000))
	fsys.Kill()
	_ = d.Close()
	d, err = open()
	must(t, err)
	check(d)
	if f, err := d.Freeze(t.Context()); err != nil { // once the levels are merged
		t.Error(err)
	} else {
		must(t, f.Merge(t.Context()))
	}
	check(d)
	fsys.Kill()
	_ = d.Close()

	// The filesystem is mounted anew, or the machine has rebooted.
	rng := rand.New(rand.NewPCG(7, 110))
	refused := func(what string) {
		t.Helper()
		if d, err := open(); !errors.Is(err, blockmap.ErrVolatile) {
			if err == nil {
				d.Close()
			}
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, fsys.Remount(rng))
	refused("mounted anew")
	boot[0]++
	refused("rebooted")
	boot = blockmap.BootID{}
	refused("without a boot ID")
	must(t, blockmap.RemoveOverlay(fsys, dir))
	boot[0] = 3
	d, err = open()
	must(t, err)
	want = content
	check(d)
	must(t, d.Close())
}

// A filesystem that cannot give space back keeps no volatile overlay from discarding and
// zeroing: the blocks are zeros, and are counted as such.
func TestVolatileWithoutHoles(t *testing.T) {
	content := overlayContent(100)
	fsys := blocktest.NewFS()
	o, err := blockmap.OpenOverlay(filepath.Join(t.TempDir(), "overlay"), newBase(content), blockmap.OverlayOptions{FS: fsys, Boot: blockmap.BootID{1}, Volatile: true})
	must(t, err)
	defer o.Close()
	e := blockmap.Range(8*blockmap.BlockSize, 4*blockmap.BlockSize)
	for _, failure := range []error{unix.EOPNOTSUPP, unix.ENOSPC, unix.EIO} {
		for what, zero := range map[string]func() error{
			"discard": func() error { return o.Discard(t.Context(), e) },
			"zero":    func() error { return o.Zero(t.Context(), e, true) },
		} {
			must(t, o.WriteAt(t.Context(), bytes.Repeat([]byte{1}, int(e.Len())), e.Start))
			fsys.Fail(func(op, path string) error {
				if op == "punch" {
					return failure
				}
				return nil
			})
			err := zero()
			fsys.Fail(nil)
			st := o.Stats()
			if err != nil || st.Data != 0 || st.Zero != e.Len() {
				t.Errorf("%s with %v: %v; %d bytes of data, %d of zeros", what, failure, err, st.Data, st.Zero)
			}
			got := make([]byte, e.Len())
			must(t, blockmap.ReadInto(t.Context(), o, e, got))
			if !bytes.Equal(got, make([]byte, e.Len())) {
				t.Errorf("%s with %v: other bytes", what, failure)
			}
		}
	}
}
