package registry

import (
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
)

// layout is an OCI layout directory (image spec, "OCI Image Layout").
type layout struct{ dir string }

const (
	refName       = "org.opencontainers.image.ref.name"
	layoutVersion = `{"imageLayoutVersion":"1.0.0"}`
)

func (l *layout) blobPath(h v1.Hash) string {
	return filepath.Join(l.dir, "blobs", h.Algorithm, h.Hex)
}

// check says whether the directory is a layout at all.
func (l *layout) check() error {
	b, err := readBounded(filepath.Join(l.dir, "oci-layout"), 4<<10)
	if errors.Is(err, ErrNotFound) {
		if _, err := os.Stat(l.dir); err != nil {
			return fmt.Errorf("%w: there is no directory %s", ErrNotFound, l.dir)
		}
		return fmt.Errorf("%w: %s is not an OCI layout, it has no file oci-layout", ErrNotFound, l.dir)
	}
	if err != nil {
		return err
	}
	var v struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(b, &v); err != nil || !strings.HasPrefix(v.Version, "1.") {
		return fmt.Errorf("%s is an OCI layout of the unknown version %q", l.dir, v.Version)
	}
	return nil
}

func (l *layout) index() (*v1.IndexManifest, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	b, err := readBounded(filepath.Join(l.dir, "index.json"), maxManifest)
	if err != nil {
		return nil, err
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, fmt.Errorf("parse %s: %w", filepath.Join(l.dir, "index.json"), err)
	}
	return &index, nil
}

func (l *layout) manifest(_ context.Context, ref Ref) ([]byte, string, error) {
	if ref.Digest != (v1.Hash{}) {
		b, err := readBounded(l.blobPath(ref.Digest), maxManifest)
		if errors.Is(err, ErrNotFound) {
			if err := l.check(); err != nil {
				return nil, "", err
			}
		}
		return b, "", err
	}
	index, err := l.index()
	if err != nil {
		return nil, "", err
	}
	d, err := l.find(index, ref.Tag)
	if err != nil {
		return nil, "", err
	}
	b, err := readBounded(l.blobPath(d.Digest), maxManifest)
	if err != nil {
		return nil, "", fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if int64(len(b)) != d.Size || hashOf(b) != d.Digest {
		return nil, "", fmt.Errorf("manifest %s: %w: the file holds %d other bytes", d.Digest, ErrDigest, len(b))
	}
	return b, string(d.MediaType), nil
}

// find takes the manifest with the tag, or the only one if there is no tag;
// those that refer to another do not count then.
func (l *layout) find(index *v1.IndexManifest, tag string) (v1.Descriptor, error) {
	var found []v1.Descriptor
	var tags []string
	for _, d := range index.Manifests {
		name := d.Annotations[refName]
		if tag != "" && name == tag {
			return d, checkDescriptor(d)
		}
		if tag == "" && d.ArtifactType == "" {
			found = append(found, d)
		}
		// Tags that builds make for themselves are not for people.
		if name != "" && !strings.HasPrefix(name, "thaw-image-") && !strings.HasPrefix(name, "thaw-layer-") {
			tags = append(tags, name)
		}
	}
	slices.Sort(tags)
	list := "there are: " + strings.Join(tags, ", ")
	if len(tags) == 0 {
		list = "there are no tags"
	}
	switch {
	case tag != "":
		return v1.Descriptor{}, fmt.Errorf("%w: no image is tagged %s, %s", ErrNotFound, tag, list)
	case len(found) == 0:
		return v1.Descriptor{}, fmt.Errorf("%w: the layout has no image", ErrNotFound)
	case len(found) > 1:
		return v1.Descriptor{}, fmt.Errorf("the layout has %d images, choose a tag: %s", len(found), list)
	}
	return found[0], checkDescriptor(found[0])
}

func checkDescriptor(d v1.Descriptor) error {
	if d.Digest.Algorithm != "sha256" || d.Size < 0 || d.Size > maxManifest {
		return fmt.Errorf("the entry %s of %d bytes in index.json cannot be a manifest", d.Digest, d.Size)
	}
	return nil
}

func (l *layout) open(_ context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	f, err := os.Open(l.blobPath(digest))
	if err != nil {
		return nil, fileError(err)
	}
	return section(f, off, n, whole)
}

// section is a part of a file, which must be there.
func section(f *os.File, off, n int64, whole bool) (*Body, error) {
	fi, err := f.Stat()
	switch {
	case err != nil:
	case !fi.Mode().IsRegular():
		err = fmt.Errorf("%s is not a file", f.Name())
	case whole && fi.Size() != n:
		err = fmt.Errorf("%s has %d bytes, its descriptor says %d", f.Name(), fi.Size(), n)
	case fi.Size() < off+n:
		err = fmt.Errorf("%s has %d bytes, those up to %d were asked for", f.Name(), fi.Size(), off+n)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Body{rc: fileSection{io.NewSectionReader(f, off, n), f}, left: n}, nil
}

type fileSection struct {
	io.Reader
	io.Closer
}

func (l *layout) stat(_ context.Context, digest v1.Hash) (int64, error) {
	fi, err := os.Stat(l.blobPath(digest))
	if err != nil {
		return 0, fileError(err)
	}
	return fi.Size(), nil
}

// referrers looks into the manifests that index.json lists.
func (l *layout) referrers(ctx context.Context, subject v1.Descriptor, _ []string) ([]v1.Descriptor, error) {
	index, err := l.index()
	if err != nil {
		return nil, err
	}
	var found []v1.Descriptor
	for _, d := range index.Manifests {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if d.Digest == subject.Digest || !d.MediaType.IsImage() && !d.MediaType.IsIndex() || checkDescriptor(d) != nil {
			continue
		}
		raw, err := readBounded(l.blobPath(d.Digest), d.Size)
		if errors.Is(err, ErrNotFound) {
			continue // Parts of an image may have been left out of a copy.
		}
		if err != nil {
			return nil, err
		}
		d := v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		if hashOf(raw) != d.Digest {
			continue
		}
		s, listed, err := asReferrer(raw, d)
		if err == nil && s != nil && s.Digest == subject.Digest {
			found = append(found, listed)
		}
	}
	return found, nil
}

func (l *layout) has(_ context.Context, d v1.Descriptor) (bool, error) {
	fi, err := os.Stat(l.blobPath(d.Digest))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	// One of another size was not written by this package; it is replaced.
	return err == nil && fi.Size() == d.Size, err
}

// create makes the directory a layout if it is none.
func (l *layout) create() error {
	err := l.check()
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
		f, err := os.Open(tmp)
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
	f, err := os.OpenFile(filepath.Join(l.dir, "index.json.lock"), os.O_CREATE|os.O_RDWR, 0o666)
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
