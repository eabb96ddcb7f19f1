package host

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/zone"
)

// ZoneOptions say which zone a host is a member of.
type ZoneOptions struct {
	Name   string   // of the zone; empty: none
	Host   string   // the name of this host in it; empty: see zone.Options
	Listen string   // HOST:PORT
	Join   []string // see zone.ParseSeed
	// Cert, Key and CA are the files of mutual TLS. Secret is the file with the secrets
	// that gossip is encrypted with. All of them are read again when they change.
	Cert, Key, CA, Secret string
	// Allow lists the repositories that peers may have this host open. If it is empty, these
	// are those of the registries of the host's own images, and those that match Clients.
	Allow, Clients Allow
	Memory         int64  // for compressed chunks that are kept for peers: see zone.Options
	Version        string // of the program, which peers are told
}

// Check fails with an InvalidError if the options contradict each other.
func (o *ZoneOptions) Check() error {
	fail := func(format string, args ...any) error { return InvalidError{fmt.Errorf(format, args...)} }
	if o.Name == "" {
		if o.Host != "" || o.Listen != "" || len(o.Join) > 0 || o.Cert != "" || o.Key != "" || o.CA != "" || o.Secret != "" || len(o.Allow) > 0 || o.Memory != 0 {
			return fail("a zone needs a name: add --zone NAME")
		}
		return nil
	}
	switch {
	case !zone.ValidName(o.Name):
		return fail("--zone %q: the name of a zone has letters, digits, dots, dashes and underscores", o.Name)
	case o.Host != "" && !zone.ValidName(o.Host):
		return fail("--zone-host %q: the name of a host has letters, digits, dots, dashes and underscores", o.Host)
	case o.Listen == "":
		return fail("--zone %s: add --zone-listen HOST:PORT, the address for the other hosts", o.Name)
	case (o.Cert == "") != (o.Key == "") || (o.Cert == "") != (o.CA == ""):
		return fail("TLS of a zone needs --zone-cert, --zone-key and --zone-ca together")
	case o.Cert != "" && o.Secret == "":
		return fail("a zone with TLS needs --zone-secret FILE, with which its gossip is encrypted: make one with: openssl rand -hex 32 >FILE")
	}
	for _, j := range o.Join {
		if _, err := zone.ParseSeed(j); err != nil {
			return fail("--zone-join: %w", err)
		}
	}
	if err := o.Allow.Check(); err != nil {
		return fail("--zone-allow: %w", err)
	}
	return nil
}

// hostZone is the membership of a host in a zone.
type hostZone struct {
	*zone.Zone
	store *zoneStore
	files []func(force bool) // read the files again if they have changed
}

// openZone makes a host a member of a zone.
func openZone(ctx context.Context, o ZoneOptions, opener *opener) (*hostZone, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	z := &hostZone{}
	opts := zone.Options{Zone: o.Name, Name: o.Host, Listen: o.Listen, Memory: o.Memory, Version: o.Version, Log: opener.Log}
	for _, j := range o.Join {
		seed, err := zone.ParseSeed(j)
		if err != nil {
			return nil, InvalidError{err}
		}
		opts.Join = append(opts.Join, seed)
	}
	if o.Cert != "" {
		w, err := Watch("certificates of the zone", opener.Log, func() (*zone.Credentials, error) { return zone.ReadCredentials(o.Cert, o.Key, o.CA) }, o.Cert, o.Key, o.CA)
		if err != nil {
			return nil, err
		}
		opts.TLS = w.Get
		z.files = append(z.files, func(force bool) { w.Refresh(force) })
	}
	if o.Secret != "" {
		w, err := Watch("secret of the zone", opener.Log, func() ([]string, error) { return zone.ReadSecrets(o.Secret) }, o.Secret)
		if err != nil {
			return nil, err
		}
		opts.Secrets = func() ([]string, error) { return w.Get(), nil }
		z.files = append(z.files, func(force bool) { w.Refresh(force) })
	}
	z.store = newZoneStore(opener, o.Allow, o.Clients)
	opts.Store = z.store
	var err error
	if z.Zone, err = zone.Open(ctx, opts); err != nil {
		z.store.close()
		return nil, err
	}
	z.store.zone.Store(z.Zone)
	opener.Log.Info("a member of the zone", "zone", o.Name, "name", z.Name(), "address", z.Addr(), "tls", o.Cert != "")
	return z, nil
}

// close leaves the zone.
func (z *hostZone) close() {
	z.Zone.Close()
	z.store.close()
}

// bind binds the fetcher to the registry of an image, with the zone in front of it if the
// host is a member of one. Layouts and archives are files of this host.
func (o *opener) bind(b *BlockImage) *fetcher.Bound {
	z := o.zone.Load()
	if z == nil || b.Repo.Ref().Registry == "" {
		return o.fetcher.From(b.Repo)
	}
	return o.fetcher.FromNear(b.Repo, z.nearby(b.Reference()))
}

// nearby is the zone as the fetcher uses it, for one image.
func (z *hostZone) nearby(image string) fetcher.Nearby {
	return fetcher.Nearby{
		RunChunks: zone.RunChunks, PieceBytes: zone.PieceBytes,
		Route: func(of blockmap.Digest, number uint32) fetcher.Route { return z.Route(image, of, number) },
		Alone: z.Alone,
		Piece: func(ctx context.Context, blob blockmap.Digest, off, n int64, owned bool, fetch fetcher.FetchPiece) ([]byte, string, error) {
			return z.Piece(ctx, image, blob, off, n, owned, fetch)
		},
		Judged: func(blob blockmap.Digest, off int64, right bool) { z.Judged(image, blob, off, right) },
		Keep:   z.Keep,
	}
}

// readBlob reads a small blob of an image, such as its index or a trace: through the zone if
// the host is a member of one, so that the hosts that start an image at once read it from the
// registry once.
func (o *opener) readBlob(ctx context.Context, b *BlockImage, d v1.Descriptor) ([]byte, error) {
	if o.zone.Load() == nil || b.Repo.Ref().Registry == "" || d.Size <= 0 || d.Size > maxPeerIndex || !isSHA256(d.Digest) {
		return b.Repo.Blob(ctx, d)
	}
	bound := o.bind(b)
	defer bound.Close()
	blob, err := readVerified(ctx, bound, digestOf(d.Digest), d.Size)
	if err == nil {
		return blob, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	o.Log.Debug("a blob has not come through the zone", "image", b.Name, "blob", d.Digest.String(), "err", err)
	return b.Repo.Blob(ctx, d)
}

// readVerified reads and verifies a small blob through the zone.
func readVerified(ctx context.Context, from *fetcher.Bound, blob blockmap.Digest, size int64) ([]byte, error) {
	body, err := from.OpenBlob(ctx, blob, size, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, size))
	if err != nil {
		return nil, err
	}
	judged, _ := body.(interface {
		Verified()
		Distrust()
	})
	if int64(len(b)) != size || blockmap.Digest(sha256.Sum256(b)) != blob {
		if judged != nil {
			judged.Distrust()
		}
		return nil, errWrongBlob
	}
	if judged != nil {
		judged.Verified()
	}
	return b, nil
}

var errWrongBlob = errors.New("a peer has sent other bytes")

// ErrNoZone says that a host is in no zone.
var ErrNoZone = errors.New("this server is a member of no zone: start it with --zone NAME --zone-listen HOST:PORT")

// ZoneStatus is the membership of a host in a zone.
type ZoneStatus struct {
	zone.Status
	// Registry is what this host has fetched from registries, in bytes: for itself, and
	// for the peers of the runs that it owns.
	Registry int64 `json:"registry_bytes"`
}

// Zone returns the state of the membership, with what peers say of themselves until ctx
// ends if ask is set. It fails with ErrNoZone if the host is a member of none.
func (h *Host) Zone(ctx context.Context, ask bool) (ZoneStatus, error) {
	z := h.zone
	if z == nil {
		return ZoneStatus{}, ErrNoZone
	}
	s := ZoneStatus{Registry: h.fetcher.Stats().Bytes}
	if ask {
		s.Status = z.Ask(ctx)
	} else {
		s.Status = z.Status()
	}
	return s, nil
}

// RefreshZone reads the files of the zone again if they have changed, or if force is set.
func (h *Host) RefreshZone(force bool) {
	if h.zone != nil {
		for _, f := range h.zone.files {
			f(force)
		}
	}
}
