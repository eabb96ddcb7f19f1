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

	ctx    context.Context // of the sessions
	cancel context.CancelFunc
	conns  sync.WaitGroup
	over   chan struct{} // closed when all sessions have ended
}

// nbdTimes are what the kernel is told, in seconds.
type nbdTimes struct{ request, dead uint64 }

const (
	nbdBlockSize = 512
	// nbdGrace is how much later than the server the kernel loses patience with a
	// request. It then takes the connection for dead.
	nbdGrace = 10 * time.Second
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
	f := os.NewFile(uintptr(fds[1]), "nbd")
	defer f.Close()
	if p.server, err = net.FileConn(f); err != nil {
		unix.Close(fds[0])
		return p, fmt.Errorf("make a socket pair: %w", err)
	}
	p.kernel = fds[0]
	return p, nil
}

// pairs makes n connections. The caller gives the kernel's ends to nbdCommand, and calls
// serve.
func (d *nbdDevice) pairs(n int) (fds []int, serve func(), err error) {
	var ps []nbdPair
	for range n {
		p, err := newPair()
		if err != nil {
			for _, p := range ps {
				unix.Close(p.kernel)
				p.server.Close()
			}
			return nil, nil, err
		}
		ps = append(ps, p)
		fds = append(fds, p.kernel)
	}
	return fds, func() {
		for _, p := range ps {
			d.conns.Go(func() { d.carry(p.server) })
		}
		go func() {
			d.conns.Wait()
			d.srv.Close()
			close(d.over)
			if !d.n.leaving.Load() {
				d.n.end(errors.New("the kernel has disconnected the device: another program has removed it"))
			}
		}()
	}, nil
}

// carry serves one connection, and another one when the kernel has given it up without
// giving up the device: after a request that took too long, say.
func (d *nbdDevice) carry(nc net.Conn) {
	for {
		err := d.srv.ServeTransmission(d.ctx, nc, d.export)
		if err == nil || d.ctx.Err() != nil || d.n.leaving.Load() {
			return // the kernel says goodbye, or the node is detached
		}
		if nc, err = d.reconnect(); err != nil {
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
	o.Queues = cmp.Or(o.Queues, maxQueues)
	d := newNBD(n, o)
	fds, serve, err := d.pairs(o.Queues)
	if err != nil {
		return nil, err
	}
	size, flags := d.export.Transmission()
	// No number is given: the kernel takes a device that nobody uses, or makes one. It
	// waits for nobody, so the command is not left alone when ctx ends: the device would
	// stay.
	reply, err := nbdCommand(context.WithoutCancel(ctx), "connect", nbdConnect, fds, func(a *netlink.AttributeEncoder) {
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
	n.state.Number, n.state.Path, n.state.Queues = index, nodePath(NBD, index), o.Queues
	if err != nil {
		n.leaving.Store(true) // nothing is to be connected again
		serve()
		d.stop()
		return nil, err
	}
	serve()
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

// stop ends the sessions.
func (d *nbdDevice) stop() {
	d.cancel()
	<-d.over
}

func (d *nbdDevice) detach(ctx context.Context) error {
	err := disconnect(ctx, d.n.state.Number)
	if err != nil {
		return err
	}
	d.stop()
	return nil
}

func disconnect(ctx context.Context, number uint32) error {
	_, err := nbdCommand(ctx, "disconnect", nbdDisconnect, nil, func(a *netlink.AttributeEncoder) { a.Uint32(nbdAttrIndex, number) })
	return err
}

// nbdIs fails with ErrGone unless the device of s is connected and marked with its token.
func nbdIs(s State) error {
	dir := fmt.Sprintf("/sys/block/nbd%d/", s.Number)
	if _, err := os.Stat(dir + "pid"); err != nil {
		return fmt.Errorf("it is not connected: %w", ErrGone)
	}
	mark, err := os.ReadFile(dir + "backend")
	if errors.Is(err, os.ErrNotExist) {
		return nil // before Linux 5.14; the kernel will not tell
	}
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(mark)) != s.Token {
		return fmt.Errorf("it belongs to another program by now: %w", ErrGone)
	}
	return nil
}

func recoverNBD(ctx context.Context, n *Node, o Options) (driver, error) {
	if err := nbdIs(n.state); err != nil {
		return nil, err
	}
	o.Queues = max(n.state.Queues, 1)
	d := newNBD(n, o)
	fds, serve, err := d.pairs(o.Queues)
	if err != nil {
		return nil, err
	}
	if err = d.reconfigure(context.WithoutCancel(ctx), fds); err != nil {
		n.leaving.Store(true)
	}
	serve()
	if errors.Is(err, unix.EINVAL) { // not connected any more, or by another program
		err = fmt.Errorf("%w: %w", err, ErrGone)
	}
	if err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

func removeNBD(ctx context.Context, s State) error {
	if err := nbdIs(s); err != nil {
		return err
	}
	if err := notMounted(ctx, s.Path); err != nil {
		return err
	}
	return disconnect(ctx, s.Number)
}
