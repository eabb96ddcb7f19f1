package host

import (
	"errors"
	"sync"
	"testing"

	"thaw/blockmap/blocktest"
	"thaw/nbd/attach"
)

// A host that ends because nobody uses it takes nothing away from whoever comes in this moment:
// either it does not end, or they are told.
func TestEndUnused(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	for range 20 {
		h := r.open(Options{})
		var attached, added error
		var device *Device
		ended := false
		var wg sync.WaitGroup
		wg.Go(func() { _, attached = h.Attach(t.Context(), NodeSpec{Image: image, Driver: attach.FUSE}) })
		wg.Go(func() {
			var d []*Device
			if d, added = h.Add(t.Context(), Spec{Name: image}); added == nil {
				device = d[0]
			}
		})
		wg.Go(func() { ended = h.EndUnused() })
		wg.Wait()
		for _, err := range []error{attached, added} {
			if ended && !errors.Is(err, ErrClosed) || !ended && err != nil {
				t.Errorf("ended: %t, whoever comes gets %v", ended, err)
			}
		}
		if n := len(h.Nodes()); n > 0 == ended {
			t.Errorf("ended: %t, %d nodes", ended, n)
		}
		if !ended {
			if h.EndUnused() {
				t.Error("a host that is used ends")
			}
			if gone, err := h.Detach(t.Context(), h.Nodes()[0].ID, false); err != nil || !gone {
				t.Errorf("%t, %v", gone, err)
			}
			if err := h.Remove(t.Context(), device.ID()); err != nil {
				t.Error(err)
			}
			await(t, "it is not used any more", h.EndUnused)
		}
		if _, err := h.Attach(t.Context(), NodeSpec{Image: image, Driver: attach.FUSE}); !errors.Is(err, ErrClosed) {
			t.Errorf("attach to a host that has ended: %v", err)
		}
		h.Close()
	}
}
