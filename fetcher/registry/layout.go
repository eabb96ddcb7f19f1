package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// layout is an OCI layout directory (image spec, "OCI Image Layout").
type layout struct {
	view
	dir string
}

func newLayout(dir string) *layout { return &layout{view{directory(dir)}, dir} }

const (
	refName       = "org.opencontainers.image.ref.name"
	fullRefName   = "io.containerd.image.name" // with registry and repository, in archives of docker and containerd
	layoutVersion = `{"imageLayoutVersion":"1.0.0"}`

	layoutFile = "oci-layout"
	indexFile  = "index.json"
)

func (l *layout) blobPath(h v1.Hash) string { return filepath.Join(l.dir, blobName(h)) }

// has verifies the bytes too, so that a damaged blob is written again: reading is less work
// than writing.
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
		return false, nil // it cannot be read, so it is written again
	}
	return s.hash() == d.Digest, nil
}

// create makes the directory a layout, if it is none.
func (l *layout) create() error {
	err := l.check(context.Background())
	if !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs", "sha256"), 0o777); err != nil {
		return err
	}
	// oci-layout is written last, when the rest exists.
	if _, err := os.Stat(filepath.Join(l.dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		empty := []byte(`{"schemaVersion":2,"mediaType":"` + string(types.OCIImageIndex) + `","manifests":[]}`)
		if err := create(filepath.Join(l.dir, "index.json"), empty); err != nil {
			return err
		}
	}
	return create(filepath.Join(l.dir, "oci-layout"), []byte(layoutVersion))
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

// link makes a link to b's file in dir, and verifies the file. It returns no name if the file
// must be copied instead.
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

// fill copies b to w and verifies it.
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
