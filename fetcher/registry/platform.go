package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// look reads the manifest of an entry that names no platform. It returns the platform in the
// config of an image, or the bytes of an index; neither for anything else.
type look func(ctx context.Context, d v1.Descriptor) (p *v1.Platform, index []byte, err error)

// maxPlatformLooks bounds the entries of an index whose manifests are read, at two requests
// each.
const maxPlatformLooks = 16

// pick chooses the image of an index for a platform, by the rules of containerd's
// platforms.Only: see [preferences]. Of several equally good ones it takes the first. A nil
// platform is enough for an index of one image, and such an image need not have a platform.
func pick(ctx context.Context, raw []byte, platform *v1.Platform, look look) (v1.Descriptor, error) {
	entries, _, err := parseLayoutIndex(raw)
	if err != nil {
		return v1.Descriptor{}, err
	}
	entries = slices.DeleteFunc(entries, func(d v1.Descriptor) bool { return !offersImage(d) })
	switch {
	case len(entries) == 0:
		return v1.Descriptor{}, fmt.Errorf("%w: the index has no image", ErrNotFound)
	case len(entries) == 1 && (platform == nil || !says(entries[0].Platform)):
		return entries[0], nil
	}
	c := choice{want: preferences(platform)}
	c.best = len(c.want)
	// Entries without a platform cost requests, so they are not read if another entry has
	// the first preference.
	var unsaid []v1.Descriptor
	for _, d := range entries {
		if says(d.Platform) {
			c.offer(d, *d.Platform)
		} else {
			unsaid = append(unsaid, d)
		}
	}
	for looks := 0; len(unsaid) > 0 && looks < maxPlatformLooks && c.best > 0; looks++ {
		d := unsaid[0]
		unsaid = unsaid[1:]
		p, index, err := look(ctx, d)
		switch {
		case errors.Is(err, ErrNotFound):
		case err != nil:
			return v1.Descriptor{}, fmt.Errorf("find the platform of manifest %s: %w", d.Digest, err)
		case p != nil:
			c.offer(d, *p)
		case index != nil:
			nested, _, err := parseLayoutIndex(index)
			if err != nil {
				continue
			}
			for _, d := range nested {
				if !offersImage(d) {
					continue
				}
				if says(d.Platform) {
					c.offer(d, *d.Platform)
				} else {
					unsaid = append(unsaid, d)
				}
			}
		}
	}
	if c.best < len(c.want) {
		return c.found, nil
	}
	list := c.list()
	if len(unsaid) > 0 {
		list += fmt.Sprintf(", and %d without a platform, whose manifests were not read", len(unsaid))
	}
	if len(c.there) == 0 && platform != nil {
		return v1.Descriptor{}, fmt.Errorf("%w: no image for %s: none of the %d entries of the index is known to be one", ErrNotFound, platform, len(entries))
	}
	if platform == nil {
		return v1.Descriptor{}, fmt.Errorf("there are several images, choose a platform: %s", list)
	}
	return v1.Descriptor{}, fmt.Errorf("%w: no image for %s, there are: %s", ErrNotFound, platform, list)
}

// choice is the best of the images that were offered so far.
type choice struct {
	want  []v1.Platform
	best  int // position in want
	found v1.Descriptor
	there []string
}

func (c *choice) offer(d v1.Descriptor, p v1.Platform) {
	c.there = append(c.there, p.String())
	p = normal(p)
	for i, w := range c.want[:c.best] {
		if p.OS == w.OS && p.Architecture == w.Architecture && p.Variant == w.Variant {
			c.best, c.found = i, d
			return
		}
	}
}

// maxListed bounds the names in an error.
const maxListed = 20

func (c *choice) list() string {
	slices.Sort(c.there)
	return joined(slices.Compact(c.there))
}

// joined joins names for an error.
func joined(names []string) string {
	if n := len(names) - maxListed; n > 0 {
		return strings.Join(names[:maxListed], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ")
}

// offersImage says whether an entry of an index can be an image, or an index
// of images. Attestations and other artifacts lie beside the images.
func offersImage(d v1.Descriptor) bool {
	if checkDescriptor(d) != nil || !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
		return false
	}
	if d.ArtifactType != "" && !isImageConfig(types.MediaType(d.ArtifactType)) {
		return false
	}
	return d.Platform == nil || d.Platform.OS != "unknown" && d.Platform.Architecture != "unknown"
}

// isImageConfig says whether t is the type of a container image's config. Some
// registries report it as the artifact type of an image.
func isImageConfig(t types.MediaType) bool {
	return t == types.OCIConfigJSON || t == types.DockerConfigJSON
}

// says says whether p is a platform; some tools write an empty one for none.
func says(p *v1.Platform) bool { return p != nil && p.OS != "" && p.Architecture != "" }

// preferences are the platforms whose images run on p, the best first: the same architecture
// from p's variant down, then others that its processors run: 386 on amd64, arm on arm64.
// Versions and features of the operating system are ignored.
func preferences(p *v1.Platform) []v1.Platform {
	if p == nil {
		return nil
	}
	n := normal(*p)
	return sameOS(n.OS, n.Architecture, variantsBelow(n.Architecture, n.Variant))
}

func sameOS(os, arch string, variants []string) []v1.Platform {
	var l []v1.Platform
	add := func(arch string, variants []string) {
		for _, v := range variants {
			l = append(l, normal(v1.Platform{OS: os, Architecture: arch, Variant: v}))
		}
	}
	add(arch, variants)
	switch arch {
	case "amd64":
		add("386", []string{""})
	case "arm64":
		add("arm", variantsBelow("arm", "v8"))
	}
	return l
}

// variantsBelow lists the variants of an architecture that a processor of variant runs, from
// that one down.
func variantsBelow(arch, variant string) []string {
	l := []string{variant}
	major, minor, ok := parseVariant(variant)
	switch {
	case arch == "amd64" && ok:
		for major--; major >= 1; major-- {
			l = append(l, "v"+strconv.Itoa(major))
		}
	case arch == "arm" && ok:
		for major--; major >= 5; major-- {
			l = append(l, "v"+strconv.Itoa(major))
		}
	case arch == "arm64":
		if variant == "" {
			major, minor, ok = 8, 0, true
		}
		if !ok || major < 8 || major > 9 {
			break
		}
		below := func(major, from int) {
			for m := from; m >= 0; m-- {
				v := "v" + strconv.Itoa(major)
				if m > 0 {
					v += "." + strconv.Itoa(m)
				}
				l = append(l, v)
			}
		}
		below(major, minor-1)
		if major == 9 {
			below(8, minor+5) // Armv9.x is a superset of Armv8.(x+5)
		}
	}
	return l
}

// parseVariant reads variants such as v8 and v8.1.
func parseVariant(s string) (major, minor int, ok bool) {
	s, ok = strings.CutPrefix(s, "v")
	a, b, dot := strings.Cut(s, ".")
	major, err := strconv.Atoi(a)
	if !ok || err != nil || major < 0 || major > 99 {
		return 0, 0, false
	}
	if dot {
		if minor, err = strconv.Atoi(b); err != nil || minor < 0 || minor > 99 {
			return 0, 0, false
		}
	}
	return major, minor, true
}

// normal is the canonical form of a platform, for comparisons: with Go's names instead of
// uname's, and without default variants, except for arm, whose default is v7.
func normal(p v1.Platform) v1.Platform {
	os, arch, variant := strings.ToLower(p.OS), strings.ToLower(p.Architecture), strings.ToLower(p.Variant)
	if variant != "" && strings.Trim(variant, "0123456789.") == "" {
		variant = "v" + variant
	}
	switch arch {
	case "i386":
		arch, variant = "386", ""
	case "x86_64", "x86-64":
		arch = "amd64"
	case "aarch64":
		arch = "arm64"
	case "armhf":
		arch, variant = "arm", "v7"
	case "armel":
		arch, variant = "arm", "v6"
	}
	switch {
	case arch == "amd64" && variant == "v1", arch == "arm64" && (variant == "v8" || variant == "v8.0"):
		variant = ""
	case arch == "arm64" && variant == "v9.0":
		variant = "v9"
	case arch == "arm" && variant == "":
		variant = "v7"
	}
	if os == "macos" {
		os = "darwin"
	}
	return v1.Platform{OS: os, Architecture: arch, Variant: variant}
}

// lookAt is a [look] at r.
func (r *Repo) lookAt(ctx context.Context, d v1.Descriptor) (*v1.Platform, []byte, error) {
	raw, got, err := r.lookup(ctx, r.ref.WithDigest(d.Digest))
	if err != nil {
		return nil, nil, err
	}
	if got.MediaType.IsIndex() {
		return nil, raw, nil
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || !isImage(&m) || m.Config.Size > maxManifest {
		return nil, nil, nil
	}
	b, err := r.Blob(ctx, m.Config)
	if err != nil {
		return nil, nil, err
	}
	// Only these fields, so that an error in another one does not matter.
	var c struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
	}
	p := &v1.Platform{}
	if json.Unmarshal(b, &c) == nil {
		p = &v1.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
	}
	if !says(p) {
		return nil, nil, nil
	}
	return p, nil, nil
}

// isImage says whether a manifest is that of a container image.
func isImage(m *v1.Manifest) bool {
	return isImageConfig(m.Config.MediaType) && (m.ArtifactType == "" || isImageConfig(types.MediaType(m.ArtifactType)))
}
