package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"thaw/blockmap"
	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

// cacheWait is how long a command waits for a process that uses the cache and does not say
// what it is: a server that is almost gone, or another command. Tests lower it.
var cacheWait = 5 * time.Second

// awaitCache calls open, which opens the cache, until no other process uses it. It waits only
// for a process that is about to end, such as the server that thaw mount has started, which
// has the cache for a moment after the last thaw umount. If a server uses it that stays,
// awaitCache fails at once.
func awaitCache(ctx context.Context, log *slog.Logger, cache string, open func() (*host.Host, error)) (*host.Host, error) {
	client, err := control(cache)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	said := false
	var silent time.Time // since when the process does not say what it is; a server that ends does at first
	for began := time.Now(); ; {
		h, err := open()
		if !errors.Is(err, blockmap.ErrLocked) {
			return h, err
		}
		since, limit, what := began, startTime, []any{"cache", client.Dir()}
		switch st, e := client.Status(ctx); {
		case e == nil && st.Ending:
			silent = time.Time{}
			what = append(what, "pid", st.PID)
		case errors.Is(e, api.ErrNoServer):
			if silent.IsZero() {
				silent = time.Now()
			}
			since, limit = silent, cacheWait
		default: // also one that does not answer in time
			return nil, err
		}
		if time.Since(since) > limit {
			return nil, err
		}
		if !said {
			said = true
			log.Info("waiting for the process that uses the cache, which is about to end", append(what, "at_most", limit)...)
		}
		if e := sleep(ctx, 100*time.Millisecond); e != nil {
			return nil, errors.Join(err, e)
		}
	}
}
