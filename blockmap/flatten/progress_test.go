package flatten

import (
	"fmt"
	"sync"
	"testing"
)

// heard is what a Progress has heard of each layer.
type heard struct {
	mu     sync.Mutex
	layers map[int]*heardLayer
}

type heardLayer struct {
	read, size, pushed int64
	done               string
}

func (h *heard) layer(i int, f func(l *heardLayer)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.layers == nil {
		h.layers = make(map[int]*heardLayer)
	}
	if h.layers[i] == nil {
		h.layers[i] = new(heardLayer)
	}
	f(h.layers[i])
}

func (h *heard) Read(i int, n int64)    { h.layer(i, func(l *heardLayer) { l.read += n }) }
func (h *heard) Push(i int, size int64) { h.layer(i, func(l *heardLayer) { l.size = size }) }
func (h *heard) Pushed(i int, n int64)  { h.layer(i, func(l *heardLayer) { l.pushed = n }) }
func (h *heard) Done(i int, reused bool) {
	h.layer(i, func(l *heardLayer) { l.done += fmt.Sprint("done reused=", reused) })
}

// TestProgress builds an image whose second and third layer are the same, twice.
func TestProgress(t *testing.T) {
	a, b := tarball(t, reg("a", noise(1, 300_000))), tarball(t, reg("b", noise(2, 300_000)))
	src := newSource(t, gzipped, a, b, b)
	dst := newTarget(t)
	var h heard
	o := testOptions
	o.Progress = &h
	res := build(t, src, dst, o)
	for i, l := range h.layers {
		twice := i == 2
		if want := fmt.Sprint("done reused=", twice); l.done != want || res.Layers[i].Reused != twice {
			t.Errorf("layer %d: %q, and reused=%v in the result", i, l.done, res.Layers[i].Reused)
		}
		want := heardLayer{read: src.Layers[i].Size, size: res.Layers[i].Stored, pushed: res.Layers[i].Stored, done: l.done}
		if twice {
			want = heardLayer{done: l.done}
		}
		if *l != want {
			t.Errorf("layer %d: heard %+v, want %+v", i, *l, want)
		}
	}
	h.layers = nil
	build(t, src, dst, o)
	for i := range src.Layers {
		if want := (heardLayer{done: "done reused=true"}); *h.layers[i] != want {
			t.Errorf("layer %d: heard %+v, want %+v", i, *h.layers[i], want)
		}
	}
}
