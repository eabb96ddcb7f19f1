package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/tracefile"
)

// traceOptions say what serving does about traces.
type traceOptions struct {
	record      string // file to record to
	recordFor   time.Duration
	recordBytes size
	recordQuiet time.Duration
	use         []string // files, images, or "auto"
	push        bool
	rate        size // of prefetching, bytes a second
	wait        int  // percent
	waitFor     time.Duration
	ahead       aheadOptions
}

// aheadOptions say what is fetched ahead without a trace.
type aheadOptions struct{ metadata, readahead, program bool }

// String, Set and Type make it a flag: a list of what to do.
func (o *aheadOptions) String() string {
	var on []string
	for _, x := range o.all() {
		if *x.on {
			on = append(on, x.name)
		}
	}
	if on == nil {
		return "none"
	}
	return strings.Join(on, ",")
}

func (o *aheadOptions) Set(s string) error {
	*o = aheadOptions{}
	if s == "none" {
		return nil
	}
next:
	for _, word := range strings.Split(s, ",") {
		for _, x := range o.all() {
			if word == x.name {
				*x.on = true
				continue next
			}
		}
		return fmt.Errorf("%q: it is none, or some of metadata, readahead and program, with commas between", word)
	}
	return nil
}

func (o *aheadOptions) Type() string { return "list" }

type aheadOption struct {
	name string
	on   *bool
}

func (o *aheadOptions) all() []aheadOption {
	return []aheadOption{{"metadata", &o.metadata}, {"readahead", &o.readahead}, {"program", &o.program}}
}

func (o *traceOptions) auto() bool { return slices.Contains(o.use, "auto") }

// check says what does not go together.
func (o *traceOptions) check(images int, others bool) error {
	switch {
	case o.record != "" && (images != 1 || others):
		return errors.New("--record is of one image: serve one, and let clients open no others")
	case o.push && !o.auto() && o.record == "":
		return errors.New("--trace-push needs a recording: --trace auto or --record FILE")
	case o.wait < 0 || o.wait > 100:
		return fmt.Errorf("--prefetch-wait %d: it is a percentage", o.wait)
	case o.waitFor < 0:
		return fmt.Errorf("--prefetch-wait-for %v: it is a time to wait", o.waitFor)
	}
	return nil
}

// tracer records the starts of devices, and fetches ahead what they will read.
type tracer struct {
	traceOptions
	opener *opener
	dir    recordDir
	limit  context.Context // nothing waits for longer, and nothing is pushed any more
	log    *slog.Logger

	ready atomic.Bool // the server is: recordings are of clients

	mu     sync.Mutex // of what follows, and of each start's rec
	starts map[*start]struct{}
}

func newTracer(limit context.Context, o traceOptions, opener *opener, dir recordDir) *tracer {
	if o.auto() {
		dir.recover(opener.log)
	}
	return &tracer{traceOptions: o, opener: opener, dir: dir, limit: limit, log: opener.log, starts: make(map[*start]struct{})}
}

// await waits for c, and when time is up for a moment more: what is left to do
// then is a matter of this machine.
func (t *tracer) await(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-t.limit.Done():
	}
	moment := time.NewTimer(500 * time.Millisecond)
	defer moment.Stop()
	select {
	case <-c:
		return true
	case <-moment.C:
		return false
	}
}

// findTimeout bounds the look-up of what is beside an image. No device waits for
// that long: see patience.
const findTimeout = 10 * time.Second

// start is the start of one device.
type start struct {
	t      *tracer
	image  *blockImage
	begun  time.Time
	ctx    context.Context // ends with the device
	cancel context.CancelFunc

	listed  chan struct{} // closed when beside and listErr are there
	beside  beside
	listErr error

	attached bool // by attach, which begins all that follows

	rec     *recording      // guarded by t.mu: `thaw trace stop` may come at any time
	loaded  chan struct{}   // closed when replay is there, or will not be
	replay  *fetcher.Replay // nil: nothing says what will be read
	guessed *fetcher.Replay // of what is likely to be read then
}

// open opens an image, and begins its start.
func (t *tracer) open(ctx context.Context, name string) (s *start, image *openImage, err error) {
	// What is likely to be served need not be what is served in the end.
	image, err = t.opener.open(ctx, name, func(b *blockImage) {
		if s != nil {
			s.stop()
		}
		s = t.begin(b)
	})
	if err != nil {
		if s != nil {
			s.stop()
		}
		return nil, nil, err
	}
	if s == nil || s.image.digest != image.of.digest {
		if s != nil {
			s.stop()
		}
		s = t.begin(image.of)
	}
	return s, image, nil
}

// begin looks for what is known of an image's starts, from the moment on that its
// manifest is known: the index is fetched meanwhile.
func (t *tracer) begin(b *blockImage) *start {
	s := &start{t: t, image: b, begun: time.Now(), listed: make(chan struct{}), loaded: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	t.mu.Lock()
	t.starts[s] = struct{}{}
	t.mu.Unlock()
	go func() {
		defer close(s.listed)
		if t.auto() {
			ctx, cancel := context.WithTimeout(s.ctx, findTimeout)
			defer cancel()
			s.beside, s.listErr = findBeside(ctx, b)
		}
	}()
	return s
}

// within says whether c is closed before patience is lost.
func (s *start) within(ctx context.Context, c <-chan struct{}) bool {
	t := time.NewTimer(time.Until(s.begun.Add(patience)))
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// attach makes of an image the device to serve: itself, with what its start will
// read being fetched ahead, or a recorder of it. What goes wrong with traces
// costs speed, and no more.
func (s *start) attach(ctx context.Context, image *openImage) (blockmap.Device, error) {
	t := s.t
	s.attached = true
	go func() { // which asks the registry again; the device can be mounted meanwhile
		defer close(s.loaded)
		s.load(image)
		if s.replay == nil && t.ahead.readahead {
			image.fetcher.ReadAhead()
		}
	}()
	if t.record == "" && (!t.auto() || s.known(ctx)) {
		return image.Image, nil
	}
	device, err := s.startRecording(image)
	if err != nil && t.record == "" {
		t.log.Warn("the start is not recorded", "image", s.image.name, "err", err)
		return image.Image, nil
	}
	return device, err
}

// known says whether traces have been found, in time.
func (s *start) known(ctx context.Context) bool {
	if s.within(ctx, s.listed) && s.found() {
		return true
	}
	// Those of files and of other images are looked for meanwhile.
	return len(s.t.use) > 1 && s.within(ctx, s.loaded) && s.replay != nil
}

// found says whether anything is beside the image, once that is listed.
func (s *start) found() bool { return len(s.beside.traces)+len(s.beside.bundles) > 0 }

// load starts to fetch what bundles and traces say.
func (s *start) load(image *openImage) {
	log := s.t.log.With("image", s.image.name)
	o := s.replayOptions()
	if !s.within(s.ctx, s.listed) {
		s.guess(image)
		<-s.listed // within findTimeout
	}
	if s.listErr != nil && s.ctx.Err() == nil {
		log.Warn("what is beside the image cannot be found", "err", s.listErr)
	}
	what := []any{}
	if bundle := s.bundle(image); bundle != nil {
		o.Bundle = bundle
		what = append(what, "bundle_parts", len(bundle.Parts))
	}
	if o.Bundle == nil && s.guessed == nil {
		s.guess(image) // which goes on until there is something better
	}
	var wants []blockmap.Want
	if trace := s.trace(o.Bundle == nil); trace != nil {
		plan, err := tracefile.NewPlan(trace, image.Index())
		if err == nil {
			wants, err = plan.Wants(image.Stream)
		}
		if err != nil {
			log.Warn("the trace cannot be replayed", "err", err)
		} else {
			what = append(what, "starts", trace.Starts, "chunks", len(wants), "stored_bytes", plan.Stored)
		}
	}
	if o.Bundle == nil && len(wants) == 0 || s.ctx.Err() != nil {
		return
	}
	if s.guessed != nil {
		s.guessed.Stop()
	}
	s.replay = image.fetcher.Replay(s.ctx, wants, o)
	log.Info("replaying a trace", what...)
}

// bundle opens the last bundle beside the image.
func (s *start) bundle(image *openImage) *fetcher.Bundle {
	for _, d := range slices.Backward(s.beside.bundles) {
		stored, err := openBundle(s.ctx, s.image, d)
		if err == nil {
			var b *fetcher.Bundle
			if b, err = stored.of(image.Image); err == nil {
				return b
			}
			stored.close()
		}
		if s.ctx.Err() != nil {
			return nil
		}
		s.t.log.Warn("a bundle is of no use", "image", s.image.name, "manifest", d.Digest.String(), "err", err)
	}
	return nil
}

// guess fetches ahead what any start is likely to read, where nothing says what
// this one will.
func (s *start) guess(image *openImage) {
	var wants []blockmap.Want
	if s.t.ahead.metadata {
		if i, ok := s.image.manifest.Metadata(); ok {
			wants = image.MissingStream(i, smallMetadata)
		}
	}
	if s.t.ahead.program {
		extents, err := s.image.manifest.Guess(image.Index().Blocks)
		if err != nil {
			s.t.log.Warn("the image's guess of its start is of no use", "image", s.image.name, "err", err)
		}
		for _, e := range extents {
			wants = append(wants, image.Missing(e)...)
		}
	}
	if len(wants) > 0 && s.ctx.Err() == nil {
		s.guessed = image.fetcher.Replay(s.ctx, wants, s.replayOptions())
	}
}

// replayOptions are those for what nobody waits for. More than the cache can hold
// would push out what came first before it is read.
func (s *start) replayOptions() fetcher.ReplayOptions {
	return fetcher.ReplayOptions{Rate: int64(s.t.rate), MaxBytes: s.t.opener.cache.Quota() / 4 * 3}
}

// smallMetadata is how much metadata is fetched whole, as it is stored: that of
// some hundred thousand files.
const smallMetadata = 4 << 20

// trace collects the traces that are to be used, and merges them. Those that are
// stored beside the image are in its bundle, if it has one.
func (s *start) trace(stored bool) *tracefile.Trace {
	var traces []*tracefile.Trace
	for _, use := range s.t.use {
		if use == "auto" {
			if stored {
				traces = append(traces, storedTraces(s.ctx, s.image, s.beside.traces, s.t.log)...)
			}
			continue
		}
		found, err := s.t.read(s.ctx, use, s.image)
		if err != nil {
			s.t.log.Warn("a trace is of no use", "trace", use, "image", s.image.name, "err", err)
		}
		traces = append(traces, found...)
	}
	if len(traces) == 0 {
		return nil
	}
	merged, err := tracefile.Merge(traces...)
	if err != nil {
		s.t.log.Warn("the traces cannot be merged", "image", s.image.name, "err", err)
		return nil
	}
	return merged
}

// read reads what one --trace names, and makes it be of b.
func (t *tracer) read(ctx context.Context, use string, b *blockImage) (traces []*tracefile.Trace, err error) {
	found, err := t.opener.readNamed(ctx, use)
	for _, r := range found {
		if r.Cut != nil && r.of == nil { // storedTraces has said so of the others
			t.log.Warn("a trace ends early; what there is of it is used", "trace", use, "err", r.Cut)
		}
		if r.of == nil {
			// An index that was served once is still in the cache.
			if encoded, err := t.opener.cache.Blob(r.Index); err == nil {
				r.of, _ = blockmap.DecodeIndex(encoded) // or it is not known
			}
		}
		trace, carried, fitErr := r.fit(b)
		err = errors.Join(err, fitErr)
		if fitErr != nil {
			continue
		}
		if carried != nil {
			t.log.Info("a trace of another version is used", "image", b.name, "what", carried.String())
		}
		traces = append(traces, trace)
	}
	return traces, err
}

// await returns when enough has been fetched ahead, or when ctx ends. When it
// cannot be, the start goes on without.
func (s *start) await(ctx context.Context) {
	if s.t.wait == 0 || !s.within(ctx, s.listed) {
		return
	}
	err := context.DeadlineExceeded
	select {
	case <-s.loaded:
		if s.replay == nil {
			return
		}
		err = s.replay.Wait(ctx, float64(s.t.wait)/100)
	case <-ctx.Done():
	}
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		s.t.log.Warn("ready, though less than asked for was prefetched", "image", s.image.name, "err", err)
	}
}

// stop ends all of it, and says what was lost. It is not called while attach is.
func (s *start) stop() {
	s.t.mu.Lock()
	_, first := s.t.starts[s]
	delete(s.t.starts, s)
	rec := s.rec
	s.t.mu.Unlock()
	if !first {
		return
	}
	s.cancel()
	if !s.attached {
		s.t.await(s.listed)
		return
	}
	if rec != nil {
		go rec.Stop() // which waits for whoever reads a FIFO
		s.t.await(rec.ended)
	}
	if !s.t.await(s.loaded) {
		return
	}
	if s.guessed != nil {
		s.guessed.Stop()
	}
	if s.replay == nil {
		return
	}
	s.replay.Stop()
	p := s.replay.Progress()
	log := s.t.log.Info
	if p.Failed > 0 {
		log = s.t.log.Warn
	}
	log("replayed", "image", s.image.name, "chunks", p.DoneChunks, "of", p.Chunks, "bytes", p.DoneBytes, "failed", p.Failed,
		"seconds", p.Ended.Sub(p.Began).Seconds())
}

// stop ends all starts.
func (t *tracer) stop() {
	var wg sync.WaitGroup
	for _, s := range t.all() {
		wg.Go(s.stop)
	}
	wg.Wait()
}

func (t *tracer) all() []*start {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.starts))
}
