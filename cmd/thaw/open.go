package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
)

// opener opens images for serving. What it learns it keeps in the cache, so that
// it can do without the registry the next time.
type opener struct {
	*finder
	cache   *blockmap.Cache
	fetcher *fetcher.Fetcher
}

// patience is how long the start of a device waits for a registry to say what is
// known already, as of last time, or what is not needed.
const patience = 2 * time.Second

// openImage is an image in the cache, with what fetches for it. It is to be
// closed when nothing reads it any more.
type openImage struct {
	*blockmap.Image
	of      *blockImage
	fetcher *fetcher.Bound

	cancel context.CancelFunc // of what is asked in the background
	asking sync.WaitGroup
}

func (m *openImage) close() {
	m.cancel()
	m.asking.Wait()
	m.fetcher.Close()
	m.Image.Close()
}

// open opens an image. It calls begin for the image that is likely to be served,
// as soon as it is known, and perhaps again for another one: what counts is the
// last call.
//
// What the name meant the last time is in the cache, perhaps with all of its
// bytes. It is served at once where the name is a digest or pinned to one, and else
// where the registry says nothing for as long as patience lasts, or cannot answer.
func (o *opener) open(ctx context.Context, name string, begin func(*blockImage)) (*openImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, usageError{err}
	}
	repo, err := o.client.Open(ref)
	if err != nil {
		return nil, err
	}
	known, err := o.recall(repo, name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			o.log.Warn("what the cache knows of the image is of no use", "image", name, "err", err)
		}
		return o.ask(ctx, repo, name, begin)
	}
	begin(known)
	if _, pinned := o.pins.of(ref); pinned || ref.Digest != (v1.Hash{}) {
		return o.serveKnown(known, nil, func(ctx context.Context) { o.checkAccess(ctx, known) })
	}

	// The answer that is late is of interest all the same.
	type answer struct {
		b   *blockImage
		err error
	}
	answered := make(chan answer, 1)
	askCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		b, err := o.manifest(askCtx, repo, name)
		answered <- answer{b, err}
	}()
	late := func(ctx context.Context) {
		defer cancel()
		stop := context.AfterFunc(ctx, cancel)
		defer stop()
		a := <-answered
		o.compare(ctx, known, a.b, a.err)
	}
	give := func() { // the answer up
		cancel()
		<-answered
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-ctx.Done():
		give()
		return nil, context.Cause(ctx)
	case <-t.C:
		err := fmt.Errorf("%w: the registry has not answered within %v", registry.ErrUnavailable, patience)
		m, err := o.serveKnown(known, err, late)
		if err != nil {
			give()
		}
		return m, err
	case a := <-answered:
		cancel()
		if a.err == nil {
			return o.serveFound(ctx, known, a.b, begin)
		}
		return o.serveInstead(known, a.err)
	}
}

// ask opens an image that the cache does not know.
func (o *opener) ask(ctx context.Context, repo *registry.Repo, name string, begin func(*blockImage)) (*openImage, error) {
	b, err := o.manifest(ctx, repo, name)
	if err != nil {
		return nil, err
	}
	begin(b)
	if _, err := o.load(ctx, b); err != nil {
		return nil, err
	}
	return o.image(b, nil)
}

// serveFound opens b, of which the registry has told.
func (o *opener) serveFound(ctx context.Context, known, b *blockImage, begin func(*blockImage)) (*openImage, error) {
	if b.digest != known.digest {
		begin(b)
	}
	cached, err := o.load(ctx, b)
	if err != nil {
		m, instead := o.serveInstead(known, err)
		if instead == nil && b.digest != known.digest {
			begin(known)
		}
		return m, instead
	}
	if !cached {
		return o.image(b, nil)
	}
	return o.image(b, func(ctx context.Context) { o.checkBlobs(ctx, b) })
}

// serveInstead opens what is known, because of err. Nothing helps where the
// registry has given an answer. Where it refuses us, the cache must have all: what
// is missing would not come.
func (o *opener) serveInstead(known *blockImage, err error) (*openImage, error) {
	var bad badImage
	if errors.Is(err, registry.ErrNotFound) || errors.Is(err, errNoBlockImage) || errors.Is(err, errPinned) || errors.As(err, &bad) ||
		errors.Is(err, context.Canceled) {
		return nil, err
	}
	var then func(context.Context)
	if errors.Is(err, registry.ErrUnavailable) {
		then = func(ctx context.Context) { o.askAgain(ctx, known) }
	}
	return o.serveKnown(known, err, then)
}

// serveKnown opens what is known. err says why it is not asked for, nil that
// there is no need.
func (o *opener) serveKnown(known *blockImage, err error, then func(context.Context)) (*openImage, error) {
	m, openErr := o.image(known, nil)
	if openErr != nil {
		return nil, openErr
	}
	missing := absent(m.Image)
	if errors.Is(err, registry.ErrUnauthorized) && missing > 0 {
		m.close()
		return nil, fmt.Errorf("%w; the cache lacks %s of the image", err, bytesString(missing))
	}
	if err != nil {
		o.log.Warn("serving from the cache alone", "image", known.name, "missing_bytes", missing, "digest", known.digest.String(), "err", err)
	}
	if then != nil && (err != nil || missing > 0) {
		m.background(then)
	}
	return m, nil
}

// image opens b, and has then run in the background until it is closed.
func (o *opener) image(b *blockImage, then func(context.Context)) (*openImage, error) {
	f := o.fetcher.From(origin{b.repo})
	image, err := blockmap.NewImage(b.index, o.cache, f)
	if err != nil {
		return nil, err
	}
	m := &openImage{Image: image, of: b, fetcher: f, cancel: func() {}}
	if then != nil {
		m.background(then)
	}
	return m, nil
}

func (m *openImage) background(f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.asking.Go(func() { f(ctx) })
}

// askAgain asks until the registry answers what the name means.
func (o *opener) askAgain(ctx context.Context, known *blockImage) {
	const first, most = 5 * time.Second, 2 * time.Minute
	for wait := first; ; wait = min(2*wait, most) {
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		b, err := o.manifest(ctx, known.repo, known.name)
		if err == nil || !errors.Is(err, registry.ErrUnavailable) {
			o.compare(ctx, known, b, err)
			return
		}
	}
}

// compare says what a late answer means for the image that is served: it stays,
// for clients have it mounted.
func (o *opener) compare(ctx context.Context, known, b *blockImage, err error) {
	log := o.log.With("image", known.name, "digest", known.digest.String())
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, registry.ErrUnavailable):
		o.askAgain(ctx, known)
	case err != nil:
		log.Warn("the registry answers late, and not with the image that is served from the cache", "err", err)
	case b.digest != known.digest:
		// With a registry that is always slow, the name would stay with its first
		// meaning for ever.
		if _, err := o.load(ctx, b); err != nil && ctx.Err() == nil {
			log.Warn("the image that the name means by now cannot be opened", "now", b.digest.String(), "err", err)
		}
		log.Warn("the name means another image by now; the one from the cache is served until the name is opened anew", "now", b.digest.String())
	default:
		log.Info("the registry answers: the image that is served from the cache is the current one")
	}
}

// checkAccess warns where the rest of an image that needed no look-up may not be
// read.
func (o *opener) checkAccess(ctx context.Context, b *blockImage) {
	if err := b.repo.CheckAccess(ctx); err != nil && ctx.Err() == nil {
		o.log.Warn("reads of what is not in the cache may fail", "image", b.name, "err", err)
	}
}

// checkBlobs warns where the registry has lost a part of an image: reads would be
// the first to notice.
func (o *opener) checkBlobs(ctx context.Context, b *blockImage) {
	d := b.manifest.Layers[1]
	ok, err := b.repo.HasBlob(ctx, d)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		// A registry may refuse HEAD and still give the blob.
		o.log.Debug("cannot see whether the registry has all of the image", "image", b.name, "err", err)
	case !ok:
		o.log.Warn("the registry has lost a part of the image", "image", b.name, "blob", d.Digest.String())
	}
}

// load gets the index, from the cache if it can, and keeps what a later recall
// needs.
func (o *opener) load(ctx context.Context, b *blockImage) (cached bool, err error) {
	encoded, err := o.cache.Blob(b.indexDigest())
	cached = err == nil
	if !cached {
		if encoded, err = b.repo.Blob(ctx, b.manifest.Index); err != nil {
			return false, err
		}
	}
	if err := b.parseIndex(encoded); err != nil {
		return cached, err
	}
	// Now that all of it is here, the name means this image. The image is served
	// as well without: what cannot be kept has to be asked for again.
	ref, err := json.Marshal(remembered{Format: rememberedFormat, Name: b.name, Manifest: b.digest, Source: b.source, Top: b.top})
	// The root comes first: blobs that no root holds are the first to be evicted.
	root := blockmap.RootOf(digestOf(b.digest), b.index)
	root.Blobs = []blockmap.Digest{root.Image, b.indexDigest()}
	root.Refs = []string{o.key(b.name)}
	err = errors.Join(err, o.cache.AddRoot(root))
	if !cached {
		err = errors.Join(err, o.cache.PutBlob(encoded))
	}
	if err = errors.Join(err, o.cache.PutBlob(b.raw), o.cache.PutRef(o.key(b.name), ref)); err != nil {
		o.log.Warn("the cache cannot keep what the name means; a start without the registry will not find it", "image", b.name, "err", err)
	}
	return cached, nil
}

// remembered is what the cache keeps under the name of an image.
type remembered struct {
	Format   int     `json:"format"`
	Name     string  `json:"name"`
	Manifest v1.Hash `json:"manifest"`        // of the block image
	Source   v1.Hash `json:"source,omitzero"` // of the image that it is beside
	Top      v1.Hash `json:"top,omitzero"`    // of the index that led there
}

// rememberedFormat is raised when the rules change by which a name leads to a
// block image: what was kept by other rules is asked for again.
const rememberedFormat = 2

// recall finds what load has kept, and holds it to the rules for what a registry
// says. It fails with fs.ErrNotExist where there is nothing.
func (o *opener) recall(repo *registry.Repo, name string) (*blockImage, error) {
	kept, err := o.cache.Ref(o.key(name))
	if err != nil {
		return nil, err
	}
	var r remembered
	if err := json.Unmarshal(kept, &r); err != nil {
		return nil, err
	}
	if r.Format != rememberedFormat || r.Name != name || !isSHA256(r.Manifest) {
		return nil, fs.ErrNotExist
	}
	raw, err := o.cache.Blob(digestOf(r.Manifest))
	if err != nil {
		return nil, err
	}
	b := &blockImage{name: name, repo: repo, digest: r.Manifest, raw: raw, source: r.Source, top: r.Top}
	if err := b.parse(); err != nil {
		return nil, err
	}
	if b.source != (v1.Hash{}) && (b.manifest.Subject == nil || b.manifest.Subject.Digest != b.source) {
		return nil, fmt.Errorf("the block image %s is not one of %s", b.digest, b.source)
	}
	if d := repo.Ref().Digest; d != (v1.Hash{}) && d != b.digest && d != b.source && d != b.top {
		return nil, fmt.Errorf("the block image %s is not one of %s", b.digest, d)
	}
	if o.pins.check(repo.Ref(), b.digest) != nil {
		return nil, fs.ErrNotExist // the registry may have the right one
	}
	encoded, err := o.cache.Blob(b.indexDigest())
	if err != nil {
		return nil, err
	}
	return b, b.parseIndex(encoded)
}

func (o *opener) key(name string) string { return o.platform.String() + " " + name }

// absent is how much of an image is not in the cache.
func absent(m *blockmap.Image) (n int64) {
	for at := int64(0); at < m.Size(); {
		s := m.Status(blockmap.Extent{Start: at, End: m.Size()})
		if !s.Resident {
			n += s.Len()
		}
		at = s.End
	}
	return n
}

// origin is a repository as a fetcher sees it.
type origin struct{ repo *registry.Repo }

func (o origin) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	return o.repo.OpenRange(ctx, hashOf(blob), off, n)
}

// OpenRangeElsewhere asks other mirrors, or the registry, for bytes that come too
// slowly from where they were asked for.
func (o origin) OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error) {
	return o.repo.OpenRangeElsewhere(ctx, hashOf(blob), off, n, avoid)
}

func (o origin) Ranges() int { return o.repo.Ranges() }

func (o origin) OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error) {
	asked := make([]registry.Range, len(ranges))
	for i, r := range ranges {
		asked[i] = registry.Range{Off: r.Start, N: r.Len()}
	}
	return o.repo.OpenRanges(ctx, hashOf(blob), asked)
}
