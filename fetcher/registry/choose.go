package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// find returns the manifest with the tag or, without a tag, the only image: block images,
// converted layers and other artifacts do not count then. It returns several only if they
// are images for several platforms.
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
		return images[:1], nil // written by a tool that does not replace tags; other tools take the first as well
	case len(images) == 0:
		return nil, fmt.Errorf("%w: the layout has no image without a tag, %s", ErrNotFound, list)
	}
	return nil, fmt.Errorf("the layout has %d images, choose a tag: %s", len(images), list)
}

// internal says whether a tag is one of thaw's own, which users do not choose.
func internal(tag string) bool {
	return strings.HasPrefix(tag, "thaw-image-") || strings.HasPrefix(tag, "thaw-layer-")
}

// differ says whether of has a value for each entry, all different.
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

// images returns the entries that are images according to their manifests, since an entry
// need not say that it is an artifact. It leaves out manifests that cannot be read if there
// are others.
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
