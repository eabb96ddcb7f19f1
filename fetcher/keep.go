package fetcher

import (
	"errors"
	"fmt"
	"time"

	"thaw/blockmap"
)

// keep decompresses a chunk, and stores it if it is what it should be.
func (f *Fetcher) keep(r *request, ft *fetch, stored []byte, decoded func()) error {
	size := r.place.table.Chunks[ft.key.chunk].Size()
	buf := f.buffer(size)
	defer f.buffers.Put(buf)
	content, err := f.zstd.DecodeAll(stored, (*buf)[:0:size])
	decoded()
	if err != nil {
		return fmt.Errorf("%w: %w", blockmap.ErrDigest, err)
	}
	return f.store(ft.stream, ft.key.chunk, content, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return ft.demand && ft.state != ended
	})
}

// keepPart stores a part wherever it is wanted, and wakes who waits for it.
func (f *Fetcher) keepPart(p Part, frame []byte) error {
	var content []byte
	for _, w := range p.Wants {
		if !w.Stream.Has(w.Chunk) {
			if content == nil { // else somebody could not wait, and has fetched it
				size := w.Table.Chunks[w.Chunk].Size()
				buf := f.buffer(size)
				defer f.buffers.Put(buf)
				var err error
				if content, err = f.zstd.DecodeAll(frame, (*buf)[:0:size]); err != nil {
					f.wrong.Add(1)
					return fmt.Errorf("%w: %w", blockmap.ErrDigest, err)
				}
			}
			if err := f.store(w.Stream, w.Chunk, content, func() bool { return f.isDemanded(key{w.Stream, w.Chunk}) }); err != nil {
				if errors.Is(err, blockmap.ErrDigest) {
					f.wrong.Add(1)
				}
				f.fetchAlone(key{w.Stream, w.Chunk})
				return err
			}
			f.chunks.Add(1)
		}
		f.mu.Lock()
		if ft := f.mu.fetches[key{w.Stream, w.Chunk}]; ft != nil {
			f.end(ft, nil)
			f.dispatch()
		}
		f.mu.Unlock()
	}
	return nil
}

// storeError says that a chunk came and was what it should be, but that it could
// not be kept.
type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }

func (e *storeError) Unwrap() error { return e.err }

// store keeps content as chunk i of a stream: in the cache or, where that has no
// room or its disk fails and somebody waits for the chunk, in memory. It fails
// with ErrDigest where it is something else, and with a storeError.
func (f *Fetcher) store(s *blockmap.Stream, i int, content []byte, read func() bool) error {
	for try := 0; ; try++ {
		err := s.Fill(i, content)
		if err == nil {
			f.unstored.Store(0)
			return nil
		}
		if errors.Is(err, blockmap.ErrDigest) {
			return err
		}
		if read() {
			held := s.Hold(i, content)
			if held == nil {
				f.held.Add(1)
				f.warnings.Do(func() {
					f.log.Warn("the cache cannot store chunks; thaw answers reads from memory", "stream", s.ID().String(), "err", err)
				})
				return nil
			}
			err = fmt.Errorf("%w; nor can it be held in memory: %w", err, held)
		}
		// What takes the room may be in use by others, and not for long.
		if try == storeTries-1 || !errors.Is(err, blockmap.ErrNoSpace) || f.unstored.Add(1) > maxRefusals {
			return &storeError{err}
		}
		t := time.NewTimer(f.o.Backoff << try)
		select {
		case <-t.C:
		case <-f.ctx.Done():
			t.Stop()
			return &storeError{err}
		}
	}
}

// storeTries bounds how often a place is looked for for a chunk that is here.
const storeTries = 3

// warnEvery is how often the same warning is repeated.
const warnEvery = 10 * time.Second

// isDemanded says whether somebody waits for a chunk.
func (f *Fetcher) isDemanded(k key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ft := f.mu.fetches[k]
	return ft != nil && ft.demand
}
