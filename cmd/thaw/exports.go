package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

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

	mu struct {
		sync.Mutex
		fixed  []string // in the order given; a single one is the default export
		images map[string]*opened
	}
}

// opened is an image, open or about to be.
type opened struct {
	ready  chan struct{} // closed when device or err is there
	device blockmap.Device
	done   func() // lets go of device
	err    error
	users  int // 0 for ever with one of the fixed
	fixed  bool
}

// openTimeout bounds the opening of an image that clients wait for.
const openTimeout = time.Minute

func newExports(allow patterns, clients []string, open func(context.Context, string) (blockmap.Device, func(), error)) *exports {
	x := &exports{open: open, allow: allow, clients: clients}
	x.mu.images = make(map[string]*opened)
	return x
}

// add offers an image for good.
func (x *exports) add(name string, device blockmap.Device) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.images[name] != nil {
		return usageError{fmt.Errorf("%s is given twice", name)}
	}
	o := &opened{ready: make(chan struct{}), device: device, fixed: true}
	close(o.ready)
	x.mu.images[name] = o
	x.mu.fixed = append(x.mu.fixed, name)
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
	x.mu.Lock()
	if name == "" && len(x.mu.fixed) == 1 {
		name = x.mu.fixed[0]
	}
	o := x.mu.images[name]
	if o == nil {
		if !x.allow.match(name) {
			x.mu.Unlock()
			return nil, nil, nbd.ErrUnknownExport
		}
		o = &opened{ready: make(chan struct{})}
		x.mu.images[name] = o
		o.users++
		x.mu.Unlock()
		// For all who wait for it, so not ended by the first one's leaving.
		shared, cancel := context.WithTimeout(context.WithoutCancel(ctx), openTimeout)
		o.device, o.done, o.err = x.open(shared, name)
		cancel()
		close(o.ready)
	} else {
		o.users++
		x.mu.Unlock()
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

func (x *exports) release(name string, o *opened) {
	x.mu.Lock()
	o.users--
	last := o.users == 0 && !o.fixed
	if last && x.mu.images[name] == o {
		delete(x.mu.images, name)
	}
	x.mu.Unlock()
	// Whoever opens first waits for no one, so it has opened by now.
	if last && o.err == nil {
		o.done()
	}
}

// List implements nbd.Exports: what is open.
func (x *exports) List(context.Context, nbd.ClientInfo) ([]nbd.Export, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	names := slices.Clone(x.mu.fixed)
	for _, name := range slices.Sorted(maps.Keys(x.mu.images)) {
		o := x.mu.images[name]
		select {
		case <-o.ready:
			if !o.fixed && o.err == nil {
				names = append(names, name)
			}
		default:
		}
	}
	list := make([]nbd.Export, 0, len(names))
	for _, name := range names {
		list = append(list, *x.export(name, x.mu.images[name].device))
	}
	return list, nil
}

// all are the images that are open for good.
func (x *exports) all() (names []string, devices []blockmap.Device) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, name := range x.mu.fixed {
		devices = append(devices, x.mu.images[name].device)
	}
	return slices.Clone(x.mu.fixed), devices
}

// patterns say which references clients may open: as path.Match has it, so that
// * stands for anything but a slash; at the end, ** for anything at all.
type patterns []string

func (p patterns) check() error {
	for _, s := range p {
		if _, err := path.Match(strings.TrimSuffix(s, "**"), ""); err != nil {
			return usageError{fmt.Errorf("--allow %q: %w", s, err)}
		}
	}
	return nil
}

func (p patterns) match(name string) bool {
	// What a pattern means is what the reference means: no other spelling, and
	// no way up out of a directory.
	ref, err := registry.ParseRef(name)
	if err != nil || slices.Contains(strings.Split(ref.Layout+ref.Archive, "/"), "..") || ref.Archive != "" {
		return false
	}
	for _, s := range p {
		if prefix, ok := strings.CutSuffix(s, "**"); ok && matchPrefix(prefix, name) {
			return true
		}
		if ok, _ := path.Match(s, name); ok {
			return true
		}
	}
	return false
}

// matchPrefix says whether name begins with what pattern matches and goes on.
func matchPrefix(pattern, name string) bool {
	slashes := strings.Count(pattern, "/")
	end := 0
	for range slashes {
		i := strings.IndexByte(name[end:], '/')
		if i < 0 {
			return false
		}
		end += i + 1
	}
	last := pattern[strings.LastIndexByte(pattern, '/')+1:]
	ok, _ := path.Match(pattern[:len(pattern)-len(last)], name[:end])
	return ok && len(name) > end+len(last) && strings.HasPrefix(name[end:], last)
}
