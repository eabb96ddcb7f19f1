package blockmap_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// overlayContent is the content of the base of most tests: every fourth block is a hole.
func overlayContent(blocks int) []byte {
	rng := rand.New(rand.NewPCG(1, 110))
	p := make([]byte, blocks*blockmap.BlockSize)
	for i := range p {
		if i/blockmap.BlockSize%4 != 3 {
			p[i] = byte(1 + rng.IntN(255))
		}
	}
	return p
}

// newBase makes a cold base of that content.
func newBase(content []byte) *blocktest.Memory {
	d := blocktest.NewMemory(int64(len(content)))
	for at := range int64(len(content) / blockmap.BlockSize) {
		if at%4 != 3 {
			d.Fill(content[at*blockmap.BlockSize:][:blockmap.BlockSize], at*blockmap.BlockSize)
		}
	}
	d.Evict(blockmap.Range(0, d.Size()))
	return d
}

func openOverlay(t testing.TB, dir string, base blockmap.Device, o blockmap.OverlayOptions) *blockmap.Overlay {
	t.Helper()
	d, err := blockmap.OpenOverlay(dir, base, o)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

// A device with an overlay conforms, in a directory and without one.
func TestOverlayConforms(t *testing.T) {
	content := overlayContent(100)
	type crashable struct {
		fsys *blocktest.FS
		dir  string
		boot byte
	}
	at := make(map[blockmap.WritableDevice]*crashable)
	open := func(t *testing.T, c *crashable, limit int64) blockmap.WritableDevice {
		d := openOverlay(t, c.dir, newBase(content), blockmap.OverlayOptions{FS: c.fsys, Boot: blockmap.BootID{c.boot}, Limit: limit})
		at[d] = c
		return d
	}
	rng := rand.New(rand.NewPCG(2, 110))
	blocktest.TestWritableDevice(t, blocktest.Writable{
		Content: content,
		Open: func(t *testing.T) blockmap.WritableDevice {
			return open(t, &crashable{blocktest.NewFS(), filepath.Join(t.TempDir(), "overlay"), 1}, 0)
		},
		Crash: func(t *testing.T, d blockmap.WritableDevice) blockmap.WritableDevice {
			c := at[d]
			c.fsys.Kill()
			must(t, c.fsys.PowerCut(rng))
			c.boot++
			return open(t, c, 0)
		},
		Limited: func(t *testing.T, room int64) blockmap.WritableDevice {
			return open(t, &crashable{blocktest.NewFS(), t.TempDir(), 1}, room)
		},
	})
}

func TestEphemeralConforms(t *testing.T) {
	content := overlayContent(100)
	blocktest.TestWritableDevice(t, blocktest.Writable{
		Content: content,
		Open: func(t *testing.T) blockmap.WritableDevice {
			d, err := blockmap.OpenEphemeral(t.TempDir(), newBase(content), blockmap.OverlayOptions{})
			must(t, err)
			t.Cleanup(func() { must(t, d.Close()) })
			return d
		},
		Limited: func(t *testing.T, room int64) blockmap.WritableDevice {
			d, err := blockmap.OpenEphemeral(t.TempDir(), newBase(content), blockmap.OverlayOptions{Limit: room})
			must(t, err)
			t.Cleanup(func() { must(t, d.Close()) })
			return d
		},
	})
}

// large is a device that says it has more bytes.
type large struct {
	blockmap.Device
	size int64
}

func (d large) Size() int64 { return d.size }

// An overlay of a large device takes memory for what was changed, not for its size: a host has
// hundreds of them.
func TestOverlayMemory(t *testing.T) {
	const overlays, size = 8, 64 << 30 // two bits of each block, twice, are 8 MiB
	base := large{blocktest.NewMemory(1 << 20), size}
	dir := t.TempDir()
	heap := func() int64 {
		var st runtime.MemStats
		for range 2 {
			runtime.GC()
		}
		runtime.ReadMemStats(&st)
		return int64(st.HeapAlloc)
	}
	for _, what := range []string{"made", "opened again"} {
		before := heap()
		var all []*blockmap.Overlay
		for i := range overlays {
			d := openOverlay(t, filepath.Join(dir, fmt.Sprint(i)), base, blockmap.OverlayOptions{Boot: blockmap.BootID{1}})
			must(t, d.WriteAt(t.Context(), make([]byte, 4096), 48<<30))
			must(t, d.Flush(t.Context()))
			all = append(all, d)
		}
		if each := (heap() - before) / overlays; each > 512<<10 {
			t.Errorf("an overlay of %d GiB that was %s takes %d KiB of memory", size>>30, what, each>>10)
		} else {
			t.Logf("an overlay of %d GiB that was %s takes %d KiB of memory", size>>30, what, each>>10)
		}
		for _, d := range all {
			must(t, d.Close())
		}
	}
}
