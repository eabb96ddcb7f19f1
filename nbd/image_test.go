package nbd

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// cached is an image in a cache on disk, with the parts that tests damage.
type cached struct {
	*blockmap.Image
	content []byte
	dir     string
	from    *source
}

const cachedChunk = 1 << 20

// parts returns the content of this many chunks, and the table of their stream. It is
// made once for each number.
var parts = func() func(t testing.TB, chunks int) ([][]byte, blockmap.Table) {
	type made struct {
		parts [][]byte
		table blockmap.Table
	}
	var mu sync.Mutex
	all := make(map[int]made)
	return func(t testing.TB, chunks int) ([][]byte, blockmap.Table) {
		mu.Lock()
		defer mu.Unlock()
		m, ok := all[chunks]
		if !ok {
			rng := rand.NewChaCha8([32]byte{1})
			for range chunks {
				p := make([]byte, cachedChunk)
				rng.Read(p)
				m.parts = append(m.parts, bytes.ReplaceAll(p, []byte{0}, []byte{1})) // zeros are what goes wrong
			}
			table, _ := blocktest.Stream(t, m.parts)
			m.table = *table
			all[chunks] = m
		}
		return m.parts, m.table
	}
}()

// newCached makes an image of this many chunks of 1 MiB, in a cache with that quota.
// Every third chunk has a hole in its middle. No chunk is resident.
func newCached(t testing.TB, chunks int, quota int64) *cached {
	t.Helper()
	parts, table := parts(t, chunks)
	ix := &blockmap.Index{Streams: []blockmap.Table{table}}
	const blocks = cachedChunk / blockmap.BlockSize
	c := &cached{dir: t.TempDir()}
	for i, p := range parts {
		first := uint32(i * blocks)
		if i%3 == 2 {
			ix.Runs = append(ix.Runs,
				blockmap.Run{Device: ix.Blocks, Block: first, Count: blocks / 2},
				blockmap.Run{Device: ix.Blocks + blocks/2 + 16, Block: first + blocks/2, Count: blocks / 2})
			ix.Blocks += blocks + 16
			c.content = append(c.content, p[:cachedChunk/2]...)
			c.content = append(c.content, make([]byte, 16*blockmap.BlockSize)...)
			c.content = append(c.content, p[cachedChunk/2:]...)
		} else {
			ix.Runs = append(ix.Runs, blockmap.Run{Device: ix.Blocks, Block: first, Count: blocks})
			ix.Blocks += blocks
			c.content = append(c.content, p...)
		}
	}
	if err := ix.Seal(); err != nil {
		t.Fatal(err)
	}
	cache, err := blockmap.OpenCache(c.dir, blockmap.CacheOptions{Quota: quota})
	if err != nil {
		t.Fatal(err)
	}
	c.from = &source{chunks: parts}
	c.from.mu.times = make(map[int]int)
	if c.Image, err = blockmap.NewImage(ix, cache, c.from); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Image.Close()
		if err := cache.Close(); err != nil {
			t.Errorf("close the cache: %v", err) // views are held
		}
	})
	return c
}

// warm makes the whole image resident.
func (c *cached) warm(t testing.TB) {
	t.Helper()
	if err := c.Fault(t.Context(), blockmap.Range(0, c.Size())); err != nil {
		t.Fatal(err)
	}
}

// cut truncates the stream's file to n bytes.
func (c *cached) cut(t testing.TB, n int64) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(c.dir, "streams", "*", "data"))
	if len(files) != 1 {
		t.Fatalf("the streams of the cache are %q", files)
	}
	if err := os.Truncate(files[0], n); err != nil {
		t.Fatal(err)
	}
}

// source fetches chunks from memory.
type source struct {
	chunks [][]byte
	mu     struct {
		sync.Mutex
		first int           // chunk whose fetch waits for others
		await int           // how many wait for each other
		all   chan struct{} // closed once that many are under way
		now   int           // fetches under way; most is their largest number
		most  int
		times map[int]int // that each chunk was fetched
	}
}

var errAway = errors.New("fetch from registry.test: connection refused")

// gather has later fetches of the chunks from first on wait until n are under way, or for a
// long time.
func (s *source) gather(first, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.first, s.mu.await, s.mu.all = first, n, make(chan struct{})
}

// most returns the largest number of fetches of one chunk, and the number of all
// fetches.
func (s *source) most() (most, all int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.mu.times {
		most, all = max(most, n), all+n
	}
	return most, all
}

// atOnce returns the largest number of concurrent fetches since the last call.
func (s *source) atOnce() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.mu.most
	s.mu.most = 0
	return n
}

func (s *source) Prefetch([]blockmap.Want) {}

// Fetch fetches all of wants, up to 4 at once.
func (s *source) Fetch(ctx context.Context, wants []blockmap.Want) error {
	room := make(chan struct{}, 4)
	errs := make([]error, len(wants))
	var wg sync.WaitGroup
	for i, w := range wants {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			errs[i] = s.fetch(w)
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

func (s *source) fetch(w blockmap.Want) error {
	s.mu.Lock()
	s.mu.times[w.Chunk]++
	s.mu.now++
	s.mu.most = max(s.mu.most, s.mu.now)
	all := s.mu.all
	if w.Chunk < s.mu.first {
		all = nil
	} else if s.mu.now == s.mu.await {
		s.mu.await = 0
		close(all)
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.mu.now--
		s.mu.Unlock()
	}()
	if all != nil {
		select {
		case <-all:
		case <-time.After(30 * time.Second):
		}
	}
	// All chunks may be pinned for a short time.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		err := w.Stream.Fill(w.Chunk, s.chunks[w.Chunk])
		if !errors.Is(err, blockmap.ErrNoSpace) || time.Now().After(end) {
			return err
		}
	}
}
