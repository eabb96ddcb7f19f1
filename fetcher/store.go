package fetcher

import (
	"errors"
	"fmt"
	"time"

	"thaw/blockmap"
)

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
