package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"thaw/fetcher/registry"
	"thaw/nbd"
)

// Exports offers the devices of a Host to NBD clients. A client may open any existing
// device, and any image whose reference is allowed. If there is one permanent device,
// it is the default export.
type Exports struct {
	host      *Host
	allow     Allow
	clients   []string // names in certificates of the clients that may open exports; empty: all clients may
	certified bool     // clients have certificates
}

// NewExports makes the exports of h. allow lists the references that clients may open.
// If clients is not empty, only these clients may open exports. If certified is set, clients
// have certificates, and a client may only open overlays whose names belong to its own.
func NewExports(h *Host, allow Allow, clients []string, certified bool) *Exports {
	return &Exports{h, allow, clients, certified}
}

// Open implements nbd.Exports. An image that several clients ask for at once is opened
// once, and is closed when its last user has left.
func (x *Exports) Open(ctx context.Context, name string, c nbd.ClientInfo) (*nbd.Export, func(), error) {
	if len(x.clients) > 0 && !c.Named(x.clients...) {
		return nil, nil, nbd.ErrDenied // before anything is fetched for the client
	}
	if !x.may(name, c) {
		return nil, nil, nbd.ErrDenied
	}
	d, release, err := x.host.Acquire(ctx, name, x.allow.Match)
	switch {
	case err == nil:
		return x.export(d), release, nil
	case errors.Is(err, ErrNoDevice):
		return nil, nil, nbd.ErrUnknownExport
	case errors.Is(err, ErrClosed):
		return nil, nil, nbd.ErrServerClosed
	case errors.Is(err, registry.ErrNotFound):
		return nil, nil, fmt.Errorf("%w: %w", nbd.ErrUnknownExport, err)
	}
	return nil, nil, err
}

// may reports whether a client may open the overlay of that name, if it is one.
func (x *Exports) may(name string, c nbd.ClientInfo) bool {
	if !x.certified || !x.host.overlays.clients() {
		return true
	}
	if d := x.host.devices.byName(name); d != nil {
		return d.client == "" || owns(c, d.client)
	}
	_, client, ok, _ := splitClient(name)
	return !ok || owns(c, client)
}

func (x *Exports) export(d *Device) *nbd.Export {
	e := &nbd.Export{Name: d.Name(), Description: "read-only block image", Device: d.Block(), ReadOnly: true, Clients: x.clients}
	if d.Overlay() != nil {
		e.Description, e.ReadOnly = "block image with an overlay", false
	}
	return e
}

// List implements nbd.Exports. It lists the permanent devices in their order, and then
// the devices that clients have open, by name.
func (x *Exports) List(_ context.Context, c nbd.ClientInfo) ([]nbd.Export, error) {
	var permanent, others []nbd.Export
	for _, d := range x.host.Devices() {
		switch in := d.Info(); {
		case in.State != Ready, d.private, x.certified && d.client != "" && !owns(c, d.client):
		case in.Permanent:
			permanent = append(permanent, *x.export(d))
		default:
			others = append(others, *x.export(d))
		}
	}
	slices.SortFunc(others, func(a, b nbd.Export) int { return cmp.Compare(a.Name, b.Name) })
	return append(permanent, others...), nil
}
