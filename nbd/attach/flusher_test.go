package attach

import (
	"errors"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// After setFlusher the kernel knows every thread as one that carries writes, and those
// that begin later. Where that is impossible, the error says why.
func TestSetFlusher(t *testing.T) {
	if err := setFlusher(); err != nil {
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOTSUP) {
			t.Error(err)
		}
		return
	}
	const getFlusher = 58 // PR_GET_IO_FLUSHER
	var wg, all sync.WaitGroup
	all.Add(8)
	for range 8 {
		wg.Go(func() {
			runtime.LockOSThread() // each has a thread, and some are new
			defer runtime.UnlockOSThread()
			all.Done()
			all.Wait()
			if n, err := unix.PrctlRetInt(getFlusher, 0, 0, 0, 0); n != 1 || err != nil {
				t.Errorf("a thread is not known to the kernel: %d, %v", n, err)
			}
		})
	}
	wg.Wait()
}
