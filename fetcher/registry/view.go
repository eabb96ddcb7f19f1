package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// view reads an OCI layout, wherever its files are.
type view struct{ files files }

// files are the files of a layout. Names are those of the spec, with slashes.
type files interface {
	// read returns the bytes of a file, which has max at most.
	read(ctx context.Context, name string, max int64) ([]byte, error)
	// open reads a range of a file; whole means that this is all of the file.
	open(ctx context.Context, name string, off, n int64, whole bool) (*Body, error)
	size(ctx context.Context, name string) (int64, error)
	// absent explains why this is no layout: it lacks a file that every layout has.
	absent(name string) error
}

func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

// check fails if this is no layout.
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
		return fmt.Errorf("%s: the OCI layout has the unsupported version %q", v.files, l.Version)
	}
	return nil
}

// index returns the usable entries of index.json, and by tag why others are not usable.
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

// parseLayoutIndex is parseIndex, and also says by tag why an entry is not usable.
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
			err = errors.New("its descriptor has no valid SHA-256 digest and size")
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

// entry reads the manifest of an entry of index.json.
func (v *view) entry(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	b, err := v.files.read(ctx, blobName(d.Digest), maxManifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if int64(len(b)) != d.Size || hashOf(b) != d.Digest {
		return nil, fmt.Errorf("manifest %s: %w: the file holds %d bytes with another digest", d.Digest, ErrDigest, len(b))
	}
	return b, nil
}

// checkDescriptor says whether d can describe a manifest.
func checkDescriptor(d v1.Descriptor) error {
	if d.Digest.Algorithm != "sha256" || d.Size < 0 || d.Size > maxManifest {
		return fmt.Errorf("the entry %s, of %d bytes, cannot be a manifest", d.Digest, d.Size)
	}
	return nil
}

func (v *view) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	return v.files.open(ctx, blobName(digest), off, n, whole)
}

func (v *view) stat(ctx context.Context, digest v1.Hash) (int64, error) {
	return v.files.size(ctx, blobName(digest))
}

// referrers reads the manifests that index.json lists. One that is missing, damaged or no
// file refers to nothing.
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
