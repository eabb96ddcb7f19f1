package flatten

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"
	"testing"
	"testing/iotest"
)

// varied is an image of several layers with files of all sizes.
func varied(t testing.TB) *testSource {
	t.Helper()
	var tars [][]byte
	for i := range uint64(4) {
		l := []line{dir("d"), symlink(fmt.Sprint("s", i), "d")}
		for j := range uint64(120) {
			l = append(l, reg(fmt.Sprintf("d/%d-%d", i, j), noise(i*1000+j, int(j*j%50_000))).
				with(pax("SCHILY.xattr.user.a", "1")).with(pax("SCHILY.xattr.user.b", "2")).with(pax("SCHILY.xattr.user.c", "3")))
		}
		l = append(l, reg(fmt.Sprint("large", i), noise(i, 1_500_000)), hardlink(fmt.Sprint("h", i), "d/0-7"), whiteout(fmt.Sprintf("d/%d-3", i-1)))
		tars = append(tars, tarball(t, l...))
	}
	return newSource(t, gzipped, tars...)
}

// TestSameBytes builds an image in several ways.
func TestSameBytes(t *testing.T) {
	src := varied(t)
	o := testOptions
	o.Jobs, o.Level = 4, DefaultLevel
	dst := newTarget(t)
	want := build(t, src, dst, o)
	check := func(name string, res *Result) {
		t.Helper()
		if res.Manifest.Digest != want.Manifest.Digest {
			t.Errorf("%s: manifest\n%s\n want\n%s", name, res.Raw, want.Raw)
		}
	}
	src.opened.Store(0)
	again := build(t, src, dst, o)
	check("reusing layers", again)
	if n := src.opened.Load(); n != 0 {
		t.Errorf("%d layers were opened", n)
	}
	for i, l := range again.Layers {
		if !l.Reused || want.Layers[i].Reused {
			t.Errorf("layer %d: reused %v, and %v at first", i, l.Reused, want.Layers[i].Reused)
		}
	}

	procs := runtime.GOMAXPROCS(1)
	defer runtime.GOMAXPROCS(procs)
	alone := o
	alone.Jobs, alone.TempDir = 1, t.TempDir()
	check("one processor", build(t, src, newTarget(t), alone))
	runtime.GOMAXPROCS(7)
	check("seven processors", build(t, src, newTarget(t), o))

	// The same tars, stored otherwise and read in small pieces: all but the
	// subject is the same.
	other := newSource(t, zstdded, src.tars...)
	other.Manifest = src.Manifest
	for i := range other.Layers {
		open := other.Layers[i].Open
		other.Layers[i].Open = func(ctx context.Context) (io.ReadCloser, error) {
			r, err := open(ctx)
			return io.NopCloser(iotest.DataErrReader(iotest.HalfReader(r))), err
		}
	}
	check("zstd in small pieces", build(t, other, newTarget(t), o))

	// Half of the layers are there.
	half := newTarget(t)
	lower := newSource(t, gzipped, src.tars[:2]...)
	build(t, lower, half, o)
	src.opened.Store(0)
	check("on a base that is there", build(t, src, half, o))
	if n := src.opened.Load(); n != 2 {
		t.Errorf("%d layers were opened, want 2", n)
	}
}

// TestOtherBytes changes what a build is a function of.
func TestOtherBytes(t *testing.T) {
	src := varied(t)
	dst := newTarget(t)
	want := build(t, src, dst, testOptions)
	for name, change := range map[string]func(*Options){
		"size":       func(o *Options) { o.Size = 300 << 20 },
		"chunk size": func(o *Options) { o.ChunkSize = 64 << 10 },
		"level":      func(o *Options) { o.Level = 9 },
	} {
		o := testOptions
		change(&o)
		// In the same target, so that nothing is reused which must not be.
		if res := build(t, src, dst, o); bytes.Equal(res.Raw, want.Raw) {
			t.Errorf("another %s gives the same image", name)
		}
	}
}
