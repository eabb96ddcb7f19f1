package flatten

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"thaw/blockmap"
)

// packages is a layer of n small files in directories of all sizes.
func packages(t testing.TB, seed uint64, n int) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 2))
	l := []line{dir("usr"), dir("usr/lib")}
	for i := 0; i < n; {
		d := fmt.Sprintf("usr/lib/package-%d-%d", seed, i)
		l = append(l, dir(d))
		for range 1 + r.IntN(1<<r.IntN(8)) {
			l = append(l, reg(fmt.Sprintf("%s/module_%d.py", d, i), "x"))
			i++
		}
		l = append(l, symlink(d+"/latest", "module"))
	}
	return tarball(t, l...)
}

// metadataShare returns how much of the metadata of b is in a.
func metadataShare(a, b *blockmap.Index) float64 {
	has := make(map[blockmap.Digest]bool)
	for _, c := range a.Streams[0].Chunks {
		has[c.Digest] = true
	}
	var shared, all int64
	for _, c := range b.Streams[0].Chunks {
		if all += int64(c.Stored); has[c.Digest] {
			shared += int64(c.Stored)
		}
	}
	return float64(shared) / float64(all)
}

// Versions of an image share the metadata of what they have in common, wherever the
// change is.
func TestVersionsShareMetadata(t *testing.T) {
	base, middle := packages(t, 1, 10_000), packages(t, 2, 2_500)
	app := func(version string) []byte {
		return tarball(t, dir("app"), dir("usr").with(func(h *tar.Header) { h.ModTime = time.Unix(1_700_000_000, 0) }), dir("usr/lib"),
			reg("app/main.py", version+" main"), reg("app/version", version), reg("usr/lib/app.so", version+string(noise(7, 20_000))))
	}
	top := packages(t, 3, 500)
	first := []([]byte){base, middle, app("1"), top}
	o := testOptions
	o.ChunkSize, o.Size = DefaultChunkSize, DefaultSize
	versions := newTarget(t)
	v1 := build(t, newSource(t, gzipped, first...), versions, o).Index
	grown := tarball(t, dir("usr"), dir("usr/lib"), dir("app"), reg("app/main.py", "2"), reg("app/new", "2"), reg("app/version", "2"),
		reg("usr/lib/app.so", "2"), reg("usr/lib/new.so", "2"), dir("usr/lib/new"), reg("usr/lib/new/x", "x"))
	for _, c := range []struct {
		name   string
		layers [][]byte
		share  float64
	}{
		{"the top layer", [][]byte{base, middle, app("1"), tarball(t, reg("other", "x"))}, 0.8},
		{"one more layer", [][]byte{base, middle, app("1"), top, tarball(t, dir("usr"), dir("usr/lib"), reg("usr/lib/one more", "x"))}, 0.8},
		{"a layer below another", [][]byte{base, middle, app("2"), top}, 0.8},
		{"a layer that has grown", [][]byte{base, middle, grown, top}, 0.8},
		{"a file of the base is hidden", [][]byte{base, middle, app("1"), top, tarball(t, whiteout("usr/lib/package-1-0/module_0.py"))}, 0.8},
		{"a directory of the base is hidden", [][]byte{base, middle, app("1"), top, tarball(t, whiteout("usr/lib/package-1-0"))}, 0.8},
		{"no layer above the base", [][]byte{base}, 0.8},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := newSource(t, gzipped, c.layers...)
			res := build(t, src, versions, o) // which verifies it
			if share := metadataShare(v1, res.Index); share < c.share {
				t.Errorf("the versions share %.1f %% of their metadata, want at least %.0f %%", share*100, c.share*100)
			} else {
				t.Logf("%.1f %% shared of %d bytes", share*100, res.Index.Streams[0].BlobSize)
			}
			fsck(t, assemble(t, res.Index, versions))
			if again := build(t, src, newTarget(t), o); again.Manifest.Digest != res.Manifest.Digest {
				t.Error("a build without the other version has other bytes")
			}
		})
	}
}
