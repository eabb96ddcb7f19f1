package attach

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// setFlusher tells the kernel that this process carries writes of block devices
// (PR_SET_IO_FLUSHER). To find memory, the kernel writes dirty pages back; a page of a
// node is written back by this process; if this needs memory for it, it must not wait
// for that very page. So the kernel gives the threads of the process memory without
// writing anything back, and does not hold them up as writers of dirty pages.
//
// The setting belongs to a thread, and threads inherit it. So it is set once, on all
// threads that there are, before the process has its first node. Later it could hang: Go
// stops all goroutines for it, and waits for each thread. A thread that waits for a node
// of this process would wait for a goroutine that is stopped.
//
// Programs that are linked with cgo, as tests with the race detector are, cannot do it.
var setFlusher = sync.OnceValue(func() error {
	_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	switch {
	case e == 0:
		return nil
	case errors.Is(e, syscall.ENOTSUP):
		return fmt.Errorf("PR_SET_IO_FLUSHER on all threads: %w: the program is linked with cgo", e)
	case errors.Is(e, syscall.EPERM):
		return fmt.Errorf("PR_SET_IO_FLUSHER: %w: it requires CAP_SYS_RESOURCE", e)
	case errors.Is(e, syscall.EINVAL):
		return fmt.Errorf("PR_SET_IO_FLUSHER: %w: it requires Linux 5.6", e)
	}
	return fmt.Errorf("PR_SET_IO_FLUSHER: %w", e)
})

// protectWriters does what setFlusher says, and warns where a node that is written to goes
// without it.
func (s *serving) protectWriters() {
	if err := setFlusher(); err != nil && s.wdev != nil {
		s.log.Warn("cannot tell the kernel that this process carries writes; under memory pressure a write may wait for itself", "err", err)
	}
}
