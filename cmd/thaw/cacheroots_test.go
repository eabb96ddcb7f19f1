package main

import (
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// The cache knows what an image that was served needs of it.
func TestServeKeepsTheRoot(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	image, err := v1.NewHash(s.ready.Exports[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	s.term()
	c, err := blockmap.OpenCache(cache, blockmap.CacheOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	roots := c.Roots()
	if len(roots) != 1 || roots[0].Image.String() != image.Hex || len(roots[0].Streams) < 2 || len(roots[0].Blobs) != 2 || len(roots[0].Refs) != 1 {
		t.Fatalf("one image was served, %s: roots %+v", image, roots)
	}
	for _, d := range roots[0].Blobs {
		if _, err := c.Blob(d); err != nil {
			t.Errorf("blob %s, which the root holds: %v", d, err)
		}
	}
	if _, err := c.Ref(roots[0].Refs[0]); err != nil {
		t.Errorf("the name %q, which the root holds: %v", roots[0].Refs[0], err)
	}
}
