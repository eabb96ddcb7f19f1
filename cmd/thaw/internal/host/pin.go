package host

import (
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/fetcher/registry"
)

// Pins map references to the digests that their block images must have. The spelling of
// a reference does not matter: the pin of a tag also applies to the tag with a digest,
// and a directory is identified by where its symbolic links lead.
type Pins map[registry.Ref]v1.Hash

// Of returns the digest that ref is pinned to, if it is pinned.
func (p Pins) Of(ref registry.Ref) (v1.Hash, bool) {
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

// canonical replaces the directory of ref by the directory that its symbolic links lead
// to.
func canonical(ref registry.Ref) registry.Ref {
	if ref.Layout != "" {
		if dir, err := realPath(ref.Layout); err == nil {
			ref.Layout = dir
		}
	}
	return ref
}

// ParsePins reads pins as users write them, "sha256:HEX" or "IMAGE=sha256:HEX", for
// these images. others allows pins for images that are named later.
func ParsePins(given, images []string, others bool) (Pins, error) {
	p := make(Pins)
	refs := make(map[registry.Ref]bool)
	for _, name := range images {
		// A bad name is reported when it is opened.
		if ref, err := registry.ParseRef(name); err == nil {
			refs[canonical(ref)] = true
		}
	}
	for _, s := range given {
		name, digest := "", s
		if i := strings.LastIndexByte(s, '='); i >= 0 {
			name, digest = s[:i], s[i+1:]
		}
		h, err := v1.NewHash(digest)
		if err != nil || !isSHA256(h) {
			return nil, InvalidError{fmt.Errorf("--pin %s: the digest must be sha256: and 64 hexadecimal digits", s)}
		}
		if name == "" {
			if len(images) != 1 {
				return nil, InvalidError{fmt.Errorf("--pin %s: name the image: --pin IMAGE=%s", s, digest)}
			}
			name = images[0]
		}
		ref, err := registry.ParseRef(name)
		if err != nil {
			return nil, InvalidError{fmt.Errorf("--pin %s: %w", s, err)}
		}
		if ref = canonical(ref); !refs[ref] && !others {
			return nil, InvalidError{fmt.Errorf("--pin %s: %s is not one of the images", s, name)}
		}
		if was, ok := p[ref]; ok && was != h {
			return nil, InvalidError{fmt.Errorf("--pin: %s is pinned to both %s and %s", name, was, h)}
		}
		p[ref] = h
	}
	return p, nil
}

// errPinned is the error of a name that leads to another block image than the pinned
// one. The registry has answered, so the cached image is not served instead.
var errPinned = errors.New("the block image is not the pinned one")

// check fails if ref is pinned to another digest.
func (p Pins) check(ref registry.Ref, digest v1.Hash) error {
	if pin, ok := p.Of(ref); ok && digest != pin {
		return fmt.Errorf("%w: %s has the block image %s, and %s is pinned", errPinned, ref, digest, pin)
	}
	return nil
}

// AbsoluteImage is a reference that means the same in any working directory.
func AbsoluteImage(name string) (string, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return "", InvalidError{err}
	}
	if ref.Layout == "" {
		return name, nil
	}
	return canonical(ref).String(), nil
}
