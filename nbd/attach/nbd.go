package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"thaw/nbd"
)

// nbdDevice is a device of the kernel's nbd driver, each of whose connections is a socket
// pair: the kernel has one end, and a session of an nbd.Server the other.
type nbdDevice struct {
	n      *Node
	srv    *nbd.Server
	export *nbd.Export
	times  nbdTimes
	holder *nbdHolder // of a device that was made by ioctl; nil: by netlink

	ctx    context.Context // of the sessions
	cancel context.CancelFunc
	conns  sync.WaitGroup // of the sessions, and of the holder's thread
	over   chan struct{}  // closed when all of them have ended
}

// nbdTimes are what the kernel is told, in seconds.
type nbdTimes struct{ request, dead uint64 }

const (
	nbdBlockSize = 512
	// nbdGrace is how much later than the server the kernel loses patience with a
	// request. It then takes the connection for dead.
	nbdGrace = 10 * time.Second
	// nbdSendBuffer is room for a large reply or write, so that its sender need not wait for
	// its receiver halfway. Linux doubles it, for what a packet takes beside its bytes.
	nbdSendBuffer = 512 << 10
	// nbdDeadTime is how long requests wait for a server that comes back.
	nbdDeadTime = 10 * time.Minute
)

func newNBD(n *Node, o Options) *nbdDevice {
	d := &nbdDevice{
		n:      n,
		srv:    &nbd.Server{Log: o.Log, FaultTimeout: o.FaultTimeout, Admission: o.Admission},
		export: &nbd.Export{Name: o.Name, Device: n.serving.dev, ReadOnly: n.serving.wdev == nil},
		times:  nbdTimes{uint64((o.FaultTimeout + nbdGrace + time.Second - 1) / time.Second), uint64(nbdDeadTime / time.Second)},
		over:   make(chan struct{}),
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	n.serving.more = func() Stats {
		st := d.srv.Stats()
		return Stats{st.Hits, st.Misses, st.Others, st.Errors}
	}
	return d
}

// abandon ends what has no sessions.
func (d *nbdDevice) abandon() {
	d.cancel()
	d.srv.Close()
}

// nbdPair is a connection that the kernel is to get.
type nbdPair struct {
	kernel int
	server net.Conn
}

func newPair() (p nbdPair, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, fmt.Errorf("make a socket pair: %w", err)
	}
	for _, fd := range fds {
		// Root may have more than net.core.wmem_max. The default is the fallback.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, nbdSendBuffer)
	}
	f := os.NewFile(uintptr(fds[1]), "nbd")
	defer f.Close()
	if p.server, err = net.FileConn(f); err != nil {
		unix.Close(fds[0])
		return p, fmt.Errorf("make a socket pair: %w", err)
	}
	p.kernel = fds[0]
	return p, nil
}

// nbdPairs are the connections of a device.
type nbdPairs []nbdPair

func newPairs(n int) (ps nbdPairs, err error) {
	for range n {
		p, err := newPair()
		if err != nil {
			for _, p := range ps {
				unix.Close(p.kernel)
			}
			ps.close()
			return nil, err
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// fds are the kernel's ends. nbdCommand closes them.
func (ps nbdPairs) fds() (fds []int) {
	for _, p := range ps {
		fds = append(fds, p.kernel)
	}
	return fds
}

// close closes the ends of connections that the kernel has not taken.
func (ps nbdPairs) close() {
	for _, p := range ps {
		p.server.Close()
	}
}

// serve begins the sessions of connections that the kernel has taken.
func (d *nbdDevice) serve(ps nbdPairs) {
	for _, p := range ps {
		d.conns.Go(func() { d.carry(p.server) })
	}
	go func() {
		d.conns.Wait()
		d.srv.Close()
		close(d.over)
		if d.n.leaving.Load() {
			return
		}
		err := errors.New("the kernel has disconnected the device: another program has removed it")
		if d.holder != nil && d.holder.result != nil {
			err = fmt.Errorf("the kernel has disconnected the device: %w", d.holder.result)
		}
		d.n.end(err)
	}()
}

// carry serves one connection, and another one when the kernel has given it up without
// giving up the device: after a request that took too long, say.
func (d *nbdDevice) carry(nc net.Conn) {
	for {
		err := d.srv.ServeTransmission(d.ctx, nc, d.export)
		if err == nil || d.ctx.Err() != nil || d.n.leaving.Load() {
			return // the kernel says goodbye, or the node is detached
		}
		if d.holder == nil {
			nc, err = d.reconnect()
		}
		if err != nil {
			if d.ctx.Err() == nil && !d.n.leaving.Load() {
				d.n.serving.log.Warn("a connection of an nbd device is lost", "node", d.n.state.Path, "err", err)
			}
			return
		}
	}
}

// reconnect gives the kernel a new connection instead of a dead one. It fails where the
// device is not connected any more. The kernel may not have noticed yet that the
// connection is dead: it drops the new one then, which is found by serving it.
func (d *nbdDevice) reconnect() (net.Conn, error) {
	if err := sleep(d.ctx, 20*time.Millisecond); err != nil {
		return nil, err
	}
	p, err := newPair()
	if err != nil {
		return nil, err
	}
	err = d.reconfigure(d.ctx, []int{p.kernel})
	if err != nil {
		p.server.Close()
		return nil, err
	}
	return p.server, nil
}

// reconfigure gives the kernel connections instead of those that are dead.
func (d *nbdDevice) reconfigure(ctx context.Context, fds []int) error {
	_, err := nbdCommand(ctx, "reconfigure", nbdReconfigure, fds, func(a *netlink.AttributeEncoder) {
		a.Uint32(nbdAttrIndex, d.n.state.Number)
		d.encode(a)
	})
	return err
}

// encode adds what a connect and a reconfigure say.
func (d *nbdDevice) encode(a *netlink.AttributeEncoder) {
	a.Uint64(nbdAttrTimeout, d.times.request)
	a.Uint64(nbdAttrDeadTime, d.times.dead)
	a.String(nbdAttrIdentifier, d.n.state.Token)
}

func attachNBD(ctx context.Context, n *Node, o Options) (driver, error) {
	n.state.Queues = cmp.Or(o.Queues, maxQueues)
	d := newNBD(n, o)
	err := errNoFamily
	if !o.ioctl {
		err = d.connect(ctx, n.state.Queues)
	}
	if errors.Is(err, errNoFamily) {
		if numbers, _ := numbered("/sys/block", "nbd"); len(numbers) > 0 {
			err = d.connectByIoctl(ctx, n.state.Queues)
		}
	}
	if err != nil {
		d.abandon()
		return nil, err
	}
	if d.holder != nil {
		o.Log.Warn("the kernel has no netlink family nbd in this network namespace, so the node was made by ioctl: when this server ends, its reads and writes fail, and no other server can go on with it",
			"node", n.state.Path)
	}
	// The kernel looks for partitions when the node is opened, and waits for what that
	// reads.
	opened := make(chan error, 1)
	go func() { opened <- d.open(ctx) }()
	select {
	case err = <-opened:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		n.leaving.Store(true)
		ctx, cancel := context.WithTimeout(context.Background(), nbdPatience)
		defer cancel()
		return nil, errors.Join(err, d.detach(ctx)) // which ends the opening as well
	}
	return d, nil
}

// connect makes a device by netlink.
func (d *nbdDevice) connect(ctx context.Context, queues int) error {
	ps, err := newPairs(queues)
	if err != nil {
		return err
	}
	size, flags := d.export.Transmission()
	// No number is given: the kernel takes a device that nobody uses, or makes one. It
	// waits for nobody, so the command is not left alone when ctx ends: the device would
	// stay.
	reply, err := nbdCommand(context.WithoutCancel(ctx), "connect", nbdConnect, ps.fds(), func(a *netlink.AttributeEncoder) {
		a.Uint64(nbdAttrSize, uint64(size))
		a.Uint64(nbdAttrBlockSize, nbdBlockSize)
		a.Uint64(nbdAttrFlags, uint64(flags))
		d.encode(a)
	})
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: nbd requires CAP_SYS_ADMIN: %w", err, ErrUnavailable)
	}
	var index uint32
	if err == nil {
		index, err = nbdIndex(reply)
	}
	if err != nil {
		ps.close()
		return err
	}
	d.n.state.Number, d.n.state.Path = index, nodePath(NBD, index)
	d.serve(ps)
	return nil
}

// open checks the node, and drops what the kernel may have kept of an earlier device with
// its number.
func (d *nbdDevice) open(ctx context.Context) error {
	number := d.n.state.Number
	f, err := openNode(ctx, d.n.state.Path, unix.O_RDONLY, func() (uint64, error) { return sysDev(fmt.Sprintf("/sys/block/nbd%d/dev", number)) })
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := deviceSize(f)
	if err == nil && size != d.n.serving.size {
		err = fmt.Errorf("%s has %d bytes, and its device %d", f.Name(), size, d.n.serving.size)
	}
	return errors.Join(err, flushPages(f))
}

func (d *nbdDevice) detach(ctx context.Context) error {
	var err error
	if d.holder != nil {
		err = d.holder.disconnect(ctx)
	} else {
		err = disconnect(ctx, d.n.state.Number)
	}
	if err != nil {
		return err
	}
	d.cancel()
	select {
	case <-d.over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the connections: %w", context.Cause(ctx))
	}
}

func disconnect(ctx context.Context, number uint32) error {
	_, err := nbdCommand(ctx, "disconnect", nbdDisconnect, nil, func(a *netlink.AttributeEncoder) { a.Uint32(nbdAttrIndex, number) })
	return err
}

// nbdMark is the token of the device whose directory below /sys/block is dir, with a slash.
func nbdMark(dir string) (string, error) {
	text, err := os.ReadFile(dir + "backend")
	return strings.TrimSpace(string(text)), err
}

// nbdIs fails with ErrGone unless the device of s is connected and marked with its token.
func nbdIs(s State) error {
	dir := fmt.Sprintf("/sys/block/nbd%d/", s.Number)
	if _, err := os.Stat(dir + "pid"); err != nil {
		return fmt.Errorf("it is not connected: %w", ErrGone)
	}
	if s.Task != 0 { // the kernel knows no token of a device that was made by ioctl
		task, err := nbdTask(s.Number)
		sectors, sizeErr := sysNumber(dir + "size")
		if err != nil || sizeErr != nil || task != s.Task || sectors != s.Size>>9 {
			return fmt.Errorf("it belongs to another program by now: %w", ErrGone)
		}
		return nil
	}
	mark, err := nbdMark(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil // before Linux 5.14; the kernel will not tell
	}
	if err != nil {
		return err
	}
	if mark != s.Token {
		return fmt.Errorf("it belongs to another program by now: %w", ErrGone)
	}
	return nil
}

func recoverNBD(ctx context.Context, n *Node, o Options) (driver, error) {
	if err := nbdIs(n.state); err != nil {
		return nil, err
	}
	if n.state.Task != 0 {
		return nil, errors.New("the node was made by ioctl, and the kernel takes no new connections for such a node: its reads and writes have failed since its server died. Unmount it, remove the node, and attach again")
	}
	d := newNBD(n, o)
	ps, err := newPairs(max(n.state.Queues, 1))
	if err != nil {
		return nil, err
	}
	err = d.reconfigure(context.WithoutCancel(ctx), ps.fds())
	if errors.Is(err, unix.EINVAL) { // not connected any more, or by another program
		err = fmt.Errorf("%w: %w", err, ErrGone)
	}
	if err != nil {
		ps.close()
		d.abandon()
		return nil, err
	}
	d.serve(ps)
	return d, nil
}

func removeNBD(ctx context.Context, s State) error {
	if err := nbdIs(s); err != nil {
		return err
	}
	if err := notMounted(ctx, s.Path); err != nil {
		return err
	}
	if s.Task != 0 {
		fd, err := unix.Open(s.Path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: s.Path, Err: err}
		}
		defer unix.Close(fd)
		return nbdClear(fd)
	}
	return disconnect(ctx, s.Number)
}
