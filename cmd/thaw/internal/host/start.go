package host

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/tracefile"
)

// TraceOptions say what a Host records of a device's start, and what it prefetches.
type TraceOptions struct {
	Record      string        // the file to record to; "": none
	RecordFor   time.Duration // how long a recording lasts from the first read
	RecordBytes int64         // how many bytes it may touch; 0: any number
	RecordQuiet time.Duration // a recording ends after so long without a new block
	Use         []string      // the traces to prefetch from: files, images, or Auto
	Push        bool          // store recordings beside the image
	Rate        int64         // of prefetching, bytes a second; 0: no bound
	Ahead       Ahead
}

// Auto, among TraceOptions.Use, stands for the traces and the bundle beside the image.
// Where there are none, the start is recorded.
const Auto = "auto"

// Ahead says what is prefetched where there is no trace.
type Ahead struct {
	Metadata  bool // the filesystem's metadata, where it is small
	Readahead bool // the chunks that follow those that are read in order
	Program   bool // what the image's program is made of, by the guess in the image
}

func (o *TraceOptions) auto() bool { return slices.Contains(o.Use, Auto) }

// tracer records the starts of devices, and fetches ahead what they will read.
type tracer struct {
	TraceOptions
	opener *opener
	dir    recordDir
	limit  context.Context // nothing waits for longer, and nothing is pushed any more
	log    *slog.Logger

	serving atomic.Bool // clients can read: recordings are of them

	mu     sync.Mutex // of what follows, and of each start's rec, replay and guessed
	starts map[*start]struct{}
}

func newTracer(limit context.Context, o TraceOptions, opener *opener, dir recordDir) *tracer {
	if o.auto() {
		dir.recover(opener.Log)
	}
	return &tracer{TraceOptions: o, opener: opener, dir: dir, limit: limit, log: opener.Log, starts: make(map[*start]struct{})}
}

// await waits for c until ctx or t.limit ends, and for a moment more: what is left to
// do then depends on this machine alone.
func (t *tracer) await(ctx context.Context, c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-ctx.Done():
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
	image  *BlockImage
	begun  time.Time
	ctx    context.Context // ends with the device
	cancel context.CancelFunc

	listed  chan struct{} // closed when beside and listErr are there
	beside  Beside
	listErr error

	attached bool // by attach, which begins all that follows

	// Guarded by t.mu against those who ask at any time; loaded says that the last
	// two are final.
	rec     *recording
	replay  *fetcher.Replay // nil: nothing says what will be read
	source  string          // of replay: "bundle" or "trace"
	guessed *fetcher.Replay // of what is likely to be read then
	loaded  chan struct{}   // closed when replay is there, or will not be
}

// open opens an image, and begins its start.
func (t *tracer) open(ctx context.Context, name string) (s *start, image *openImage, err error) {
	// What is likely to be served need not be what is served in the end.
	image, err = t.opener.open(ctx, name, func(b *BlockImage) {
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
	if s == nil || s.image.Digest != image.of.Digest {
		if s != nil {
			s.stop()
		}
		s = t.begin(image.of)
	}
	return s, image, nil
}

// begin looks for what is known of an image's starts, from the moment on that its
// manifest is known: the index is fetched meanwhile.
func (t *tracer) begin(b *BlockImage) *start {
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
			s.beside, s.listErr = b.Beside(ctx)
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
		if s.replay == nil && t.Ahead.Readahead {
			image.fetcher.ReadAhead()
		}
	}()
	if t.Record == "" && (!t.auto() || s.known(ctx)) {
		return image.Image, nil
	}
	device, err := s.startRecording(image)
	if err != nil && t.Record == "" {
		t.log.Warn("the start is not recorded", "image", s.image.Name, "err", err)
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
	return len(s.t.Use) > 1 && s.within(ctx, s.loaded) && s.replay != nil
}

// found says whether anything is beside the image, once that is listed.
func (s *start) found() bool { return len(s.beside.Traces)+len(s.beside.Bundles) > 0 }

// load starts to fetch what bundles and traces say.
func (s *start) load(image *openImage) {
	log := s.t.log.With("image", s.image.Name)
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
	source := "trace"
	if o.Bundle != nil {
		source = "bundle"
	}
	replay := image.fetcher.Replay(s.ctx, wants, o)
	s.t.mu.Lock()
	s.replay, s.source = replay, source
	s.t.mu.Unlock()
	log.Info("replaying a trace", what...)
}

// bundle opens the last bundle beside the image.
func (s *start) bundle(image *openImage) *fetcher.Bundle {
	for _, d := range slices.Backward(s.beside.Bundles) {
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
		s.t.log.Warn("a bundle is of no use", "image", s.image.Name, "manifest", d.Digest.String(), "err", err)
	}
	return nil
}

// guess fetches ahead what any start is likely to read, where nothing says what
// this one will.
func (s *start) guess(image *openImage) {
	var wants []blockmap.Want
	if s.t.Ahead.Metadata {
		wants = image.MissingMetadata(smallMetadata)
	}
	if s.t.Ahead.Program {
		extents, err := s.image.Manifest.Guess(image.Index().Blocks)
		if err != nil {
			s.t.log.Warn("the image's guess of its start is of no use", "image", s.image.Name, "err", err)
		}
		for _, e := range extents {
			wants = append(wants, image.Missing(e)...)
		}
	}
	if len(wants) > 0 && s.ctx.Err() == nil {
		guessed := image.fetcher.Replay(s.ctx, wants, s.replayOptions())
		s.t.mu.Lock()
		s.guessed = guessed
		s.t.mu.Unlock()
	}
}

// replayOptions are those for what nobody waits for. More than the cache can hold
// would push out what came first before it is read.
func (s *start) replayOptions() fetcher.ReplayOptions {
	return fetcher.ReplayOptions{Rate: s.t.Rate, MaxBytes: s.t.opener.cache.Quota() / 4 * 3}
}

// smallMetadata is how much metadata is fetched whole, as it is stored: that of
// some hundred thousand files.
const smallMetadata = 4 << 20

// trace collects the traces that are to be used, and merges them. Those that are
// stored beside the image are in its bundle, if it has one.
func (s *start) trace(stored bool) *tracefile.Trace {
	var traces []*tracefile.Trace
	for _, use := range s.t.Use {
		if use == Auto {
			if stored {
				traces = append(traces, s.image.StoredTraces(s.ctx, s.beside.Traces, s.t.log)...)
			}
			continue
		}
		found, err := s.t.read(s.ctx, use, s.image)
		if err != nil {
			s.t.log.Warn("a trace is of no use", "trace", use, "image", s.image.Name, "err", err)
		}
		traces = append(traces, found...)
	}
	if len(traces) == 0 {
		return nil
	}
	merged, err := tracefile.Merge(traces...)
	if err != nil {
		s.t.log.Warn("the traces cannot be merged", "image", s.image.Name, "err", err)
		return nil
	}
	return merged
}

// read reads what one --trace names, and makes it be of b.
func (t *tracer) read(ctx context.Context, use string, b *BlockImage) (traces []*tracefile.Trace, err error) {
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
		trace, carried, fitErr := r.Fit(b)
		err = errors.Join(err, fitErr)
		if fitErr != nil {
			continue
		}
		if carried != nil {
			t.log.Info("a trace of another version is used", "image", b.Name, "what", carried.String())
		}
		traces = append(traces, trace)
	}
	return traces, err
}

// await returns when this share of what the start will read has been prefetched, or
// when ctx ends. Where that cannot be, the start goes on without.
func (s *start) await(ctx context.Context, share float64) {
	if share == 0 || !s.within(ctx, s.listed) {
		return
	}
	err := context.DeadlineExceeded
	select {
	case <-s.loaded:
		if s.replay == nil {
			return
		}
		err = s.replay.Wait(ctx, share)
	case <-ctx.Done():
	}
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		s.t.log.Warn("ready, though less than asked for was prefetched", "image", s.image.Name, "err", err)
	}
}

// PrefetchInfo says how far the prefetch of a device is.
type PrefetchInfo struct {
	State      string  `json:"state"`            // looking (for traces), running, ended, or none
	Source     string  `json:"source,omitempty"` // bundle, trace, or guess
	Chunks     int64   `json:"chunks"`
	DoneChunks int64   `json:"done_chunks"`
	Failed     int64   `json:"failed_chunks"`
	Bytes      int64   `json:"stored_bytes"` // of the chunks, as they are stored in the registry
	DoneBytes  int64   `json:"done_stored_bytes"`
	Seconds    float64 `json:"seconds"` // since it began, or until it ended
}

func (s *start) prefetchInfo() *PrefetchInfo {
	loaded := false
	select {
	case <-s.loaded:
		loaded = true
	default:
	}
	s.t.mu.Lock()
	r, source := s.replay, s.source
	if r == nil && s.guessed != nil {
		r, source = s.guessed, "guess"
	}
	s.t.mu.Unlock()
	switch {
	case r == nil && loaded:
		return &PrefetchInfo{State: "none"}
	case r == nil:
		return &PrefetchInfo{State: "looking"}
	}
	p := r.Progress()
	in := &PrefetchInfo{
		State: "running", Source: source, Chunks: p.Chunks, DoneChunks: p.DoneChunks, Failed: p.Failed, Bytes: p.Bytes, DoneBytes: p.DoneBytes,
		Seconds: time.Since(p.Began).Seconds(),
	}
	if !p.Ended.IsZero() {
		in.State, in.Seconds = "ended", p.Ended.Sub(p.Began).Seconds()
	}
	return in
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
		s.t.await(s.t.limit, s.listed)
		return
	}
	if rec != nil {
		go rec.Stop() // which waits for whoever reads a FIFO
		s.t.await(s.t.limit, rec.ended)
	}
	if !s.t.await(s.t.limit, s.loaded) {
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
	log("replayed", "image", s.image.Name, "chunks", p.DoneChunks, "of", p.Chunks, "bytes", p.DoneBytes, "failed", p.Failed,
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
