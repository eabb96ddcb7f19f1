package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// layout is an OCI layout directory (image spec, "OCI Image Layout").
type layout struct {
	view
	dir string
}

func newLayout(dir string) *layout { return &layout{view{directory(dir)}, dir} }

// view reads an OCI layout, wherever its files are.
type view struct{ files files }

// files are the files of a layout. Names are those of the spec, with slashes.
type files interface {
	// read gives a file of at most max bytes.
	read(ctx context.Context, name string, max int64) ([]byte, error)
	// open gives a part of a file; whole says that it is all of it.
	open(ctx context.Context, name string, off, n int64, whole bool) (*Body, error)
	size(ctx context.Context, name string) (int64, error)
	// absent says why there is no layout, where a file of every layout is
	// missing.
	absent(name string) error
}

const (
	refName       = "org.opencontainers.image.ref.name"
	fullRefName   = "io.containerd.image.name" // with registry and repository, in archives of docker and containerd
	layoutVersion = `{"imageLayoutVersion":"1.0.0"}`

	layoutFile = "oci-layout"
	indexFile  = "index.json"
)

func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func (l *layout) blobPath(h v1.Hash) string { return filepath.Join(l.dir, blobName(h)) }

// check says whether it is a layout at all.
func (v *view) check(ctx context.Context) error {
	b, err := v.files.read(ctx, layoutFile, 4<<10)
	if errors.Is(err, ErrNotFound) {
		return v.files.absent(layoutFile)
	}
	if err != nil {
		return err
	}
	var l struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(b, &l); err != nil || !strings.HasPrefix(l.Version, "1.") {
		return fmt.Errorf("%s: the OCI layout is of the unknown version %q", v.files, l.Version)
	}
	return nil
}

// index gives the entries of index.json that are of use, and for tags of those
// that are not, why.
func (v *view) index(ctx context.Context) (entries []v1.Descriptor, unusable map[string]error, err error) {
	if err := v.check(ctx); err != nil {
		return nil, nil, err
	}
	b, err := v.files.read(ctx, indexFile, maxManifest)
	if errors.Is(err, ErrNotFound) {
		err = v.files.absent(indexFile)
	}
	if err != nil {
		return nil, nil, err
	}
	if entries, unusable, err = parseLayoutIndex(b); err != nil {
		return nil, nil, fmt.Errorf("%s: %s: %w", v.files, indexFile, err)
	}
	return entries, unusable, nil
}

// parseLayoutIndex is parseIndex, and says of the tags whose entries are not of use
// why that is.
func parseLayoutIndex(raw []byte) (entries []v1.Descriptor, unusable map[string]error, err error) {
	all, err := indexEntries(raw)
	if err != nil {
		return nil, nil, err
	}
	unusable = make(map[string]error)
	for _, raw := range all {
		d, ok := parseEntry(raw)
		err := checkDescriptor(d)
		if ok && err == nil {
			entries = append(entries, d)
			continue
		}
		if !ok {
			err = errors.New("its descriptor has no SHA-256 digest and size that can be read")
		}
		var named struct {
			Annotations map[string]string `json:"annotations"`
		}
		if json.Unmarshal(raw, &named) == nil && named.Annotations[refName] != "" {
			unusable[named.Annotations[refName]] = err
		}
	}
	return entries, unusable, nil
}

func (v *view) manifest(ctx context.Context, ref Ref) ([]byte, string, error) {
	if ref.Digest != (v1.Hash{}) {
		b, err := v.files.read(ctx, blobName(ref.Digest), maxManifest)
		if errors.Is(err, ErrNotFound) {
			if err := v.check(ctx); err != nil {
				return nil, "", err
			}
		}
		return b, "", err
	}
	entries, unusable, err := v.index(ctx)
	if err != nil {
		return nil, "", err
	}
	found, err := v.find(ctx, entries, unusable, ref.Tag)
	if err != nil {
		return nil, "", err
	}
	if len(found) > 1 {
		// Images for several platforms: index.json is an index like any other.
		b, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: found})
		return b, string(types.OCIImageIndex), err
	}
	d := found[0]
	b, err := v.entry(ctx, d)
	return b, string(d.MediaType), err
}

// entry reads the manifest that an entry of index.json is about.
func (v *view) entry(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	b, err := v.files.read(ctx, blobName(d.Digest), maxManifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if int64(len(b)) != d.Size || hashOf(b) != d.Digest {
		return nil, fmt.Errorf("manifest %s: %w: the file holds %d other bytes", d.Digest, ErrDigest, len(b))
	}
	return b, nil
}

// find takes the manifest with the tag, or the only image if there is no tag:
// block images, converted layers and other artifacts do not count then. It
// gives several only where they are images for several platforms.
func (v *view) find(ctx context.Context, entries []v1.Descriptor, unusable map[string]error, tag string) ([]v1.Descriptor, error) {
	var found []v1.Descriptor
	var tags []string
	seen := make(map[v1.Hash]bool)
	for _, d := range entries {
		name, full := d.Annotations[refName], d.Annotations[fullRefName]
		if (name != "" || full != "") && !internal(name) {
			tags = append(tags, cmp.Or(name, full))
		}
		if seen[d.Digest] || tag != "" && name != tag && (full == "" || fullName(full) != fullName(tag)) {
			continue
		}
		if tag == "" && !offersImage(d) {
			continue
		}
		seen[d.Digest] = true
		found = append(found, d)
	}
	slices.Sort(tags)
	list := "there are: " + joined(slices.Compact(tags))
	if len(tags) == 0 {
		list = "there are no tags"
	}
	if tag != "" && len(found) == 0 {
		if err := unusable[tag]; err != nil {
			return nil, fmt.Errorf("the entry of index.json that is tagged %s cannot be used: %w", tag, err)
		}
		return nil, fmt.Errorf("%w: no image is tagged %s, %s", ErrNotFound, tag, list)
	}
	if tag != "" && len(found) == 1 {
		return found, nil
	}
	images, err := v.images(ctx, found)
	if err != nil {
		return nil, err
	}
	switch {
	case len(images) == 1 || len(images) > 1 && differ(images, platformOf):
		return images, nil
	case tag != "" && len(images) == 0:
		return found[:1], nil
	case tag != "" && differ(images, func(d v1.Descriptor) string { return d.Annotations[fullRefName] }):
		var names []string
		for _, d := range images {
			names = append(names, d.Annotations[fullRefName])
		}
		return nil, fmt.Errorf("%d images are tagged %s, choose one by its full name: %s", len(images), tag, joined(names))
	case tag != "":
		return images[:1], nil // of whoever does not replace a tag; the other tools take the first as well
	case len(images) == 0:
		return nil, fmt.Errorf("%w: the layout has no image but under a tag, %s", ErrNotFound, list)
	}
	return nil, fmt.Errorf("the layout has %d images, choose a tag: %s", len(images), list)
}

// internal says whether builds have made a tag for themselves: it is not one for
// people to choose.
func internal(tag string) bool {
	return strings.HasPrefix(tag, "thaw-image-") || strings.HasPrefix(tag, "thaw-layer-")
}

// differ says whether what of says of the entries is there, and of each
// something else.
func differ(entries []v1.Descriptor, of func(v1.Descriptor) string) bool {
	seen := make(map[string]bool)
	for _, d := range entries {
		s := of(d)
		if s == "" || seen[s] {
			return false
		}
		seen[s] = true
	}
	return true
}

func platformOf(d v1.Descriptor) string {
	if !says(d.Platform) {
		return ""
	}
	return normal(*d.Platform).String()
}

// images keeps the entries that are images by their manifests, since an entry
// need not say that it is an artifact. Those that cannot be read are left out if
// there are others.
func (v *view) images(ctx context.Context, entries []v1.Descriptor) (images []v1.Descriptor, err error) {
	var unread []v1.Descriptor
	for _, d := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if d.MediaType.IsIndex() {
			images = append(images, d)
			continue
		}
		raw, err := v.entry(ctx, d)
		if err != nil {
			unread = append(unread, d)
			continue
		}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) == nil && isImage(&m) {
			images = append(images, d)
		}
	}
	if len(images) == 0 {
		return unread, nil
	}
	return images, nil
}

// checkDescriptor says whether d can describe a manifest.
func checkDescriptor(d v1.Descriptor) error {
	if d.Digest.Algorithm != "sha256" || d.Size < 0 || d.Size > maxManifest {
		return fmt.Errorf("the entry %s of %d bytes cannot be a manifest", d.Digest, d.Size)
	}
	return nil
}

func (v *view) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	return v.files.open(ctx, blobName(digest), off, n, whole)
}

func (v *view) stat(ctx context.Context, digest v1.Hash) (int64, error) {
	return v.files.size(ctx, blobName(digest))
}

// referrers looks into the manifests that index.json lists. One that is gone,
// damaged or no file at all refers to nothing.
func (v *view) referrers(ctx context.Context, subject v1.Descriptor, _ []string) ([]v1.Descriptor, error) {
	entries, _, err := v.index(ctx)
	if err != nil {
		return nil, err
	}
	var found []v1.Descriptor
	for _, d := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if d.Digest == subject.Digest || !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
			continue
		}
		raw, err := v.entry(ctx, v1.Descriptor{Digest: d.Digest, Size: d.Size})
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDigest) || errors.Is(err, errTooLong) || errors.Is(err, errNotRegular) {
			continue // Parts of an image may have been left out of a copy.
		}
		if err != nil {
			return nil, err
		}
		s, listed, err := asReferrer(raw, v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size})
		if err == nil && s != nil && s.Digest == subject.Digest {
			found = append(found, listed)
		}
	}
	return found, nil
}

// directory is where the files of a layout are.
type directory string

func (d directory) path(name string) string { return filepath.Join(string(d), name) }

func (d directory) read(_ context.Context, name string, max int64) ([]byte, error) {
	return readBounded(d.path(name), max)
}

func (d directory) open(_ context.Context, name string, off, n int64, whole bool) (*Body, error) {
	f, size, err := openRegular(d.path(name))
	if err != nil {
		return nil, err
	}
	if err := within(f.Name(), size, off, n, whole); err != nil {
		f.Close()
		return nil, err
	}
	return &Body{rc: fileSection{io.NewSectionReader(f, off, n), f}, left: n}, nil
}

// within says whether a file has the part of it that is asked for.
func within(name string, size, off, n int64, whole bool) error {
	switch {
	case whole && size != n:
		return fmt.Errorf("%s has %d bytes, its descriptor says %d", name, size, n)
	case off < 0 || n < 0 || off > size || n > size-off:
		return fmt.Errorf("%s has %d bytes, and %d were asked for from byte %d", name, size, n, off)
	}
	return nil
}

type fileSection struct {
	io.Reader
	io.Closer
}

func (d directory) size(_ context.Context, name string) (int64, error) {
	fi, err := os.Stat(d.path(name))
	if err != nil {
		return 0, fileError(err)
	}
	if !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("%s %w", d.path(name), errNotRegular)
	}
	return fi.Size(), nil
}

func (d directory) absent(name string) error {
	switch fi, err := os.Stat(string(d)); {
	case err != nil:
		return fmt.Errorf("%w: there is no directory %s", ErrNotFound, string(d))
	case !fi.IsDir():
		return fmt.Errorf("%w: %s is not a directory; an archive is named oci-archive:FILE or docker-archive:FILE", ErrNotFound, string(d))
	}
	return fmt.Errorf("%w: %s is not an OCI layout, it has no file %s", ErrNotFound, string(d), name)
}

// has compares the bytes as well: a blob that was damaged is written again, and
// to read one is less work than to write it.
func (l *layout) has(ctx context.Context, d v1.Descriptor) (bool, error) {
	f, size, err := openRegular(l.blobPath(d.Digest))
	switch {
	case errors.Is(err, ErrNotFound):
		return false, nil
	case err != nil:
		return false, err
	}
	defer f.Close()
	if size != d.Size {
		return false, nil
	}
	s := newSum()
	if _, err := io.Copy(s, ctxReader{ctx, f}); err != nil {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		return false, nil // a bad sector is no blob
	}
	return s.hash() == d.Digest, nil
}

// Holds is HasBlob, and for a layout compares the bytes with the digest as
// well, as registries do on their own.
func (r *Repo) Holds(ctx context.Context, d v1.Descriptor) (bool, error) {
	l, ok := r.target.(*layout)
	if !ok {
		return r.HasBlob(ctx, d)
	}
	has, err := l.has(ctx, d)
	if err != nil {
		err = fmt.Errorf("look for blob %s in %s: %w", d.Digest, r, err)
	}
	return has, err
}

// create makes the directory a layout if it is none.
func (l *layout) create() error {
	err := l.check(context.Background())
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs", "sha256"), 0o777); err != nil {
		return err
	}
	// oci-layout comes last: it says that the rest is there.
	if _, err := os.Stat(filepath.Join(l.dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		empty := []byte(`{"schemaVersion":2,"mediaType":"` + string(types.OCIImageIndex) + `","manifests":[]}`)
		if err := create(filepath.Join(l.dir, "index.json"), empty); err != nil {
			return err
		}
	}
	return create(filepath.Join(l.dir, "oci-layout"), []byte(layoutVersion))
}

// create writes a file that is not there, whole; it is no error if another
// was quicker.
func create(path string, data []byte) error {
	tmp, err := writeTemp(filepath.Dir(path), func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, os.ErrExist) {
		// Not all filesystems have links.
		if err := os.Rename(tmp, path); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(path))
}

func (l *layout) putBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error {
	if err := l.create(); err != nil {
		return err
	}
	dir := filepath.Join(l.dir, "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	tmp, err := l.link(ctx, d, b, dir, progress)
	if err == nil && tmp == "" {
		tmp, err = writeTemp(dir, func(f *os.File) error { return l.fill(ctx, d, b, f, progress) })
	}
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, l.blobPath(d.Digest)); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(dir)
}

// link makes b's file another name in dir, and checks it. It gives no name
// where the file has to be copied.
func (l *layout) link(ctx context.Context, d v1.Descriptor, b blob, dir string, progress func(int64)) (string, error) {
	if b.path == "" {
		return "", nil
	}
	if fi, err := os.Lstat(b.path); err != nil || !fi.Mode().IsRegular() {
		return "", err
	}
	tmp := filepath.Join(dir, tempName())
	if os.Link(b.path, tmp) != nil {
		return "", nil
	}
	err := func() error {
		f, _, err := openRegular(tmp)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := l.fill(ctx, d, blob{path: tmp}, io.Discard, progress); err != nil {
			return err
		}
		if err := f.Chmod(0o644); err != nil {
			return err
		}
		return f.Sync()
	}()
	if err != nil {
		os.Remove(tmp)
		return "", err
	}
	return tmp, nil
}

// fill copies b to w, checking it.
func (l *layout) fill(ctx context.Context, d v1.Descriptor, b blob, w io.Writer, progress func(int64)) error {
	rc, err := b.open(d.Size)
	if err != nil {
		return err
	}
	defer rc.Close()
	sum := newSum()
	buf := make([]byte, 256<<10)
	var n int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := rc.Read(buf)
		sum.Write(buf[:k])
		if _, err := w.Write(buf[:k]); err != nil {
			return err
		}
		if n += int64(k); k > 0 && progress != nil {
			progress(n)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if got := sum.hash(); got != d.Digest || n != d.Size {
		return fmt.Errorf("%w: the %d bytes are %s", ErrDigest, n, got)
	}
	return nil
}

func (l *layout) putManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string, _ *v1.Descriptor) error {
	if err := l.putBlob(ctx, d, blob{data: raw}, nil); err != nil {
		return err
	}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// The entries that are not ours are kept as they are, with what v1 does
	// not know of.
	path := filepath.Join(l.dir, "index.json")
	old, err := readBounded(path, maxManifest)
	if err != nil {
		return err
	}
	var index map[string]json.RawMessage
	var entries []json.RawMessage
	if err := json.Unmarshal(old, &index); err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	if err := json.Unmarshal(index["manifests"], &entries); err != nil && index["manifests"] != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	if index == nil {
		return fmt.Errorf("parse %s: it is not an object", path)
	}
	entries, err = enter(entries, d, tag)
	if err != nil {
		return err
	}
	if index["manifests"], err = json.Marshal(entries); err != nil {
		return err
	}
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if len(b) > maxManifest {
		return fmt.Errorf("%s would be longer than %d bytes", path, maxManifest)
	}
	tmp, err := writeTemp(l.dir, func(f *os.File) error {
		_, err := f.Write(b)
		return err
	})
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(l.dir)
}

// enter puts d into the entries of index.json. A tag is taken away from
// whatever had it; that stays, untagged, only if something refers from it to
// a subject, by which it is still found.
func enter(entries []json.RawMessage, d v1.Descriptor, tag string) ([]json.RawMessage, error) {
	annotations := make(map[string]string)
	for k, v := range d.Annotations {
		annotations[k] = v
	}
	delete(annotations, refName)
	if tag != "" {
		annotations[refName] = tag
	}
	d.Annotations = annotations
	var kept []json.RawMessage
	for _, raw := range entries {
		var e v1.Descriptor
		if err := json.Unmarshal(raw, &e); err != nil {
			kept = append(kept, raw)
			continue
		}
		name := e.Annotations[refName]
		switch {
		case e.Digest == d.Digest && (name == tag || name == ""):
			continue // d says the same, or more
		case e.Digest == d.Digest && tag == "":
			return entries, nil // it is there, with a tag
		case tag != "" && name == tag:
			if e.ArtifactType == "" {
				continue
			}
			delete(e.Annotations, refName)
			b, err := json.Marshal(e)
			if err != nil {
				return nil, err
			}
			raw = b
		}
		kept = append(kept, raw)
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return append(kept, b), nil
}

// lock keeps other processes, and other goroutines, from replacing index.json.
func (l *layout) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(l.dir, "index.json.lock"), os.O_CREATE|os.O_RDWR|unix.O_NONBLOCK, 0o666)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			f.Close()
			return nil, fmt.Errorf("wait for the lock %s: %w", f.Name(), ctx.Err())
		}
	}
}
