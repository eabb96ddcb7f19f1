package host

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/fetcher"
)

// CompleteOptions say when a Host fetches the rest of the images of its devices, so that
// they need their registries no longer.
type CompleteOptions struct {
	// After is how long no reader of a device has waited for its registry before the rest
	// of the image is fetched; 0 means never. It is fetched only if the cache has room for
	// all of it: completion evicts nothing.
	After time.Duration
	// Rate bounds the bytes per second that are requested for this; 0 means no limit.
	Rate int64
}

const (
	// completeAtOnce is how many images are completed at once. The others wait.
	completeAtOnce = 2
	// recheckAfter is how often a complete image, and one without room, are looked at.
	recheckAfter = time.Minute
	// A failed completion is tried again after a pause, which doubles.
	firstRetry, lastRetry = 10 * time.Second, 10 * time.Minute
)

// completer completes images.
type completer struct {
	CompleteOptions
	cache *blockmap.Cache
	dir   string
	slots chan struct{} // a token for each image that is being completed

	recheck           time.Duration
	firstTry, lastTry time.Duration // pauses after failures

	mu struct {
		sync.Mutex
		running map[*completion]bool // their images are open
	}
}

func newCompleter(o CompleteOptions, cache *blockmap.Cache, dir string) *completer {
	c := &completer{
		CompleteOptions: o, cache: cache, dir: dir, slots: make(chan struct{}, completeAtOnce),
		recheck: recheckAfter, firstTry: firstRetry, lastTry: lastRetry,
	}
	c.mu.running = make(map[*completion]bool)
	return c
}

// admit reports whether there is room for this many bytes of an image beside what the
// completions that are running are still to bring. If so, the completion is one of them
// until it calls leave.
func (c *completer) admit(x *completion, space int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	room := c.room()
	for other := range c.mu.running {
		room -= other.missing().space
	}
	if space > room {
		return false
	}
	c.mu.running[x] = true
	return true
}

func (c *completer) leave(x *completion) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mu.running, x)
}

// room returns how many bytes the cache can take without evicting anything. It leaves a
// part of the quota, or of the disk, to what readers demand and to other programs.
func (c *completer) room() int64 {
	if quota := c.cache.Quota(); quota > 0 {
		return quota - quota/16 - c.cache.Used()
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(c.dir, &disk); err != nil {
		return 0
	}
	return int64(min((float64(disk.Bavail)-float64(disk.Blocks)/10)*float64(disk.Bsize), math.MaxInt64/2))
}

// CompletionInfo says how much of a device's image is not in the cache, and what is done
// about it.
type CompletionInfo struct {
	State   string `json:"state"`                // complete, waiting (for the start to become quiet, or for other images), running, retrying, no_room, or off
	Missing int64  `json:"missing_bytes"`        // content that is not in the cache; 0: the device does not need its registry
	Stored  int64  `json:"missing_stored_bytes"` // as it is stored in the registry
	Error   string `json:"error,omitempty"`      // retrying: why the last try failed
}

const (
	completeDone     = "complete"
	completeWaiting  = "waiting"
	completeRunning  = "running"
	completeRetrying = "retrying"
	completeNoRoom   = "no_room"
	completeOff      = "off"
)

// completion is the completion of one device's image.
type completion struct {
	*completer
	start  *start
	image  *openImage
	log    *slog.Logger
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	state string
	err   error
}

// begin completes the image of a start in the background, if that is enabled.
func (c *completer) begin(s *start, image *openImage) *completion {
	x := &completion{
		completer: c, start: s, image: image, log: s.t.log.With("image", image.of.Name), state: completeOff, done: make(chan struct{}),
	}
	ctx, cancel := context.WithCancel(s.ctx)
	x.cancel = cancel
	if c.After == 0 {
		close(x.done)
		return x
	}
	x.state = completeWaiting
	go func() {
		defer close(x.done)
		x.run(ctx)
	}()
	return x
}

// stop ends the completion, and returns when it has ended.
func (x *completion) stop() {
	x.cancel()
	<-x.done
}

func (x *completion) set(state string, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.state, x.err = state, err
}

func (x *completion) info() *CompletionInfo {
	x.mu.Lock()
	in := &CompletionInfo{State: x.state}
	if x.err != nil {
		in.Error = x.err.Error()
	}
	x.mu.Unlock()
	rest := x.missing()
	in.Missing, in.Stored = rest.content, rest.stored
	switch {
	case in.Missing == 0:
		in.State, in.Error = completeDone, ""
	case in.State == completeDone:
		in.State = completeWaiting // something was evicted since
	}
	return in
}

// rest is what a device needs and the cache lacks.
type rest struct {
	wants   []blockmap.Want // in the order of the streams, so that neighbours share requests
	content int64           // bytes that the device shows
	stored  int64           // bytes of the chunks as they are stored in the registry
	space   int64           // bytes that the chunks will take in the cache: they may have more than the device shows
}

func (x *completion) missing() (r rest) {
	ix := x.image.Index()
	at := make(map[*blockmap.Table]int)
	for i := range ix.Streams {
		at[&ix.Streams[i]] = i
	}
	order := func(a, b blockmap.Want) int { return cmp.Or(at[a.Table]-at[b.Table], a.Chunk-b.Chunk) }
	all := x.image.Missing(blockmap.Extent{End: x.image.Size()})
	slices.SortFunc(all, order)
	// Files that are apart on the device may have leaves of the same chunk.
	for _, w := range all {
		if n := len(r.wants); n > 0 && order(r.wants[n-1], w) == 0 {
			r.wants[n-1].Leaves = r.wants[n-1].Needs() | w.Needs()
			continue
		}
		r.wants = append(r.wants, w)
	}
	for _, w := range r.wants {
		c := &w.Table.Chunks[w.Chunk]
		for leaf := range w.Needs().Each {
			r.content += int64(c.LeafSize(leaf))
		}
		r.stored += int64(c.Stored)
		r.space += w.Absent()
	}
	return r
}

// run completes the image, again if a part of it is evicted later, until ctx ends.
func (x *completion) run(ctx context.Context) {
	pause, told := x.firstTry, false
	for ctx.Err() == nil {
		left := x.missing()
		switch {
		case left.content == 0:
			x.set(completeDone, nil)
			if !told {
				told = true
				x.log.Info("all of the image is in the cache: it does not need its registry any more")
			}
			sleep(ctx, x.recheck)
			continue
		case left.space > x.room():
			x.set(completeNoRoom, nil)
			sleep(ctx, x.recheck)
			continue
		}
		if !x.awaitQuiet(ctx) {
			return
		}
		select {
		case x.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		left = x.missing()
		var err error = blockmap.ErrNoSpace
		if x.admit(x, left.space) {
			x.set(completeRunning, nil)
			err = x.image.fetcher.Complete(ctx, left.wants, fetcher.CompleteOptions{Rate: x.Rate, Room: x.room})
			x.leave(x)
		}
		<-x.slots
		switch {
		case err == nil:
			pause = x.firstTry
			x.set(completeWaiting, nil)
		case errors.Is(err, blockmap.ErrNoSpace):
			x.set(completeNoRoom, nil)
			sleep(ctx, x.recheck)
		case ctx.Err() == nil:
			log := x.log.Debug
			if pause == x.firstTry {
				log = x.log.Warn
			}
			log("the rest of the image cannot be fetched now; thaw tries again", "missing_stored_bytes", left.stored, "in", pause, "err", err)
			x.set(completeRetrying, err)
			sleep(ctx, pause/2+rand.N(pause/2+1))
			pause = min(2*pause, x.lastTry)
		}
	}
}

// awaitQuiet returns when the prefetch of the start has ended, and no reader has waited
// for the registry since After. It reports false when ctx has ended.
func (x *completion) awaitQuiet(ctx context.Context) bool {
	select {
	case <-x.start.loaded:
	case <-ctx.Done():
		return false
	}
	for ctx.Err() == nil {
		last := slices.MaxFunc([]time.Time{x.start.begun, x.image.fetcher.LastDemand()}, time.Time.Compare)
		wait := x.After - time.Since(last)
		if prefetched, running := x.start.prefetchEnded(); running {
			wait = max(wait, min(x.After, time.Second))
		} else {
			wait = max(wait, x.After-time.Since(prefetched))
		}
		if wait <= 0 {
			return true
		}
		sleep(ctx, wait)
	}
	return false
}

// prefetchEnded returns when the prefetch of the start ended, or that it is running.
func (s *start) prefetchEnded() (at time.Time, running bool) {
	s.t.mu.Lock()
	replays := []*fetcher.Replay{s.replay, s.guessed}
	s.t.mu.Unlock()
	for _, r := range replays {
		if r == nil {
			continue
		}
		p := r.Progress()
		if p.Ended.IsZero() {
			return at, true
		}
		if p.Ended.After(at) {
			at = p.Ended
		}
	}
	return at, false
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
