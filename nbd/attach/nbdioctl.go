package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The commands of the kernel's nbd driver by ioctl, of linux/nbd.h. They are what there is
// where netlink is missing: up to Linux 6.12 at least, the kernel has the netlink family nbd
// in the network namespace of the host only. They can less than netlink. The kernel gives
// no device away, so this process looks for one that nobody has. It takes no new connection
// once the device works, so a dead one is not replaced, and no other process can go on with
// the device.
const (
	nbdSetSock       = 0xab00
	nbdSetBlockSize  = 0xab01
	nbdDoIt          = 0xab03
	nbdClearSock     = 0xab04
	nbdSetSizeBlocks = 0xab07
	nbdDisconnectNow = 0xab08
	nbdSetTimeout    = 0xab09
	nbdSetFlags      = 0xab0a
)

func nbdIoctl(fd, command, arg int) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(command), uintptr(arg))
	if e != 0 {
		return e
	}
	return nil
}

// nbdHolder holds a device that was made by ioctl. The kernel takes all connections from
// one thread, and keeps a thread for as long as the device works.
type nbdHolder struct {
	number uint32
	over   chan struct{} // closed when the thread ends
	result error         // of the command that works the device; read it when over is closed

	mu sync.Mutex
	fd int // of the node; -1 when the thread has closed it
}

// connectByIoctl makes a device without netlink.
func (d *nbdDevice) connectByIoctl(ctx context.Context, queues int) error {
	ps, err := newPairs(queues)
	if err != nil {
		return err
	}
	h := &nbdHolder{fd: -1, over: make(chan struct{})}
	ready := make(chan error, 1)
	d.conns.Go(func() { h.run(ctx, d, ps, ready) })
	if err := <-ready; err != nil {
		<-h.over
		ps.close()
		return fmt.Errorf("nbd: by ioctl: %w", err)
	}
	d.holder = h
	d.n.state.Number, d.n.state.Path = h.number, nodePath(NBD, h.number)
	d.serve(ps)
	if d.n.state.Task, err = h.started(ctx, d.n.serving.size); err == nil {
		return nil
	}
	d.n.leaving.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), nbdPatience)
	defer cancel()
	return errors.Join(fmt.Errorf("nbd: by ioctl: %w", err), d.detach(ctx))
}

// run is the thread. It tells ready whether there is a device, and works it until it is
// disconnected.
func (h *nbdHolder) run(ctx context.Context, d *nbdDevice, ps nbdPairs, ready chan<- error) {
	defer close(h.over)
	runtime.LockOSThread() // never unlocked: the thread ends with the device
	f, err := h.claim(ctx, ps)
	for _, p := range ps { // the kernel has its own references
		unix.Close(p.kernel)
	}
	if err != nil {
		ready <- err
		return
	}
	defer f.Close()
	h.mu.Lock()
	h.fd = int(f.Fd())
	h.mu.Unlock()
	size, flags := d.export.Transmission()
	for _, c := range [][2]int{
		{nbdSetBlockSize, nbdBlockSize}, {nbdSetSizeBlocks, int(size / nbdBlockSize)}, {nbdSetTimeout, int(d.times.request)}, {nbdSetFlags, int(flags)},
	} {
		if err = nbdIoctl(h.fd, c[0], c[1]); err != nil {
			err = fmt.Errorf("set up %s: command %#x: %w", f.Name(), c[0], err)
			break
		}
	}
	var restore func()
	if err == nil {
		restore, err = blockSignals()
	}
	ready <- err
	if err == nil {
		h.result = nbdIoctl(h.fd, nbdDoIt, 0)
		restore()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// Whatever is still waiting fails.
	if err := nbdIoctl(h.fd, nbdClearSock, 0); err != nil && h.result == nil {
		h.result = err
	}
	h.fd = -1
}

// claim finds a device that nobody has, and gives it the connections. It belongs to this
// thread once the kernel has taken the first one.
func (h *nbdHolder) claim(ctx context.Context, ps nbdPairs) (*os.File, error) {
	numbers, err := numbered("/sys/block", "nbd")
	if err != nil {
		return nil, err
	}
	for _, number := range numbers {
		dir := fmt.Sprintf("/sys/block/nbd%d/", number)
		if _, err := os.Stat(dir + "pid"); err == nil {
			continue
		}
		f, err := openNode(ctx, nodePath(NBD, number), unix.O_RDONLY, func() (uint64, error) { return sysDev(dir + "dev") })
		if err != nil {
			return nil, err
		}
		for i, p := range ps {
			if err = nbdIoctl(int(f.Fd()), nbdSetSock, p.kernel); err != nil {
				if i > 0 {
					_ = nbdIoctl(int(f.Fd()), nbdClearSock, 0)
				}
				break
			}
		}
		switch {
		case err == nil:
			h.number = number
			return f, nil
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL): // another program has it, by ioctl or by netlink
			f.Close()
		default:
			f.Close()
			return nil, fmt.Errorf("give %s a connection: %w", f.Name(), err)
		}
	}
	return nil, fmt.Errorf("all %d devices are in use, and the kernel makes more of them by netlink only: start thaw in the network namespace of the host, or load the module by `modprobe nbd nbds_max=64`: %w", len(numbers), ErrUnavailable)
}

// started waits until the device works. It returns what the kernel says of the thread that
// holds it: its number where the kernel counts, which is not that of this process's
// namespace.
func (h *nbdHolder) started(ctx context.Context, size int64) (task uint32, err error) {
	ctx, cancel := context.WithTimeout(ctx, nbdPatience)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		if task, err = nbdTask(h.number); err == nil {
			var sectors int64 // it has a size a little later than a thread
			if sectors, err = sysNumber(fmt.Sprintf("/sys/block/nbd%d/size", h.number)); err == nil && sectors == size>>9 {
				return task, nil
			}
		}
		select {
		case <-h.over:
			return 0, fmt.Errorf("the kernel does not start the device: %w", h.result)
		default:
		}
		if e := sleep(ctx, pause); e != nil {
			return 0, fmt.Errorf("wait for the device: %w", errors.Join(e, err))
		}
	}
}

// nbdTask is the thread that holds a device.
func nbdTask(number uint32) (uint32, error) {
	n, err := sysNumber(fmt.Sprintf("/sys/block/nbd%d/pid", number))
	return uint32(n), err
}

func sysNumber(file string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}

// disconnect ends the device. What the kernel still asks fails.
func (h *nbdHolder) disconnect(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.fd < 0 {
			done <- nil
			return
		}
		done <- nbdClear(h.fd)
	}()
	limit := time.NewTimer(nbdPatience)
	defer limit.Stop()
	select {
	case err := <-done:
		return err
	case <-limit.C:
		return fmt.Errorf("nbd: disconnect: the kernel does not answer within %v", nbdPatience)
	case <-ctx.Done():
		return fmt.Errorf("nbd: disconnect: %w", context.Cause(ctx))
	}
}

// nbdClear takes the connections from a device.
func nbdClear(fd int) error {
	// The first one says that it is meant; the second one does not wait for the server.
	if err := errors.Join(nbdIoctl(fd, nbdDisconnectNow, 0), nbdIoctl(fd, nbdClearSock, 0)); err != nil {
		return fmt.Errorf("nbd: disconnect: %w", err)
	}
	return nil
}

// blockSignals keeps signals from this thread: one would end the command that it waits in,
// and with it the device. Another thread takes those of the process.
func blockSignals() (restore func(), err error) {
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	// Go runs a system call on all threads by this one, and would wait for ever.
	const perThread = 33 - 1
	const word = 8 * int(unsafe.Sizeof(all.Val[0]))
	all.Val[perThread/word] &^= 1 << (perThread % word)
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return nil, fmt.Errorf("block signals: %w", err)
	}
	return func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }, nil
}
