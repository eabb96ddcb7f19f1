package fetcher

import (
	"log/slog"
	"time"
)

// Options are the settings of a Fetcher. Zero values mean what is said here.
type Options struct {
	// What one origin's requests have at most. Several origins share twice as
	// much, and each may have as much as is left.
	MaxRequests int   // in flight at once; 64
	MaxBytes    int64 // in flight, compressed and not; 128 MiB

	MaxRequest    int64         // compressed bytes of a request for several chunks; 4 MiB
	PrefetchShare float64       // of both bounds, at most this much for prefetches; 0.5
	RetryFor      time.Duration // how long a chunk is tried before its readers get the error; 30 s
	Backoff       time.Duration // before the second try, doubled each time up to 2 s; 50 ms
	Log           *slog.Logger  // silent if nil

	// Decoders is the number of threads of low priority that decompress what
	// nobody waits for; GOMAXPROCS if zero. Where something else is served
	// meanwhile that is urgent, GOMAXPROCS is better larger than this.
	Decoders int

	// Temporary says whether an origin's error may pass, RetryAfter how long
	// the origin asked to be left alone for. Nil: every error may, at once.
	Temporary  func(error) bool
	RetryAfter func(error) time.Duration
}
