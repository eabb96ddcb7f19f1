package fetcher

import (
	"log/slog"
	"time"
)

// Options are the settings of a Fetcher. Each field says what zero means.
type Options struct {
	// MaxRequests and MaxBytes bound the requests of one origin that are in flight at
	// once. MaxRequests bounds their number and defaults to 64. MaxBytes bounds the
	// memory that they take, compressed and decompressed, and defaults to 128 MiB. All
	// origins together may use twice as much, and one origin may use as much as it
	// leaves free for the others.
	MaxRequests int
	MaxBytes    int64
	// MaxRequest bounds the compressed bytes of a request for several chunks. It
	// defaults to 4 MiB.
	MaxRequest int64
	// PrefetchShare is the part of MaxRequests and MaxBytes, from 0 to 1, that
	// prefetches may use. It defaults to 0.5.
	PrefetchShare float64
	// RetryFor is how long a chunk is tried before its readers get the error. It
	// defaults to 30 s. Backoff is the pause before the second try. It defaults to 50
	// ms, and doubles with each try, up to 2 s.
	RetryFor, Backoff time.Duration
	// Log gets warnings and errors; nil for none.
	Log *slog.Logger

	// Decoders is the number of low-priority threads that decompress prefetched chunks.
	// It defaults to GOMAXPROCS. A process that answers requests meanwhile should have
	// a GOMAXPROCS larger than this.
	Decoders int

	// Temporary reports whether a request that failed with the error may succeed later;
	// if nil, every request may. RetryAfter returns the pause that the origin asked
	// for; if nil, there is none.
	Temporary  func(error) bool
	RetryAfter func(error) time.Duration
}
