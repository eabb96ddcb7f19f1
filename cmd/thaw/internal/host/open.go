package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher"
	"thaw/fetcher/registry"
)

// opener opens images for serving. It keeps manifests, indexes and the meaning of names
// in the cache, so that the next start can do without the registry.
type opener struct {
	*Finder
	cache   *blockmap.Cache
	fetcher *fetcher.Fetcher
	zone    atomic.Pointer[hostZone] // nil: none; peers may ask before the host has it
	// patience is how long the start of a device waits for a registry if the cache knows an
	// earlier answer, or if the start can go on without an answer. Tests raise it.
	patience time.Duration
}

// patience is opener.patience.
const patience = 2 * time.Second

// openImage is an image in the cache, and the fetcher bound to its registry. The caller
// closes it when no reader uses it any more.
type openImage struct {
	*blockmap.Image
	of      *BlockImage
	fetcher *fetcher.Bound

	cancel context.CancelFunc // cancels the requests in the background
	asking sync.WaitGroup
}

func (m *openImage) close() {
	m.cancel()
	m.asking.Wait()
	m.fetcher.Close()
	m.Image.Close()
}

// open opens an image. It calls begin as soon as it knows which image it is likely to
// serve, and may call begin again for another image. The last call counts.
//
// The cache remembers the image that the name led to last time, perhaps with all of
// its bytes. If the name is a digest or is pinned to one, that image is served at once.
// Otherwise it is served if the registry does not answer within patience, or cannot
// answer.
func (o *opener) open(ctx context.Context, name string, begin func(*BlockImage)) (*openImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, InvalidError{err}
	}
	repo, err := o.Client.Open(ref)
	if err != nil {
		return nil, err
	}
	known, err := o.recall(repo, name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			o.Log.Warn("the cache's record of the image cannot be used", "image", name, "err", err)
		}
		return o.ask(ctx, repo, name, begin)
	}
	begin(known)
	if _, pinned := o.Pins.Of(ref); pinned || ref.Digest != (v1.Hash{}) {
		return o.serveKnown(known, nil, func(ctx context.Context) { o.checkAccess(ctx, known) })
	}

	// A late answer is still compared with the image that is served.
	type answer struct {
		b   *BlockImage
		err error
	}
	answered := make(chan answer, 1)
	asked := time.Now()
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
	abandon := func() {
		cancel()
		<-answered
	}
	t := time.NewTimer(o.patience)
	defer t.Stop()
	select {
	case <-ctx.Done():
		abandon()
		return nil, context.Cause(ctx)
	case <-t.C:
		err := repo.LastFailure(asked)
		if err == nil {
			err = fmt.Errorf("%w: the registry has not answered within %v", registry.ErrUnavailable, o.patience)
		}
		m, err := o.serveKnown(known, err, late)
		if err != nil {
			abandon()
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
func (o *opener) ask(ctx context.Context, repo *registry.Repo, name string, begin func(*BlockImage)) (*openImage, error) {
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

// serveFound opens b, the image that the registry has returned.
func (o *opener) serveFound(ctx context.Context, known, b *BlockImage, begin func(*BlockImage)) (*openImage, error) {
	if b.Digest != known.Digest {
		begin(b)
	}
	cached, err := o.load(ctx, b)
	if err != nil {
		m, instead := o.serveInstead(known, err)
		if instead == nil && b.Digest != known.Digest {
			begin(known)
		}
		return m, instead
	}
	if !cached {
		return o.image(b, nil)
	}
	return o.image(b, func(ctx context.Context) { o.checkBlobs(ctx, b) })
}

// serveInstead opens the known image because asking the registry failed with err. It
// fails with err if the registry has given an answer. If the registry refuses access,
// the cache must have the whole image: nothing else can be fetched.
func (o *opener) serveInstead(known *BlockImage, err error) (*openImage, error) {
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

// serveKnown opens the image that the cache knows. err is the reason why the registry's
// answer is not used; it is nil if no answer is needed.
func (o *opener) serveKnown(known *BlockImage, err error, then func(context.Context)) (*openImage, error) {
	m, openErr := o.image(known, nil)
	if openErr != nil {
		return nil, openErr
	}
	missing := absent(m.Image)
	if errors.Is(err, registry.ErrUnauthorized) && missing > 0 {
		m.close()
		return nil, fmt.Errorf("%w; the cache lacks %d MiB of the image", err, (missing+1<<20-1)>>20)
	}
	if err != nil {
		o.Log.Warn("serving from the cache alone", "image", known.Name, "missing_bytes", missing, "digest", known.Digest.String(), "err", err)
	}
	if then != nil && (err != nil || missing > 0) {
		m.background(then)
	}
	return m, nil
}

// image opens b, and runs then in the background, unless it is nil, until the image is
// closed.
func (o *opener) image(b *BlockImage, then func(context.Context)) (*openImage, error) {
	if z := o.zone.Load(); z != nil {
		z.store.know(b.Repo.Ref())
	}
	f := o.bind(b)
	image, err := blockmap.NewImage(b.Index, o.cache, f)
	if err != nil {
		f.Close()
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

// askAgain asks the registry which image the name means, with growing pauses, until the
// registry answers.
func (o *opener) askAgain(ctx context.Context, known *BlockImage) {
	const first, most = 5 * time.Second, 2 * time.Minute
	for wait := first; ; wait = min(2*wait, most) {
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		b, err := o.manifest(ctx, known.Repo, known.Name)
		if err == nil || !errors.Is(err, registry.ErrUnavailable) {
			o.compare(ctx, known, b, err)
			return
		}
	}
}

// compare logs what a late answer means for the image that is served. The device stays
// as it is, because clients may have it mounted.
func (o *opener) compare(ctx context.Context, known, b *BlockImage, err error) {
	log := o.Log.With("image", known.Name, "digest", known.Digest.String())
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, registry.ErrUnavailable):
		o.askAgain(ctx, known)
	case err != nil:
		log.Warn("the registry has answered late, and not with the image that is served from the cache", "err", err)
	case b.Digest != known.Digest:
		// Without this, a registry that is always slow would keep the first meaning of
		// the name forever.
		if _, err := o.load(ctx, b); err != nil && ctx.Err() == nil {
			log.Warn("the image that the name means by now cannot be kept in the cache", "now", b.Digest.String(), "err", err)
		}
		log.Warn("the name means another image by now; the cached image is served until the device is opened again", "now", b.Digest.String())
	default:
		log.Info("the registry has answered: the image that is served from the cache is the current one")
	}
}

// checkAccess warns if the registry does not let thaw read the image. The name needed
// no look-up, but thaw must fetch the bytes that the cache lacks.
func (o *opener) checkAccess(ctx context.Context, b *BlockImage) {
	if err := b.Repo.CheckAccess(ctx); err != nil && ctx.Err() == nil {
		o.Log.Warn("reads of chunks that are not in the cache may fail", "image", b.Name, "err", err)
	}
}

// checkBlobs warns if the registry has lost a blob of the image, before a read fails.
func (o *opener) checkBlobs(ctx context.Context, b *BlockImage) {
	d := b.Manifest.Layers[1]
	ok, err := b.Repo.HasBlob(ctx, d)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		// A registry may refuse HEAD and still serve the blob by GET.
		o.Log.Debug("cannot check whether the registry has all blobs of the image", "image", b.Name, "err", err)
	case !ok:
		o.Log.Warn("the registry has lost a part of the image", "image", b.Name, "blob", d.Digest.String())
	}
}

// load reads the index, from the cache if it is there, and stores in the cache what a
// later recall needs.
func (o *opener) load(ctx context.Context, b *BlockImage) (cached bool, err error) {
	encoded, err := o.cache.Blob(b.IndexDigest())
	cached = err == nil
	if !cached {
		if encoded, err = o.readBlob(ctx, b, b.Manifest.Index); err != nil {
			return false, err
		}
	}
	if err := b.parseIndex(encoded); err != nil {
		return cached, err
	}
	// The manifest and the index are here, so from now on the name leads to this
	// image. If they cannot be kept, the image is served all the same.
	kept, err := flatten.Resolution{Name: b.Name, Manifest: b.Digest, Source: b.source, Top: b.top}.Encode()
	// The root comes first: blobs that no root holds are the first to be evicted.
	root := blockmap.RootOf(digestOf(b.Digest), b.Index)
	root.Blobs = []blockmap.Digest{root.Image, b.IndexDigest()}
	root.Refs = []string{o.key(b.Name)}
	err = errors.Join(err, o.cache.AddRoot(root))
	if !cached {
		err = errors.Join(err, o.cache.PutBlob(encoded))
	}
	if err = errors.Join(err, o.cache.PutBlob(b.Raw), o.cache.PutRef(o.key(b.Name), kept)); err != nil {
		o.Log.Warn("the cache cannot keep what the name means: the next start will need the registry", "image", b.Name, "err", err)
	}
	return cached, nil
}

// recall finds what load has stored, and checks it by the rules for a registry's
// answer. It fails with fs.ErrNotExist if load has stored nothing.
func (o *opener) recall(repo *registry.Repo, name string) (*BlockImage, error) {
	b, err := o.recallAs(repo, name, name)
	if !errors.Is(err, fs.ErrNotExist) || repo.Ref().Digest == (v1.Hash{}) {
		return b, err
	}
	// The image may have been served by another name of the same repository, such as a
	// tag. A name of another repository does not count: it says nothing about who may
	// read this one.
	for _, root := range o.cache.Roots() {
		for _, key := range root.Refs {
			other, ok := strings.CutPrefix(key, o.key(""))
			if !ok || !sameRepository(repo.Ref(), other) {
				continue
			}
			if b, err := o.recallAs(repo, name, other); err == nil {
				return b, nil
			}
		}
	}
	return nil, err
}

// sameRepository reports whether a name is one of the repository of ref.
func sameRepository(ref registry.Ref, name string) bool {
	other, err := registry.ParseRef(name)
	return err == nil && other.WithDigest(ref.Digest).String() == ref.WithDigest(ref.Digest).String()
}

// recallAs is recall of what load has stored under another name.
func (o *opener) recallAs(repo *registry.Repo, name, stored string) (*BlockImage, error) {
	kept, err := o.cache.Ref(o.key(stored))
	if err != nil {
		return nil, err
	}
	r, err := flatten.ParseResolution(kept, stored)
	if err != nil {
		return nil, err
	}
	raw, err := o.cache.Blob(digestOf(r.Manifest))
	if err != nil {
		return nil, err
	}
	b := &BlockImage{Name: name, Repo: repo, Digest: r.Manifest, Raw: raw, source: r.Source, top: r.Top}
	if err := b.parse(); err != nil {
		return nil, err
	}
	if b.source != (v1.Hash{}) && (b.Manifest.Subject == nil || b.Manifest.Subject.Digest != b.source) {
		return nil, fmt.Errorf("the block image %s is not one of %s", b.Digest, b.source)
	}
	if d := repo.Ref().Digest; d != (v1.Hash{}) && d != b.Digest && d != b.source && d != b.top {
		return nil, fmt.Errorf("the block image %s is not one of %s", b.Digest, d)
	}
	if o.Pins.check(repo.Ref(), b.Digest) != nil {
		return nil, fs.ErrNotExist // the registry may have the right one
	}
	encoded, err := o.cache.Blob(b.IndexDigest())
	if err != nil {
		return nil, err
	}
	return b, b.parseIndex(encoded)
}

func (o *opener) key(name string) string { return o.Platform.String() + " " + name }

// absent counts the bytes of an image that are not in the cache.
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
