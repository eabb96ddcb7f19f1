package fetcher

import (
	"errors"
	"fmt"
	"time"

	"thaw/blockmap"
)

// Every chunk that comes from a source goes through this file, whether a demand, a
// prefetch, an extra request or a bundle asked for it. It is decompressed once, and the
// cache verifies it before it stores it or holds it in memory.

// frame is the content of a chunk: compressed, and also decompressed once that is
// needed.
type frame struct {
	f       *Fetcher
	stored  []byte // as it arrived
	content []byte // in buf, or in stored if it came uncompressed; nil until it is decompressed
	buf     *[]byte
	// arriving, if not nil, has verified content while it arrived.
	arriving *blockmap.Arriving
}

// decompress sets content, unless it is set already.
func (fr *frame) decompress(c *blockmap.Chunk) (err error) {
	if fr.content != nil {
		return nil
	}
	if fr.buf == nil {
		fr.buf = fr.f.buffer(c.Size())
	}
	fr.content, err = fr.f.chunkDecoder.Decompress(c, fr.stored, *fr.buf)
	return err
}

// release returns the memory of content.
func (fr *frame) release() {
	if fr.buf != nil {
		fr.f.buffers.Put(fr.buf)
		fr.buf, fr.content = nil, nil
	}
}

// keep makes the chunk w resident from a frame. It stores what is absent of the chunk in
// the cache. If the cache has no room or its disk fails, and a reader waits for the chunk,
// keep holds it in memory. It calls decompressed when only the disk is left to wait for. It
// fails with ErrDigest if the frame holds other content, and otherwise with a storeError.
func (f *Fetcher) keep(w blockmap.Want, fr *frame, decompressed func()) error {
	err := fr.decompress(&w.Table.Chunks[w.Chunk])
	decompressed()
	if err != nil {
		return err
	}
	if a := fr.arriving; a != nil {
		return f.store(key{w.Stream, w.Chunk},
			func() error { return w.Stream.FillArrived(w.Chunk, a) },
			func() error { return w.Stream.HoldArrived(w.Chunk, a) })
	}
	return f.store(key{w.Stream, w.Chunk},
		func() error { return w.Stream.Fill(w.Chunk, fr.content) },
		func() error { return w.Stream.Hold(w.Chunk, fr.content) })
}

// keepLeaves is keep for a part of a bundle.
func (f *Fetcher) keepLeaves(w blockmap.Want, p *Part, content []byte) error {
	if p.List == nil {
		return f.store(key{w.Stream, w.Chunk},
			func() error { return w.Stream.Fill(w.Chunk, content) },
			func() error { return w.Stream.Hold(w.Chunk, content) })
	}
	return f.store(key{w.Stream, w.Chunk},
		func() error { return w.Stream.FillLeaves(w.Chunk, p.List, p.Leaf, p.Count, content) },
		func() error { return w.Stream.HoldLeaves(w.Chunk, p.List, p.Leaf, p.Count, content) })
}

// store calls fill, which stores a chunk or leaves of it. If that fails and a reader waits
// for the chunk, it calls hold.
func (f *Fetcher) store(k key, fill, hold func() error) error {
	for try := 0; ; try++ {
		err := fill()
		if err == nil {
			f.unstored.Store(0)
			return nil
		}
		if errors.Is(err, blockmap.ErrDigest) {
			return err
		}
		if f.isDemanded(k) {
			held := hold()
			if held == nil {
				f.held.Add(1)
				f.warnings.Do(func() {
					f.log.Warn("the cache cannot store chunks; thaw answers reads from memory", "stream", k.stream.ID().String(), "err", err)
				})
				return nil
			}
			err = fmt.Errorf("%w; nor can it be held in memory: %w", err, held)
		}
		// Readers may use the other chunks only for a short time; then the cache has
		// room.
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

const (
	// storeTries bounds how often the cache is asked to store a chunk.
	storeTries = 3
	// warnEvery is how often the same warning is repeated.
	warnEvery = 10 * time.Second
)

// isDemanded reports whether a reader waits for a chunk.
func (f *Fetcher) isDemanded(k key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ft := f.mu.fetches[k]
	return ft != nil && ft.demand
}

// storeError says that the right chunk arrived, but that the cache could not store it.
type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }

// buffer returns n bytes. The caller puts them back into f.buffers.
func (f *Fetcher) buffer(n int) *[]byte {
	p, _ := f.buffers.Get().(*[]byte)
	if p == nil || cap(*p) < n {
		b := make([]byte, n)
		p = &b
	}
	*p = (*p)[:n]
	return p
}
