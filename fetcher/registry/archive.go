package registry

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archive is what `docker save` and `podman save` write: a tar with a
// manifest.json that names the config and layers of images.
//
// It has no manifest that a registry would know, so one is made: of the layers
// as they are in the archive, not compressed anew, so that it is the same
// whoever makes it, and a layer can be read where it lies. The archive is
// walked once, when it is first asked for something.
type archive struct {
	file string

	once  sync.Once
	err   error
	files map[string]member
	mu    struct {
		sync.Mutex
		blobs map[v1.Hash]member
		raw   map[v1.Hash][]byte // manifests that were made
	}
}

// member is where a file of the archive lies.
type member struct {
	off, size int64
	link      string
}

// savedImage is an entry of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

const maxMembers = 1 << 20

func (a *archive) walk() error {
	a.once.Do(func() { a.err = a.scan() })
	return a.err
}

func (a *archive) scan() error {
	f, err := os.Open(a.file)
	if err != nil {
		return fileError(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", a.file)
	}
	var magic [2]byte
	if n, _ := f.ReadAt(magic[:], 0); n == 2 && magic == [2]byte{0x1f, 0x8b} {
		return fmt.Errorf("%s is compressed: uncompress it with gunzip first", a.file)
	}
	a.files = make(map[string]member)
	// A reader that can seek is not read through.
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("%s is not an archive, or is damaged: %w", a.file, err)
		}
		if len(a.files) >= maxMembers {
			return fmt.Errorf("%s has too many members", a.file)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			off, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			a.files[name] = member{off: off, size: h.Size}
		case tar.TypeSymlink:
			a.files[name] = member{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			a.files[name] = member{link: path.Clean(h.Linkname)}
		}
	}
	if _, ok := a.files["manifest.json"]; !ok {
		return fmt.Errorf("%s is not an image archive: it has no manifest.json", a.file)
	}
	return nil
}

// member finds a file, following links.
func (a *archive) member(name string) (member, error) {
	at := path.Clean(name)
	for range 8 {
		m, ok := a.files[at]
		if !ok {
			return member{}, fmt.Errorf("%w: %s has no member %s", ErrNotFound, a.file, name)
		}
		if m.link == "" {
			return m, nil
		}
		at = m.link
	}
	return member{}, fmt.Errorf("%s: the links from %s lead nowhere", a.file, name)
}

func (a *archive) openAt(m member) (*Body, error) {
	f, err := os.Open(a.file)
	if err != nil {
		return nil, fileError(err)
	}
	return section(f, m.off, m.size, false)
}

func (a *archive) read(name string) ([]byte, error) {
	m, err := a.member(name)
	if err != nil {
		return nil, err
	}
	if m.size > maxManifest {
		return nil, fmt.Errorf("%s: the member %s has %d bytes, which is too many", a.file, name, m.size)
	}
	b, err := a.openAt(m)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	return io.ReadAll(b)
}

func (a *archive) manifest(ctx context.Context, ref Ref) ([]byte, string, error) {
	if err := a.walk(); err != nil {
		return nil, "", err
	}
	if ref.Digest != (v1.Hash{}) {
		a.mu.Lock()
		raw := a.mu.raw[ref.Digest]
		a.mu.Unlock()
		if raw == nil {
			return nil, "", ErrNotFound
		}
		return raw, string(types.OCIManifestSchema1), nil
	}
	b, err := a.read("manifest.json")
	if err != nil {
		return nil, "", err
	}
	var images []savedImage
	if err := json.Unmarshal(b, &images); err != nil {
		return nil, "", fmt.Errorf("parse manifest.json: %w", err)
	}
	img, err := choose(images, ref.Tag)
	if err != nil {
		return nil, "", err
	}
	raw, err := a.make(ctx, img)
	return raw, string(types.OCIManifestSchema1), err
}

func choose(images []savedImage, name string) (savedImage, error) {
	var names []string
	for _, img := range images {
		for _, t := range img.RepoTags {
			if name != "" && (t == name || fullName(t) == fullName(name)) {
				return img, nil
			}
			names = append(names, t)
		}
	}
	switch {
	case name != "":
		return savedImage{}, fmt.Errorf("%w: no image is named %s, there are: %s", ErrNotFound, name, strings.Join(names, ", "))
	case len(images) == 0:
		return savedImage{}, fmt.Errorf("%w: the archive has no image", ErrNotFound)
	case len(images) > 1:
		return savedImage{}, fmt.Errorf("the archive has %d images, choose a name: %s", len(images), strings.Join(names, ", "))
	}
	return images[0], nil
}

// fullName is a name with its registry and tag, since there are several ways
// to write the same.
func fullName(s string) string {
	r, err := parseRegistry(s)
	if err != nil {
		return s
	}
	return r.String()
}

// make makes the manifest of an image and takes note of its blobs.
func (a *archive) make(ctx context.Context, img savedImage) ([]byte, error) {
	config, err := a.read(img.Config)
	if err != nil {
		return nil, err
	}
	var c v1.ConfigFile
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("parse config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(img.Layers) {
		return nil, fmt.Errorf("the image has %d layers and its config says %d", len(img.Layers), len(c.RootFS.DiffIDs))
	}
	blobs := make(map[v1.Hash]member)
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{},
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: hashOf(config)}}
	if blobs[m.Config.Digest], err = a.member(img.Config); err != nil {
		return nil, err
	}
	for i, name := range img.Layers {
		at, err := a.member(name)
		if err != nil {
			return nil, err
		}
		d, err := a.layer(ctx, at, c.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", name, err)
		}
		blobs[d.Digest] = at
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.blobs == nil {
		a.mu.blobs, a.mu.raw = make(map[v1.Hash]member), make(map[v1.Hash][]byte)
	}
	for h, at := range blobs {
		a.mu.blobs[h] = at
	}
	a.mu.raw[hashOf(raw)] = raw
	return raw, nil
}

// layer describes a layer. A plain one has its diff ID for a digest, which
// whoever reads it checks; a compressed one has to be read to know.
func (a *archive) layer(ctx context.Context, at member, diffID v1.Hash) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: types.OCIUncompressedLayer, Size: at.size, Digest: diffID}
	b, err := a.openAt(at)
	if err != nil {
		return d, err
	}
	defer b.Close()
	r := bufio.NewReaderSize(b, 256<<10)
	magic, _ := r.Peek(4)
	switch {
	case len(magic) >= 2 && magic[0] == 0x1f && magic[1] == 0x8b:
		d.MediaType = types.OCILayer
	case string(magic) == "\x28\xb5\x2f\xfd":
		d.MediaType = types.OCILayerZStd
	default:
		return d, nil
	}
	s := newSum()
	if _, err := io.Copy(s, ctxReader{ctx, r}); err != nil {
		return d, err
	}
	d.Digest = s.hash()
	return d, nil
}

// ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func (a *archive) blob(h v1.Hash) (member, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	m, ok := a.mu.blobs[h]
	if !ok {
		return m, ErrNotFound
	}
	return m, nil
}

func (a *archive) open(_ context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	m, err := a.blob(digest)
	switch {
	case err != nil:
		return nil, err
	case whole && m.size != n:
		return nil, fmt.Errorf("the member has %d bytes, its descriptor says %d", m.size, n)
	case m.size < off+n:
		return nil, fmt.Errorf("the member has %d bytes, those up to %d were asked for", m.size, off+n)
	}
	return a.openAt(member{off: m.off + off, size: n})
}

func (a *archive) stat(_ context.Context, digest v1.Hash) (int64, error) {
	m, err := a.blob(digest)
	return m.size, err
}

func (a *archive) referrers(context.Context, v1.Descriptor, []string) ([]v1.Descriptor, error) {
	return nil, nil // there is no place for them
}
