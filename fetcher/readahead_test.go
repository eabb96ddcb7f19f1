package fetcher_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// long is an image whose stream 1 has n chunks of 4 blocks, which lie on the
// device one behind the other from block 0 on.
func long(t *testing.T, n int) *blocktest.Image {
	t.Helper()
	var chunks [][]byte
	var content []byte
	for i := range n {
		c := make([]byte, 4*blockmap.BlockSize)
		for j := range c {
			c[j] = byte(i + j*(i+7)>>5)
		}
		chunks = append(chunks, c)
		content = append(content, c...)
	}
	meta, metaBlob := blocktest.Stream(t, [][]byte{make([]byte, blockmap.BlockSize)})
	table, blob := blocktest.Stream(t, chunks)
	m := &blocktest.Image{
		Index: &blockmap.Index{Blocks: uint32(4 * n), Streams: []blockmap.Table{*meta, *table}},
		Blobs: map[blockmap.Digest][]byte{meta.Blob: metaBlob, table.Blob: blob}, Content: content,
	}
	m.Index.Runs = []blockmap.Run{{Stream: 1, Count: uint32(4 * n)}}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	return m
}

// ahead demands chunks of stream 1 one after the other, each when the one before and what
// was prefetched with it are resident. It returns those that the reader waited for, and
// those that are resident in the end.
func ahead(t *testing.T, n int, readAhead bool, demands []int) (waited, here []int) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, long(t, n), fetcher.Options{})
		defer w.fetcher.Close()
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		b := w.fetcher.From(w.origin)
		if readAhead {
			b.ReadAhead()
		}
		device, err := blockmap.NewImage(w.Index, w.cache, b)
		if err != nil {
			t.Fatal(err)
		}
		resident := func(c int) bool {
			return device.Status(blockmap.Range(int64(c)*4*blockmap.BlockSize, blockmap.BlockSize)).Resident
		}
		for _, c := range demands {
			if !resident(c) {
				waited = append(waited, c)
			}
			e := blockmap.Range(int64(c)*4*blockmap.BlockSize, blockmap.BlockSize)
			if got, err := blocktest.Read(t.Context(), device, e); err != nil || !slices.Equal(got, w.Content[e.Start:e.End]) {
				t.Fatal("wrong bytes", err)
			}
			time.Sleep(5 * time.Second)
		}
		for c := range n {
			if resident(c) {
				here = append(here, c)
			}
		}
	})
	return waited, here
}

func sequence(from, to int) (s []int) {
	for i := from; i < to; i++ {
		s = append(s, i)
	}
	return s
}

// A reader in sequence waits at ever larger steps; each prediction begins where the last
// one ended.
func TestReadAheadInSequence(t *testing.T) {
	waited, here := ahead(t, 100, true, sequence(20, 60))
	if want := []int{20, 21, 23, 26, 31, 40, 49, 58}; !slices.Equal(waited, want) {
		t.Errorf("a reader in sequence waited for chunks %v, want %v", waited, want)
	}
	if want := sequence(20, 67); !slices.Equal(here, want) {
		t.Errorf("chunks %v were fetched, want %v", here, want)
	}
	if waited, here := ahead(t, 100, false, sequence(20, 60)); !slices.Equal(waited, sequence(20, 60)) || !slices.Equal(here, waited) {
		t.Errorf("without readahead it waited for %v, and %v is resident", waited, here)
	}
}

// Scattered reads cause no prefetches.
func TestReadAheadOfScatteredReads(t *testing.T) {
	demands := []int{90, 10, 50, 70, 30, 0, 99}
	if _, here := ahead(t, 100, true, demands); !slices.Equal(here, slices.Sorted(slices.Values(demands))) {
		t.Errorf("chunks %v were fetched for %v", here, demands)
	}
}

// Reads near each other prefetch the neighbours on both sides.
func TestReadAheadOfNeighbours(t *testing.T) {
	waited, here := ahead(t, 200, true, []int{100, 105, 104, 64, 63, 191, 199})
	if want := []int{100, 105, 64, 63, 191, 199}; !slices.Equal(waited, want) {
		t.Errorf("waited for %v, want %v", waited, want)
	}
	if want := []int{62, 63, 64, 100, 104, 105, 106, 191, 198, 199}; !slices.Equal(here, want) {
		t.Errorf("chunks %v were fetched, want %v", here, want)
	}
}
