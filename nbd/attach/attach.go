package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"thaw/blockmap"
	"thaw/nbd"
)

// Driver is a way to give a device a node.
type Driver string

const (
	Auto Driver = ""     // the first of UBLK, NBD and FUSE that this host can do
	UBLK Driver = "ublk" // the kernel's ublk_drv: the fastest, and a killed server comes back within a second
	NBD  Driver = "nbd"  // the kernel's nbd, by netlink, or by ioctl where that is missing
	FUSE Driver = "fuse" // a file by FUSE under a loop device: needs no module that is rarely there
)

// ParseDriver returns the driver of that name; "auto" is Auto.
func ParseDriver(name string) (Driver, error) {
	switch d := Driver(name); d {
	case "auto", Auto:
		return Auto, nil
	case UBLK, NBD, FUSE:
		return d, nil
	}
	return Auto, fmt.Errorf("unknown driver %q: want auto, ublk, nbd or fuse", name)
}

// Options say how a device is attached. The zero value is useful.
type Options struct {
	Driver   Driver
	ReadOnly bool   // although the device is writable
	Name     string // for the log

	// Queues is how many queues (ublk) or connections (nbd) the node has. 0: with ublk
	// one for each processor, at most 4; with nbd 4, since fewer are slower even on few
	// processors. FUSE has one.
	Queues int
	// Depth is how many requests a queue of ublk has in flight. 0: 128. The kernel
	// decides for the other drivers: 128 for each connection of nbd, and for a loop
	// device.
	Depth int
	// ReadAhead is how many bytes the kernel reads ahead of a sequential reader. 0: the
	// kernel's default.
	ReadAhead int
	// FaultTimeout bounds the wait of one request for the device. 0:
	// nbd.DefaultFaultTimeout. With the driver nbd, a reader waits a little longer for
	// a server that was killed.
	FaultTimeout time.Duration
	// Token marks the node, so that Sweep finds it if this process dies before it could keep
	// the node's State: NewToken makes one. Empty: one that nobody knows.
	Token string
	// Admission bounds the requests in flight of all nodes and other transports
	// together. Nil: no such bound.
	Admission *nbd.Admission
	Log       *slog.Logger // nil: discarded

	ioctl bool // nbd without netlink, although it may be there
}

const (
	maxQueues    = 4
	maxUserQueue = 64 // what Options.Queues may ask for
	defaultDepth = 128
	maxDepth     = 1024
)

// fill returns o with defaults, or an error that names the field.
func (o Options) fill() (Options, error) {
	switch {
	case o.Queues < 0 || o.Queues > maxUserQueue:
		return o, fmt.Errorf("attach: Queues is %d: want 1 to %d, or 0 for one for each processor", o.Queues, maxUserQueue)
	case o.Depth < 0 || o.Depth > maxDepth:
		return o, fmt.Errorf("attach: Depth is %d: want 1 to %d, or 0 for %d", o.Depth, maxDepth, defaultDepth)
	case o.ReadAhead < 0:
		return o, fmt.Errorf("attach: ReadAhead is %d: want a number of bytes, or 0 for the default of the kernel", o.ReadAhead)
	case o.FaultTimeout < 0:
		return o, fmt.Errorf("attach: FaultTimeout is %v: want a time, or 0 for %v", o.FaultTimeout, nbd.DefaultFaultTimeout)
	}
	if _, err := ParseDriver(string(o.Driver)); err != nil {
		return o, fmt.Errorf("attach: %w", err)
	}
	if o.Token != "" && !ValidToken(o.Token) {
		return o, fmt.Errorf("attach: Token is %.100q: want one that NewToken made", o.Token)
	}
	o.Depth = cmp.Or(o.Depth, defaultDepth)
	o.FaultTimeout = cmp.Or(o.FaultTimeout, nbd.DefaultFaultTimeout)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// Errors that a caller tells apart.
var (
	// ErrUnavailable: this host cannot do it. The text says what is missing, and the
	// command that helps.
	ErrUnavailable = errors.New("not available on this host")
	// ErrBusy: the node is mounted, or another program has it for itself.
	ErrBusy = errors.New("in use")
	// ErrGone: the node of a State is not there any more, or has become another's.
	ErrGone = errors.New("the node is gone")
)

// Attach gives dev a node and serves it until Detach, or until the kernel removes the
// node. The node is writable if dev is a blockmap.WritableDevice and o.ReadOnly is false.
// It can be read when Attach returns.
//
// ctx bounds Attach, not the node. Several calls may run at once.
func Attach(ctx context.Context, dev blockmap.Device, o Options) (*Node, error) {
	o, err := o.fill()
	if err != nil {
		return nil, err
	}
	if dev.Size() <= 0 {
		return nil, errors.New("attach: the device has no bytes, and the kernel knows no such block device")
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("attach a device: making a node requires root: %w", ErrUnavailable)
	}
	_ = setFlusher() // before there is a node; see protectWriters
	if o.Driver != Auto {
		n, err := attachBy(ctx, o.Driver, dev, o)
		if err != nil {
			return nil, err
		}
		n.Why = "it was asked for"
		return n, nil
	}
	var refused []error
	for _, d := range []Driver{UBLK, NBD, FUSE} {
		n, err := attachBy(ctx, d, dev, o)
		if err == nil {
			n.Why = why(refused)
			return n, nil
		}
		refused = append(refused, err)
		if !errors.Is(err, ErrUnavailable) {
			break // it should work here, and the next driver would hide that it does not
		}
	}
	return nil, errors.Join(refused...)
}

// why says in one sentence why the drivers before were not taken.
func why(refused []error) string {
	if len(refused) == 0 {
		return "it is the fastest"
	}
	texts := make([]string, len(refused))
	for i, err := range refused {
		text := strings.TrimPrefix(err.Error(), byDriver)
		texts[i] = strings.TrimSuffix(text, ": "+ErrUnavailable.Error())
	}
	return strings.Join(texts, "; ")
}

// byDriver begins the errors of attachBy.
const byDriver = "attach by "

func attachBy(ctx context.Context, d Driver, dev blockmap.Device, o Options) (*Node, error) {
	n := newNode(dev, o)
	n.Driver = d
	n.state = State{Driver: d, Boot: bootID(), Token: cmp.Or(o.Token, NewToken()), Size: dev.Size(), ReadOnly: n.serving.wdev == nil}
	n.state.serve()
	var err error
	switch d {
	case UBLK:
		n.driver, err = attachUBLK(ctx, n, o)
	case NBD:
		n.driver, err = attachNBD(ctx, n, o)
	default:
		n.driver, err = attachFUSE(ctx, n, o)
	}
	if err != nil {
		n.serving.cancel(err)
		return nil, fmt.Errorf("%s%s: %w", byDriver, d, err)
	}
	n.serving.protectWriters() // warns, if need be
	n.ready(o)
	return n, nil
}
