package fetcher

import (
	"log/slog"
	"time"
)

// Options are the settings of a Fetcher. Each field says what zero means.
type Options struct {
	// MaxRequests and MaxBytes bound the requests of one origin that are in flight at
	// once: their number, by default 64, and the bytes that they take in memory,
	// compressed and decompressed, by default 128 MiB. All origins together have twice
	// as much, and one origin may have as much as it leaves free for the others.
	MaxRequests int
	MaxBytes    int64
	// MaxRequest bounds the compressed bytes of a request for several chunks; 4 MiB by
	// default.
	MaxRequest int64
	// PrefetchShare is the part of MaxRequests and MaxBytes, from 0 to 1, that
	// prefetches may use; 0.5 by default.
	PrefetchShare float64
	// RetryFor is how long a chunk is tried before its readers get the error; 30 s by
	// default. Backoff is the pause before the second try; it doubles with each try, up
	// to 2 s, and is 50 ms by default.
	RetryFor, Backoff time.Duration
	// Log gets warnings and errors; nil for none.
	Log *slog.Logger

	// Decoders is the number of low-priority threads that decompress prefetched chunks;
	// GOMAXPROCS by default. A process that answers requests meanwhile should have a
	// GOMAXPROCS larger than this.
	Decoders int

	// Temporary says whether a request that failed with the error may succeed later;
	// if nil, all may. RetryAfter returns the pause that the origin asked for; if nil,
	// none.
	Temporary  func(error) bool
	RetryAfter func(error) time.Duration
}
