package nbd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/edsrzf/mmap-go"

	"thaw/blockmap"
)

// cutDevice is a device over a mapped file. The file is truncated without the device's
// notice, which looks like a bad sector: a chunk counts as resident until a caller
// reports it as damaged. Then it is fetched to memory.
type cutDevice struct {
	t       testing.TB
	content []byte
	path    string      // of the file
	maps    []mmap.MMap // the last one is in use

	mu struct {
		sync.Mutex
		chunks [][]byte // nil: absent
		away   bool
		pinned int
	}
}

// newCutDevice makes a device of n chunks of cachedChunk bytes. One block in each third
// chunk is a hole.
func newCutDevice(t testing.TB, chunks int) *cutDevice {
	d := &cutDevice{t: t, content: make([]byte, chunks*cachedChunk)}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range d.content {
		d.content[i] = byte(rng.Uint32()) | 1 // no zeros, which are what goes wrong
	}
	for i := 2; i < chunks; i += 3 {
		h := d.hole(i)
		clear(d.content[h.Start:h.End])
	}
	d.mu.chunks = make([][]byte, chunks)
	t.Cleanup(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.mu.pinned != 0 {
			t.Errorf("%d segments are pinned at the end", d.mu.pinned)
		}
		d.unmap()
	})
	return d
}

// unmap releases the files that no view shows. d.mu is held.
func (d *cutDevice) unmap() {
	clear(d.mu.chunks)
	for _, m := range d.maps {
		m.Unmap()
	}
	d.maps = nil
}

// hole returns the hole in chunk i.
func (d *cutDevice) hole(i int) (e blockmap.Extent) {
	if i%3 == 2 {
		e = blockmap.Range(int64(i)*cachedChunk+cachedChunk/2, 16*blockmap.BlockSize)
	}
	return e
}

// cut makes the whole device resident, in a file that is truncated to n bytes.
func (d *cutDevice) cut(n int64) {
	d.t.Helper()
	if d.path != "" {
		os.Remove(d.path)
	}
	d.mu.Lock()
	if d.mu.pinned == 0 {
		d.unmap()
	}
	d.mu.Unlock()
	path := filepath.Join(d.t.TempDir(), "data")
	d.path = path
	if err := os.WriteFile(path, d.content, 0o600); err != nil {
		d.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	m, err := mmap.Map(f, mmap.RDONLY, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	d.maps = append(d.maps, m)
	if err := f.Truncate(n); err != nil {
		d.t.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.mu.chunks {
		d.mu.chunks[i] = m[i*cachedChunk : (i+1)*cachedChunk]
	}
}

// cutMore truncates the file that is in use.
func (d *cutDevice) cutMore(n int64) {
	d.t.Helper()
	if err := os.Truncate(d.path, n); err != nil {
		d.t.Fatal(err)
	}
}

func (d *cutDevice) setAway(away bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.away = away
}

func (d *cutDevice) Size() int64         { return int64(len(d.content)) }
func (d *cutDevice) Pinned(uint64) int64 { return cachedChunk }

func (d *cutDevice) Unpin(uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.pinned--
}

func (d *cutDevice) Damaged(token uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.chunks[token] = nil
}

func (d *cutDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := e.Start / cachedChunk; i*cachedChunk < e.End; i++ {
		if d.mu.chunks[i] == nil {
			return blockmap.View{}, false
		}
	}
	for e.Len() > 0 {
		i := e.Start / cachedChunk
		at, hole := i*cachedChunk, d.hole(int(i))
		end := min(e.End, at+cachedChunk)
		if e.Start < hole.End {
			if e.Start >= hole.Start {
				v.AppendZeros(min(end, hole.End) - e.Start)
				e.Start = min(end, hole.End)
				continue
			}
			end = min(end, hole.Start)
		}
		d.mu.pinned++
		v.Append(d.mu.chunks[i][e.Start-at:end-at], d, uint64(i))
		e.Start = end
	}
	return v, true
}

func (d *cutDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}

func (d *cutDevice) Fault(ctx context.Context, e blockmap.Extent) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := e.Start / cachedChunk; i*cachedChunk < e.End; i++ {
		if d.mu.chunks[i] != nil {
			continue
		}
		if d.mu.away {
			return fmt.Errorf("fetch bytes %v: %w", e, errAway)
		}
		d.mu.chunks[i] = d.content[i*cachedChunk : (i+1)*cachedChunk]
	}
	return ctx.Err()
}

func (d *cutDevice) Status(e blockmap.Extent) blockmap.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := e.Start / cachedChunk
	e.End = min(e.End, (i+1)*cachedChunk)
	return blockmap.Status{Extent: e, Resident: d.mu.chunks[i] != nil}
}

func (d *cutDevice) Prefetch(e blockmap.Extent) { d.Fault(context.Background(), e) }
