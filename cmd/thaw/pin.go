package main

import (
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/fetcher/registry"
)

// pinFlags are the --pin flags as given: "sha256:HEX" or "IMAGE=sha256:HEX".
type pinFlags []string

const pinUsage = "refuse a block image with another digest than this: [IMAGE=]sha256:HEX, the digest alone where there is one image (repeatable)"

// pins say which digests the block images of some names must have. A name is the
// same however it is written: a pin of a tag holds with a digest behind the tag as
// well, and a directory is where its symbolic links lead to.
type pins map[registry.Ref]v1.Hash

// of is the digest that ref is pinned to, if any.
func (p pins) of(ref registry.Ref) (v1.Hash, bool) {
	if len(p) == 0 {
		return v1.Hash{}, false
	}
	ref = canonical(ref)
	h, ok := p[ref]
	if !ok && ref.Tag != "" && ref.Digest != (v1.Hash{}) {
		ref.Digest = v1.Hash{}
		h, ok = p[ref]
	}
	return h, ok
}

// canonical is ref with the one name of its directory.
func canonical(ref registry.Ref) registry.Ref {
	if ref.Layout != "" {
		if dir, err := realPath(ref.Layout); err == nil {
			ref.Layout = dir
		}
	}
	return ref
}

var errPinWithoutImage = usageError{errors.New("--pin needs an --image to pin")}

// of gives the flags their meaning for the images of a command line. others says
// that images may be named later as well.
func (f pinFlags) of(images []string, others bool) (pins, error) {
	p := make(pins)
	refs := make(map[registry.Ref]bool)
	for _, name := range images {
		// What is wrong with a name is said by whoever opens it.
		if ref, err := registry.ParseRef(name); err == nil {
			refs[canonical(ref)] = true
		}
	}
	for _, s := range f {
		name, digest := "", s
		if i := strings.LastIndexByte(s, '='); i >= 0 {
			name, digest = s[:i], s[i+1:]
		}
		h, err := v1.NewHash(digest)
		if err != nil || !isSHA256(h) {
			return nil, usageError{fmt.Errorf("--pin %s: the digest must be sha256: and 64 hexadecimal digits", s)}
		}
		if name == "" {
			if len(images) != 1 {
				return nil, usageError{fmt.Errorf("--pin %s: name the image: --pin IMAGE=%s", s, digest)}
			}
			name = images[0]
		}
		ref, err := registry.ParseRef(name)
		if err != nil {
			return nil, usageError{fmt.Errorf("--pin %s: %w", s, err)}
		}
		if ref = canonical(ref); !refs[ref] && !others {
			return nil, usageError{fmt.Errorf("--pin %s: %s is not one of the images", s, name)}
		}
		if was, ok := p[ref]; ok && was != h {
			return nil, usageError{fmt.Errorf("--pin: %s is pinned to both %s and %s", name, was, h)}
		}
		p[ref] = h
	}
	return p, nil
}

// errPinned says that a name leads to another block image than its pin. The
// registry has answered, so the cache is no way out.
var errPinned = errors.New("the block image is not the pinned one")

// check says whether digest is the pinned one, if any is.
func (p pins) check(ref registry.Ref, digest v1.Hash) error {
	if pin, ok := p.of(ref); ok && digest != pin {
		return fmt.Errorf("%w: %s has the block image %s, and %s is pinned", errPinned, ref, digest, pin)
	}
	return nil
}
