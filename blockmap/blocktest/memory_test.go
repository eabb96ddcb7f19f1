package blocktest_test

import (
	"math/rand/v2"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// content is 64 blocks, of which every fourth is a hole.
func content() []byte {
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 64*blockmap.BlockSize)
	for i := range p {
		if i/blockmap.BlockSize%4 != 3 {
			p[i] = byte(1 + rng.IntN(255))
		}
	}
	return p
}

// newMemory makes a cold device of p.
func newMemory(p []byte) *blocktest.Memory {
	d := blocktest.NewMemory(int64(len(p)))
	for at := range int64(len(p) / blockmap.BlockSize) {
		if at%4 != 3 {
			d.Fill(p[at*blockmap.BlockSize:][:blockmap.BlockSize], at*blockmap.BlockSize)
		}
	}
	d.Evict(blockmap.Range(0, d.Size()))
	return d
}

func TestColdMemory(t *testing.T) {
	p := content()
	blocktest.TestCold(t, p, func(t *testing.T) blockmap.Device {
		d := newMemory(p)
		d.Prefetch(blockmap.Range(0, d.Size()))
		d.Chill(blockmap.Range(0, d.Size()))
		return d
	})
}

func TestMemoryConforms(t *testing.T) {
	p := content()
	rng := rand.New(rand.NewPCG(2, 1))
	blocktest.TestWritableDevice(t, blocktest.Writable{
		Content: p,
		Open: func(t *testing.T) blockmap.WritableDevice {
			d := newMemory(p)
			t.Cleanup(func() { d.NoPins(t) })
			return d
		},
		Crash: func(t *testing.T, d blockmap.WritableDevice) blockmap.WritableDevice {
			return d.(*blocktest.Memory).Crash(rng)
		},
		Limited: func(t *testing.T, room int64) blockmap.WritableDevice {
			d := newMemory(p)
			d.Space = int64(len(p))*3/4 + room/2 // a quarter of what is written lies in holes
			return d
		},
		ReadOnly: func(t *testing.T) blockmap.WritableDevice {
			d := newMemory(p)
			d.ReadOnly = true
			return d
		},
	})
}
