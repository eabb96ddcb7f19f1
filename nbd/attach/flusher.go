package attach

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// protectWriters tells the kernel that this process carries writes of block devices
// (PR_SET_IO_FLUSHER). To find memory, the kernel writes dirty pages back; a page of a
// node is written back by this process; if this needs memory for it, it must not wait
// for that very page. So the kernel gives the threads of the process memory without
// writing anything back, and does not hold them up as writers of dirty pages.
//
// The setting belongs to a thread, and threads inherit it. So it is set on all threads
// that there are. Programs that are linked with cgo, as tests with the race detector
// are, cannot do that.
func (s *serving) protectWriters() {
	if s.wdev == nil {
		return
	}
	if err := setFlusher(); err != nil {
		s.log.Warn("cannot tell the kernel that this process carries writes; under memory pressure a write may wait for itself", "err", err)
	}
}

func setFlusher() error {
	_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	switch {
	case e == 0:
		return nil
	case errors.Is(e, syscall.ENOTSUP):
		if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("PR_SET_IO_FLUSHER: %w", err)
		}
		return fmt.Errorf("PR_SET_IO_FLUSHER on all threads: %w (the program is linked with cgo)", e)
	case errors.Is(e, syscall.EPERM):
		return fmt.Errorf("PR_SET_IO_FLUSHER requires CAP_SYS_RESOURCE: %w", e)
	case errors.Is(e, syscall.EINVAL):
		return fmt.Errorf("PR_SET_IO_FLUSHER requires Linux 5.6: %w", e)
	}
	return fmt.Errorf("PR_SET_IO_FLUSHER: %w", e)
}
