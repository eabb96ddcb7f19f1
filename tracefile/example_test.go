package tracefile_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"slices"

	"thaw/blockmap"
	"thaw/tracefile"
)

// prefetcher is what a fetcher does ahead of its readers: fetcher.Bound.
type prefetcher interface{ Prefetch([]blockmap.Want) }

// replay has what earlier starts have read fetched ahead of the next one.
func replay(files [][]byte, ix *blockmap.Index, cache *blockmap.Cache, f prefetcher) error {
	var traces []*tracefile.Trace
	for _, b := range files {
		t, err := tracefile.Read(bytes.NewReader(b))
		if err != nil {
			return err
		}
		if t.Cut != nil {
			log.Print(t.Cut) // what lies before that is good
		}
		traces = append(traces, t)
	}
	t, err := tracefile.Merge(traces...)
	if err != nil {
		return err
	}
	plan, err := tracefile.NewPlan(t, ix)
	if err != nil {
		return err // ErrOtherImage: see Translate
	}
	wants, err := plan.Wants(cache.Stream)
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(wants, 256) {
		f.Prefetch(batch)
	}
	return nil
}

// A start is recorded while a transport serves it, and its trace is the plan of
// the next.
func Example() {
	image := &memory{blocks: 1000, resident: 100} // a *blockmap.Image
	image.fault = func(context.Context) error { image.resident = 1000; return nil }
	index := blockmap.Digest{} // tracefile.IndexDigest(image.Index())

	var file bytes.Buffer
	recorder := tracefile.NewRecorder(image, index, &file, tracefile.Options{Bytes: 1 << 30})
	// The transport is given the recorder in place of the image, and reads it so:
	view, err := blockmap.Read(context.Background(), recorder, blockmap.Range(160*blockmap.BlockSize, 64<<10))
	if err != nil {
		fmt.Println(err)
	}
	view.Release()

	if err := recorder.Stop(); err != nil {
		fmt.Println(err)
		return
	}
	t, err := tracefile.Read(&file)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, x := range t.Touches {
		fmt.Println(x.At, x.Extent(), x.Miss)
	}
	// Output: 0s [655360, 720896) true
}
