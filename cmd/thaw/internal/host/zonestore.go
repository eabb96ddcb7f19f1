package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/fetcher/zone"
)

// zoneStore answers a zone on behalf of peers. It is a zone.Store.
//
// A peer names an image by its repository and the digest of its manifest. Who knows the
// digest may read what it names: this host fetches it with its own credentials. Peers
// cannot have it open any repository, though: only those that match --zone-allow. Without
// --zone-allow, these are the repositories that clients of this host may open by --allow,
// and all repositories of the registries that this host has images of. Those are the
// registries that somebody on this host has chosen, so that a peer cannot point this host
// at a server of its choice.
//
// The images that peers have opened are bounded in number and in the size of their indexes,
// and are closed when no peer has asked for them for some minutes. They have no root in the
// cache: what is cached for peers only is evicted before what this host's own images need.
type zoneStore struct {
	opener  *opener
	allow   Allow // of --zone-allow
	clients Allow // of --allow
	log     *slog.Logger
	zone    atomic.Pointer[zone.Zone] // nil until it is open
	misses  *rate.Limiter             // what peers have asked for and could not be had

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex
		images     map[string]*peerImage
		bytes      int64 // of the indexes of these
		registries map[string]bool
	}
}

// Bounds on what peers have a host open.
const (
	maxPeerImages = 64
	maxPeerIndex  = 64 << 20  // bytes of an index, as it is stored
	maxPeerBytes  = 256 << 20 // of all of them
	peerImageIdle = 5 * time.Minute
	peerOpenTime  = 15 * time.Second
	// peerErrorKept is how long the registry is not asked again for an image that could not
	// be opened.
	peerErrorKept = 3 * time.Second
	maxRegistries = 1024
	// missBurst and missEvery bound how often the registry is asked, with the credentials of
	// this host, for what peers name and it does not have: they can name any digest.
	missBurst = 64
	missEvery = 250 * time.Millisecond
)

// errMisses is the error of a request for something new while there are too many misses.
var errMisses = fmt.Errorf("%w: peers have asked for too much that does not exist", zone.ErrAbsent)

// missed counts a request to the registry that has failed, unless that was given up.
func (s *zoneStore) missed(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		s.misses.Allow()
	}
}

// tooMany reports whether the registry is not asked for anything new at present.
func (s *zoneStore) tooMany() bool { return s.misses.Tokens() < 1 }

// peerImage is an image that a peer has asked for. ready is closed when the fields below it
// are final.
type peerImage struct {
	name    string
	ready   chan struct{}
	image   *blockmap.Image
	fetcher *fetcher.Bound
	streams map[blockmap.Digest]int // tables in the index, by the stream's ID
	bytes   int64                   // of the index
	err     error

	// Guarded by zoneStore.mu.
	users int
	used  time.Time
}

func newZoneStore(o *opener, allow, clients Allow) *zoneStore {
	s := &zoneStore{opener: o, allow: allow, clients: clients, log: o.Log, misses: rate.NewLimiter(rate.Every(missEvery), missBurst)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.images = make(map[string]*peerImage)
	s.mu.registries = make(map[string]bool)
	for _, root := range o.cache.Roots() {
		for _, key := range root.Refs {
			if _, name, ok := strings.Cut(key, " "); ok {
				if ref, err := registry.ParseRef(name); err == nil {
					s.know(ref)
				}
			}
		}
	}
	s.wg.Go(s.tend)
	return s
}

// close closes all images. The zone is closed by then.
func (s *zoneStore) close() {
	s.cancel()
	s.wg.Wait()
	s.mu.Lock()
	var gone []*peerImage
	for _, m := range s.mu.images {
		gone = append(gone, s.drop(m))
	}
	s.mu.Unlock()
	closeImages(gone)
}

// know notes that somebody on this host has opened an image of a registry.
func (s *zoneStore) know(ref registry.Ref) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ref.Registry != "" && len(s.mu.registries) < maxRegistries {
		s.mu.registries[strings.ToLower(ref.Registry)] = true
	}
}

// mayOpen parses what a peer names, and checks that peers may have this host open it.
func (s *zoneStore) mayOpen(image string) (ref registry.Ref, err error) {
	if ref, err = registry.ParseRef(image); err != nil || ref.Registry == "" || ref.Tag != "" || !isSHA256(ref.Digest) {
		return ref, fmt.Errorf("%w: %.200q is not HOST/REPOSITORY@sha256:DIGEST", zone.ErrAbsent, image)
	}
	ok := s.allow.Match(image)
	if len(s.allow) == 0 {
		s.mu.Lock()
		ok = s.mu.registries[strings.ToLower(ref.Registry)]
		s.mu.Unlock()
		ok = ok || s.clients.Match(image)
	}
	if !ok {
		return ref, fmt.Errorf("%w: this host opens no images of %s for peers", zone.ErrAbsent, ref.Place())
	}
	return ref, nil
}

// Allows implements zone.Store.
func (s *zoneStore) Allows(image string) error {
	_, err := s.mayOpen(image)
	return err
}

// Stream implements zone.Store.
func (s *zoneStore) Stream(ctx context.Context, image string, stream blockmap.Digest) (zone.StoredStream, func(), error) {
	ref, err := s.mayOpen(image)
	if err != nil {
		return nil, nil, err
	}
	m, err := s.use(ref)
	if err != nil {
		return nil, nil, err
	}
	release := sync.OnceFunc(func() { s.leave(m) })
	select {
	case <-m.ready:
		err = m.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	at, has := m.streamAt(err, stream)
	if err == nil && !has {
		err = fmt.Errorf("%w: the image has no such stream", zone.ErrAbsent)
	}
	if err != nil {
		release()
		return nil, nil, err
	}
	table := &m.image.Index().Streams[at]
	of, err := m.image.Stream(table)
	if err != nil {
		release()
		return nil, nil, err
	}
	return &peerStream{of, table, m.fetcher, s.opener.fetcher}, release, nil
}

func (m *peerImage) streamAt(err error, stream blockmap.Digest) (at int, ok bool) {
	if err != nil {
		return 0, false
	}
	at, ok = m.streams[stream]
	return at, ok
}

// use finds an image, or begins to open it, and makes the caller a user.
func (s *zoneStore) use(ref registry.Ref) (*peerImage, error) {
	name := ref.String()
	now := time.Now()
	var gone []*peerImage
	defer func() { closeImages(gone) }() // when s.mu is not held
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.mu.images[name]
	if m != nil && m.failed() && m.users == 0 && now.Sub(m.used) > peerErrorKept {
		gone = append(gone, s.drop(m))
		m = nil
	}
	if m == nil {
		if s.ctx.Err() != nil {
			return nil, ErrClosed
		}
		if s.tooMany() {
			return nil, errMisses
		}
		for len(s.mu.images) >= maxPeerImages {
			coldest := s.coldest()
			if coldest == nil {
				return nil, fmt.Errorf("%w: peers have this host open %d images, which are in use", zone.ErrAbsent, len(s.mu.images))
			}
			gone = append(gone, s.drop(coldest))
		}
		m = &peerImage{name: name, ready: make(chan struct{}), used: now}
		s.mu.images[name] = m
		s.wg.Go(func() { s.open(m, ref) })
	}
	m.users++
	if !m.failed() {
		m.used = now
	}
	return m, nil
}

// failed reports whether the image could not be opened.
func (m *peerImage) failed() bool { return m.isReady() && m.err != nil }

// leave ends a use.
func (s *zoneStore) leave(m *peerImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.users--
	if !m.failed() {
		m.used = time.Now()
	}
}

// drop takes out an image that nobody uses. The caller closes it when s.mu is not held any
// more. s.mu is held.
func (s *zoneStore) drop(m *peerImage) *peerImage {
	delete(s.mu.images, m.name)
	s.mu.bytes -= m.bytes
	return m
}

// closeImages closes images that were dropped.
func closeImages(gone []*peerImage) {
	for _, m := range gone {
		if m.image != nil {
			m.fetcher.Close()
			m.image.Close()
		}
	}
}

// isReady reports whether the image was opened, or could not be opened.
func (m *peerImage) isReady() bool {
	select {
	case <-m.ready:
		return true
	default:
		return false
	}
}

// coldest returns the least recently used image that nobody uses, or nil: one that could not
// be opened if there is one, or peers that name what does not exist would have all others
// closed. s.mu is held.
func (s *zoneStore) coldest() (coldest *peerImage) {
	for _, m := range s.mu.images {
		switch {
		case m.users > 0 || !m.isReady():
		case coldest == nil, m.failed() && !coldest.failed(), m.failed() == coldest.failed() && m.used.Before(coldest.used):
			coldest = m
		}
	}
	return coldest
}

// tend closes images that no peer has asked for lately.
func (s *zoneStore) tend() {
	t := time.NewTicker(peerImageIdle / 10)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case now := <-t.C:
			s.expire(now.Add(-peerImageIdle))
		}
	}
}

func (s *zoneStore) expire(since time.Time) {
	var gone []*peerImage
	s.mu.Lock()
	for _, m := range s.mu.images {
		if m.users == 0 && m.isReady() && m.used.Before(since) {
			gone = append(gone, s.drop(m))
		}
	}
	s.mu.Unlock()
	closeImages(gone)
}

// open opens an image for peers. It outlives the peer that asked first.
func (s *zoneStore) open(m *peerImage, ref registry.Ref) {
	ctx, cancel := context.WithTimeout(s.ctx, peerOpenTime)
	defer cancel()
	b, encoded, err := s.find(ctx, ref)
	s.missed(s.ctx, err)
	var image *blockmap.Image
	var bound *fetcher.Bound
	if err == nil {
		bound = s.opener.fetcher.From(b.Repo) // the registry, and no peer
		bound.Keep(s.keep)
		if image, err = blockmap.NewImage(b.Index, s.opener.cache, bound); err != nil {
			bound.Close()
		}
	}
	if err == nil {
		m.streams = make(map[blockmap.Digest]int)
		for i := range b.Index.Streams {
			if of, err := image.Stream(&b.Index.Streams[i]); err == nil {
				m.streams[of.ID()] = i
			}
		}
	}
	if errors.Is(err, registry.ErrNotFound) {
		err = fmt.Errorf("%w: %w", zone.ErrAbsent, err)
	}
	if err != nil {
		err = fmt.Errorf("open the image %s for a peer: %w", ref, err)
		s.log.Debug("cannot open an image for a peer", "image", ref.String(), "err", err)
	}
	var gone []*peerImage
	s.mu.Lock()
	m.image, m.fetcher, m.err, m.bytes, m.used = image, bound, err, int64(encoded), time.Now()
	s.mu.bytes += m.bytes
	close(m.ready)
	for s.mu.bytes > maxPeerBytes {
		coldest := s.coldest()
		if coldest == nil {
			break
		}
		gone = append(gone, s.drop(coldest))
	}
	s.mu.Unlock()
	closeImages(gone)
}

// keep keeps a chunk for peers as the registry has it.
func (s *zoneStore) keep(stream blockmap.Digest, chunk int, stored []byte) {
	if z := s.zone.Load(); z != nil {
		z.Keep(stream, chunk, stored)
	}
}

// find reads the manifest and the index of an image: from the cache if this host has them,
// and else the manifest from the registry, and the index from its owner in the zone.
func (s *zoneStore) find(ctx context.Context, ref registry.Ref) (b *BlockImage, encoded int, err error) {
	o := s.opener
	repo, err := o.Client.Open(ref)
	if err != nil {
		return nil, 0, err
	}
	b = &BlockImage{Name: ref.String(), Repo: repo, Digest: ref.Digest}
	if b.Raw, err = o.cache.Blob(digestOf(ref.Digest)); err != nil {
		if b.Raw, _, err = repo.ReadManifest(ctx, ref); err != nil {
			return nil, 0, err
		}
		// It saves a request later, perhaps for a device of this host.
		_ = o.cache.PutBlob(b.Raw)
	}
	if err := b.parse(); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", zone.ErrAbsent, err)
	}
	if b.Manifest.Index.Size > maxPeerIndex {
		return nil, 0, fmt.Errorf("%w: its index has %d bytes", zone.ErrAbsent, b.Manifest.Index.Size)
	}
	index, err := o.cache.Blob(b.IndexDigest())
	if err != nil {
		if index, err = o.readBlob(ctx, b, b.Manifest.Index); err != nil {
			return nil, 0, err
		}
		_ = o.cache.PutBlob(index)
	}
	if err := b.parseIndex(index); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", zone.ErrAbsent, err)
	}
	return b, len(index), nil
}

// Blob implements zone.Store. The digest of the blob is a capability like that of the image.
// This never asks a peer: an owner of a piece that asked another one could wait for itself.
func (s *zoneStore) Blob(ctx context.Context, image string, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	ref, err := s.mayOpen(image)
	if err != nil {
		return nil, err
	}
	if b, err := s.opener.cache.Blob(blob); err == nil {
		if off < 0 || n < 0 || off > int64(len(b)) || n > int64(len(b))-off {
			return nil, fmt.Errorf("%w: the blob has %d bytes", zone.ErrAbsent, len(b))
		}
		return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		s.log.Debug("cannot read a small blob of the cache", "err", err)
	}
	repo, err := s.opener.Client.Open(ref)
	if err != nil {
		return nil, err
	}
	if s.tooMany() {
		return nil, errMisses
	}
	body, err := repo.OpenRange(ctx, blob, off, n)
	s.missed(ctx, err)
	if errors.Is(err, registry.ErrNotFound) {
		err = fmt.Errorf("%w: %w", zone.ErrAbsent, err)
	}
	return body, err
}

// peerStream is a stream of a peerImage. It is a zone.StoredStream.
type peerStream struct {
	stream  *blockmap.Stream
	table   *blockmap.Table
	bound   *fetcher.Bound
	fetcher *fetcher.Fetcher
}

// Stream implements zone.StoredStream.
func (p *peerStream) Stream() *blockmap.Stream { return p.stream }

// FetchOwned implements zone.StoredStream.
func (p *peerStream) FetchOwned(ctx context.Context, first, last int) error {
	var wants []blockmap.Want
	for i := first; i <= last; i++ {
		if !p.stream.Has(i) {
			wants = append(wants, blockmap.Want{Stream: p.stream, Table: p.table, Chunk: i})
		}
	}
	return p.bound.FetchOwned(ctx, wants)
}

// InFlight implements zone.StoredStream.
func (p *peerStream) InFlight(first, last int) (wait func(context.Context) error, ok bool) {
	return p.fetcher.InFlight(p.stream, first, last)
}
