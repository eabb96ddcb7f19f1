package flatten

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// far is a target that answers after a round trip. It counts the operations in flight.
type far struct {
	*dirTarget
	now, most atomic.Int64
}

const roundTrip = time.Second

func (f *far) trip() func() {
	n := f.now.Add(1)
	for most := f.most.Load(); n > most && !f.most.CompareAndSwap(most, n); most = f.most.Load() {
	}
	time.Sleep(roundTrip)
	return func() { f.now.Add(-1) }
}

func (f *far) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) {
	defer f.trip()()
	return f.dirTarget.HasBlob(ctx, d)
}

func (f *far) Blob(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	defer f.trip()()
	return f.dirTarget.Blob(ctx, d)
}

func (f *far) PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(int64)) error {
	defer f.trip()()
	return f.dirTarget.PushFile(ctx, d, path, progress)
}

func (f *far) PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error {
	defer f.trip()()
	return f.dirTarget.PushBytes(ctx, d, b)
}

func (f *far) Tagged(ctx context.Context, tag string) ([]byte, error) {
	defer f.trip()()
	return f.dirTarget.Tagged(ctx, tag)
}

func (f *far) PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error {
	defer f.trip()()
	return f.dirTarget.PushManifest(ctx, d, raw, tag)
}

func (f *far) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	defer f.trip()()
	return f.dirTarget.OpenRange(ctx, blob, off, n)
}

// manySmallLayers is an image of n layers, which take a round trip to open.
func manySmallLayers(t testing.TB, n int) *testSource {
	t.Helper()
	var tars [][]byte
	for i := range n {
		tars = append(tars, tarball(t, reg(fmt.Sprint("f", i), noise(uint64(i), 5000))))
	}
	src := newSource(t, gzipped, tars...)
	for i := range src.Layers {
		open := src.Layers[i].Open
		src.Layers[i].Open = func(ctx context.Context) (io.ReadCloser, error) {
			time.Sleep(roundTrip)
			return open(ctx)
		}
	}
	return src
}

// A build takes the same number of round trips for any number of layers. Time is
// virtual here, and only round trips take any.
func TestRoundTrips(t *testing.T) {
	o := testOptions
	o.Jobs, o.Tag = 2, "tag"
	trips := func(layers int, dst *far, src *testSource) int {
		var took time.Duration
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			o := o
			o.TempDir = t.TempDir()
			if _, err := Build(t.Context(), &src.Source, dst, o); err != nil {
				t.Fatal(err)
			}
			took = time.Since(began)
		})
		return int(took / roundTrip)
	}
	few, many := manySmallLayers(t, 3), manySmallLayers(t, 120)
	dstFew, dstMany := &far{dirTarget: newTarget(t)}, &far{dirTarget: newTarget(t)}
	for _, what := range []string{"first", "again"} {
		a, b := trips(3, dstFew, few), trips(120, dstMany, many)
		t.Logf("%s: %d round trips with 3 layers, %d with 120", what, a, b)
		if b > a+3 {
			t.Errorf("%s: %d round trips with 3 layers, %d with 120", what, a, b)
		}
	}
	if n := dstMany.most.Load(); n > DefaultRequests {
		t.Errorf("%d operations in flight", n)
	}
	o.Requests = 5
	dst := &far{dirTarget: newTarget(t)}
	trips(120, dst, many)
	if n := dst.most.Load(); n != 5 {
		t.Errorf("%d operations in flight, and 5 are allowed", n)
	}
}
