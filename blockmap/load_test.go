package blockmap_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// gatheringFS has those who open the table of a stream wait for each other, until one of them
// has waited for long.
type gatheringFS struct {
	blockmap.FS
	mu      sync.Mutex
	waiting int
	enough  chan struct{}
	alone   chan struct{}
	once    sync.Once
}

const together = 8

func (g *gatheringFS) Open(path string, create bool) (blockmap.File, error) {
	if strings.HasSuffix(path, "/table") && !create {
		g.mu.Lock()
		if g.waiting++; g.waiting == together {
			close(g.enough)
		}
		g.mu.Unlock()
		select {
		case <-g.enough:
		case <-g.alone:
		case <-time.After(30 * time.Second):
			g.once.Do(func() { close(g.alone) })
		}
		g.mu.Lock()
		if g.waiting < together {
			g.waiting--
		}
		g.mu.Unlock()
	}
	return g.FS.Open(path, create)
}

// A cache reads what an earlier process left of many streams side by side: on a cold disk
// each file is a wait.
func TestStreamsLoadSideBySide(t *testing.T) {
	ix := &blockmap.Index{}
	blobs := make(map[blockmap.Digest][]byte)
	var want []byte
	const streams = 40
	for i := range uint32(streams) {
		content := bytes.Repeat([]byte{byte(i + 1)}, blockmap.BlockSize)
		table, blob := blocktest.Stream(t, [][]byte{content})
		blobs[table.Blob] = blob
		ix.Streams = append(ix.Streams, *table)
		ix.Runs = append(ix.Runs, blockmap.Run{Device: i, Stream: i, Count: 1})
		want = append(want, content...)
	}
	ix.Blocks = streams
	must(t, ix.Seal())
	m := &blocktest.Image{Index: ix, Blobs: blobs, Content: want}
	dir := t.TempDir()
	o := blockmap.CacheOptions{Boot: blockmap.BootID{1}}
	c, image, _ := openImage(t, dir, m, o)
	readAll(t, image, m)
	image.Close()
	must(t, c.Close())
	g := &gatheringFS{FS: blockmap.OS, enough: make(chan struct{}), alone: make(chan struct{})}
	o.FS = g
	c, image, _ = openImage(t, dir, m, o)
	select {
	case <-g.enough:
	default:
		t.Errorf("fewer than %d streams are read at once", together)
	}
	if s := image.Status(blockmap.Range(image.Size()-blockmap.BlockSize, blockmap.BlockSize)); !s.Resident {
		t.Errorf("after a restart: %+v", s)
	}
	readAll(t, image, m)
	must(t, c.Close())
}
