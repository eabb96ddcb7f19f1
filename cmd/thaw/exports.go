package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

// exports are what a server offers: the images that it was started with, and
// those that clients may open by their reference.
type exports struct {
	open    func(ctx context.Context, name string) (device blockmap.Device, done func(), err error)
	allow   patterns
	clients []string // who may open anything, by certificate; nobody: everybody
	log     *slog.Logger
	lines   *rate.Limiter // of the log that clients can cause

	ctx    context.Context // of all that is being opened
	cancel context.CancelFunc
	wg     sync.WaitGroup // what is being opened, and let go

	mu struct {
		sync.Mutex
		fixed  []fixedExport // in the order given; a single one is the default export
		images map[string]*opened
	}
}

// fixedExport is an export for good.
type fixedExport struct {
	name   string
	image  *blockImage
	device blockmap.Device
}

// opened is an image, open or about to be.
type opened struct {
	ready  chan struct{} // closed when device or err is there
	cancel context.CancelFunc
	device blockmap.Device
	done   func() // lets go of device
	err    error
	users  int // 0 for ever with one of the fixed
	fixed  bool
}

// openTimeout bounds the opening of an image that clients wait for.
const openTimeout = time.Minute

func newExports(allow patterns, clients []string, log *slog.Logger, open func(context.Context, string) (blockmap.Device, func(), error)) *exports {
	x := &exports{open: open, allow: allow, clients: clients, log: log, lines: rate.NewLimiter(1, 20)}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	x.mu.images = make(map[string]*opened)
	return x
}

// add offers an image for good.
func (x *exports) add(e fixedExport) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.images[e.name] != nil {
		return usageError{fmt.Errorf("%s is given twice", e.name)}
	}
	o := &opened{ready: make(chan struct{}), device: e.device, fixed: true}
	close(o.ready)
	x.mu.images[e.name] = o
	x.mu.fixed = append(x.mu.fixed, e)
	return nil
}

func (x *exports) export(name string, device blockmap.Device) *nbd.Export {
	return &nbd.Export{Name: name, Description: "read-only block image", Device: device, ReadOnly: true, Clients: x.clients}
}

// Open implements nbd.Exports. An image that several clients ask for at once
// is opened once, and is let go with its last user.
func (x *exports) Open(ctx context.Context, name string, c nbd.ClientInfo) (*nbd.Export, func(), error) {
	if len(x.clients) > 0 && !c.Named(x.clients...) {
		return nil, nil, nbd.ErrDenied // before anything is fetched for it
	}
	o, name, err := x.join(name)
	if err != nil {
		return nil, nil, err
	}
	release := func() { x.release(name, o) }
	select {
	case <-o.ready:
	case <-ctx.Done():
		release()
		return nil, nil, context.Cause(ctx)
	}
	if o.err != nil {
		release()
		if errors.Is(o.err, registry.ErrNotFound) {
			return nil, nil, fmt.Errorf("%w: %w", nbd.ErrUnknownExport, o.err)
		}
		return nil, nil, o.err
	}
	return x.export(name, o.device), release, nil
}

// join makes the caller a user of an image, the first of whom has it opened.
func (x *exports) join(name string) (*opened, string, error) {
	x.mu.Lock()
	if name == "" && len(x.mu.fixed) == 1 {
		name = x.mu.fixed[0].name
	}
	if o := x.mu.images[name]; o != nil {
		o.users++
		x.mu.Unlock()
		return o, name, nil
	}
	x.mu.Unlock()
	if !x.allow.match(name) { // which may look at directories
		return nil, "", nbd.ErrUnknownExport
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	o := x.mu.images[name]
	if o == nil {
		if x.ctx.Err() != nil {
			return nil, "", nbd.ErrServerClosed
		}
		o = &opened{ready: make(chan struct{})}
		x.mu.images[name] = o
		// For all who wait for it, so not ended by the first one's leaving, but by
		// the last one's.
		var ctx context.Context
		ctx, o.cancel = context.WithTimeout(x.ctx, openTimeout)
		x.wg.Go(func() { x.make(ctx, name, o) })
	}
	o.users++
	return o, name, nil
}

// make opens an image for those who wait for it.
func (x *exports) make(ctx context.Context, name string, o *opened) {
	defer o.cancel()
	device, done, err := x.open(ctx, name)
	if err != nil && ctx.Err() == nil && x.lines.Allow() {
		x.log.Warn("an image cannot be opened for a client", "image", name, "err", err)
	}
	x.mu.Lock()
	o.device, o.done, o.err = device, done, err
	close(o.ready)
	abandoned := o.users == 0
	x.mu.Unlock()
	if abandoned && err == nil {
		done()
	}
}

func (x *exports) release(name string, o *opened) {
	x.mu.Lock()
	defer x.mu.Unlock()
	o.users--
	if o.users > 0 || o.fixed {
		return
	}
	if x.mu.images[name] == o {
		delete(x.mu.images, name)
	}
	select {
	case <-o.ready:
		if o.err == nil {
			x.wg.Go(o.done) // which may have a recording to store
		}
	default:
		o.cancel()
	}
}

// stop ends what is being opened, and waits until all has been let go that
// clients have left.
func (x *exports) stop() {
	x.mu.Lock()
	x.cancel() // with the lock, so that nothing more is begun
	x.mu.Unlock()
	x.wg.Wait()
}

// List implements nbd.Exports: what is open.
func (x *exports) List(context.Context, nbd.ClientInfo) ([]nbd.Export, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	var list []nbd.Export
	for _, e := range x.mu.fixed {
		list = append(list, *x.export(e.name, e.device))
	}
	for _, name := range slices.Sorted(maps.Keys(x.mu.images)) {
		o := x.mu.images[name]
		select {
		case <-o.ready:
			if !o.fixed && o.err == nil {
				list = append(list, *x.export(name, o.device))
			}
		default:
		}
	}
	return list, nil
}

// all are the images that are open for good.
func (x *exports) all() []fixedExport {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.mu.fixed)
}
