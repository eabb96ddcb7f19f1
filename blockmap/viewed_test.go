package blockmap_test

import (
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// A chunk is viewed from the first view on that comes after its last fill.
func TestViewed(t *testing.T) {
	m := blocktest.NewImage(t, 5, 300)
	c, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	table := &m.Index.Streams[1]
	s, err := c.Stream(table)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Release()
	device, err := blockmap.NewImage(m.Index, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	for i := range table.Chunks {
		p := &table.Chunks[i]
		content, err := dec.Decode(p, m.Blobs[table.Blob][p.Offset:p.Offset+int64(p.Stored)], nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Fill(i, content); err != nil {
			t.Fatal(err)
		}
		if s.Viewed(i) {
			t.Errorf("chunk %d was viewed when it was filled", i)
		}
	}
	seen := 0
	for _, r := range m.Index.Runs {
		if r.Stream != 1 {
			continue
		}
		i := table.Find(r.Block)
		v, ok := device.View(blockmap.Range(int64(r.Device)*blockmap.BlockSize, blockmap.BlockSize))
		if !ok {
			t.Fatalf("chunk %d cannot be viewed", i)
		}
		v.Release()
		if seen++; !s.Viewed(i) {
			t.Errorf("chunk %d was not viewed", i)
		}
	}
	if seen == 0 {
		t.Fatal("nothing was viewed")
	}
}
