package attach

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// A device whose writes take long holds up a queue once. After that, writes that hang hold
// up no reader.
func TestSlowWrites(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		var hang atomic.Bool
		hanging, release := make(chan struct{}, 64), make(chan struct{})
		dev.OnWrite = func(ctx context.Context, _ blockmap.Extent) error {
			if !hang.Load() {
				time.Sleep(10 * time.Millisecond)
				return nil
			}
			hanging <- struct{}{}
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		n := attachTo(t, d, dev, Options{Queues: 1, Depth: 16})
		f := open(t, n.Path, unix.O_RDWR|unix.O_DIRECT)
		if err := f.write(pattern(1, 4096), 0); err != nil {
			t.Fatal(err)
		}
		hang.Store(true)
		const writes = 4
		written := make(chan error, writes)
		for i := range int64(writes) {
			go func() { written <- f.write(pattern(i, 4096), i*4096) }()
		}
		for range writes {
			within(t, "a write that hangs", hanging)
		}
		for i := range int64(50) {
			e := blockmap.Range(testSize/2+i*4096, 4096)
			f.mustRead(e, dev.Content(e))
		}
		close(release)
		for range writes {
			if err := within(t, "a write", written); err != nil {
				t.Error(err)
			}
		}
		for i := range int64(writes) {
			f.mustRead(blockmap.Range(i*4096, 4096), pattern(i, 4096))
		}
	})
}
