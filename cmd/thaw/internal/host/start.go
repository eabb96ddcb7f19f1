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

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/tracefile"
)

// TraceOptions say what a Host records of a device's start, and what it prefetches.
type TraceOptions struct {
	Record      string        // the file to record to; "": no recording to a named file
	RecordFor   time.Duration // how long a recording lasts from the first read
	RecordBytes int64         // how many bytes a recording may touch; 0: no limit
	RecordQuiet time.Duration // a recording ends after this time without a new block
	Use         []string      // the traces to prefetch from: files, images, or Auto
	Push        bool          // store recordings beside the image
	Rate        int64         // of prefetching, in bytes per second; 0: no limit
	Ahead       Ahead
}

// Auto, in TraceOptions.Use, stands for the traces and the bundle beside the image. If
// there are none, the host records the start. With Push it then stores the trace, and packs
// and stores a bundle; it also compares later starts with what is stored.
const Auto = "auto"

// Ahead says what is prefetched without a trace.
type Ahead struct {
	Metadata  bool // the filesystem's metadata
	Readahead bool // the chunks that follow chunks that are read in order
	Program   bool // the files that the image's program needs, by the guess in the image
}

func (o *TraceOptions) auto() bool { return slices.Contains(o.Use, Auto) }

// tracer records the starts of devices, and prefetches what they will read.
type tracer struct {
	TraceOptions
	opener    *opener
	completer *completer
	dir       recordDir
	limit     context.Context // ends all waits and pushes when the host stops
	log       *slog.Logger

	serving atomic.Bool // clients can read; recordings that end before are not kept

	packing packing

	mu     sync.Mutex // guards starts, and of each start rec, replay, source and guessed
	starts map[*start]struct{}
}

func newTracer(limit context.Context, o TraceOptions, opener *opener, dir recordDir) *tracer {
	if o.auto() {
		dir.recover(opener.Log)
	}
	t := &tracer{TraceOptions: o, opener: opener, dir: dir, limit: limit, log: opener.Log, starts: make(map[*start]struct{})}
	t.packing.init(limit)
	return t
}

// await waits for c until ctx or t.limit ends, and then for half a second more, because
// the remaining work depends only on this machine. It reports whether c was closed.
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

// findTimeout bounds the look-up of traces and bundles beside an image. A device waits
// only for patience.
const findTimeout = 10 * time.Second

// start is the start of one device.
type start struct {
	t      *tracer
	image  *BlockImage
	begun  time.Time
	ctx    context.Context // ends with the device
	cancel context.CancelFunc

	listed  chan struct{} // closed when beside and listErr are set
	beside  Beside
	listErr error

	attached bool // set by attach, which begins everything below

	// Guarded by t.mu, for prefetchInfo and recordingInfo. Once loaded is closed, all
	// fields except rec are final.
	rec     *recording
	replay  *fetcher.Replay // of a bundle or traces; nil if there are none
	source  string          // of replay: "bundle" or "trace"
	bundled *BundleInfo     // of replay, if a bundle is its source
	known   leafNames       // what the image's own bundle or traces list; nil if there are none
	use     *UseInfo        // how much of that the start has read; nil until it is known
	guessed *fetcher.Replay // of a guess, until replay is set
	loaded  chan struct{}   // closed when replay is set, or will not be set
}

// open opens an image, and begins its start.
func (t *tracer) open(ctx context.Context, name string) (s *start, image *openImage, err error) {
	// The image that opener expects to serve is not always the one that it serves.
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

// begin looks for traces and bundles beside the image as soon as its manifest is known,
// while the index is fetched.
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

// within waits for c until ctx ends or patience is over, and reports whether c was
// closed.
func (s *start) within(ctx context.Context, c <-chan struct{}) bool {
	t := time.NewTimer(time.Until(s.begun.Add(s.t.opener.patience)))
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-c: // as well: the index may have taken all of the time
		return true
	default:
		return false
	}
}

// attach returns the device to serve: the image, or a recorder around it if the start
// is recorded. It begins the prefetch. A failure with traces only makes the start
// slower, except that a recording that the user asked for must be possible.
func (s *start) attach(ctx context.Context, image *openImage) (blockmap.Device, error) {
	t := s.t
	s.attached = true
	go func() { // in the background, because it may ask the registry; the device is usable meanwhile
		defer close(s.loaded)
		s.load(image)
		// The bundle of another version says only a part of what will be read.
		if t.Ahead.Readahead && (s.replay == nil || s.bundled != nil && s.bundled.Other) {
			image.fetcher.ReadAhead(t.opener.cache.Quota() / 8)
		}
	}()
	if t.Record == "" && (!t.auto() || !t.Push && s.tracesFound(ctx)) {
		return image.Image, nil
	}
	device, err := s.startRecording(image)
	if err != nil && t.Record == "" {
		t.log.Warn("the start is not recorded", "image", s.image.Name, "err", err)
		return image.Image, nil
	}
	return device, err
}

// tracesFound reports whether traces were found in time.
func (s *start) tracesFound(ctx context.Context) bool {
	if s.within(ctx, s.listed) && s.found() {
		return true
	}
	// Files and other images are searched at the same time.
	return len(s.t.Use) > 1 && s.within(ctx, s.loaded) && s.replay != nil
}

// found reports whether traces or bundles are beside the image, once listed is closed.
func (s *start) found() bool { return len(s.beside.Traces)+len(s.beside.Bundles) > 0 }

// load begins to prefetch the chunks that a bundle and traces list, or, without these,
// the chunks that the image's guess lists.
func (s *start) load(image *openImage) {
	log := s.t.log.With("image", s.image.Name)
	o := s.replayOptions()
	if !s.within(s.ctx, s.listed) {
		s.guess(image)
		<-s.listed // within findTimeout
	}
	if s.listErr != nil && s.ctx.Err() == nil {
		log.Warn("cannot list the traces beside the image", "err", s.listErr)
	}
	what := []any{}
	bundle, bundled, known := s.bundle(image)
	if bundle != nil {
		o.Bundle = bundle
		what = append(what, "bundle_bytes", bundled.Stored, "bundle_leaves", bundled.Leaves, "shared_leaves", bundled.Shared,
			"content_bytes", bundled.Bytes, "shared_content_bytes", bundled.SharedBytes)
	}
	if o.Bundle == nil && s.guessed == nil {
		s.guess(image) // until a trace replaces it
	}
	var wants []blockmap.Want
	if bundled != nil && bundled.Other {
		what = append(what, "of_another_version", true)
		wants = s.guessWants(image) // behind what the bundle brings
	}
	if trace := s.trace(o.Bundle == nil); trace != nil {
		plan, err := tracefile.NewPlan(trace, image.Index())
		var listed []blockmap.Want
		if err == nil {
			listed, err = plan.Wants(image.Stream)
		}
		if err != nil {
			log.Warn("the trace cannot be used", "err", err)
		} else {
			wants = listed
			if known == nil {
				known = namesOf(plan)
			}
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
	s.replay, s.source, s.bundled, s.known = replay, source, bundled, known
	s.t.mu.Unlock()
	log.Info("replaying a trace", what...)
}

// bundle opens the newest bundle beside the image that can be used, and returns what it
// lists. If nothing is stored beside the image, it opens the last bundle of the repository,
// which is that of another version.
func (s *start) bundle(image *openImage) (*fetcher.Bundle, *BundleInfo, leafNames) {
	open := func(d v1.Descriptor) (*fetcher.Bundle, *BundleInfo, leafNames, error) {
		stored, err := openBundle(s.ctx, s.image, d, image.fetcher)
		if err != nil {
			return nil, nil, nil, err
		}
		b, in, err := stored.of(image.Image)
		if err != nil {
			stored.close()
			return nil, nil, nil, err
		}
		return b, in, namesIn(stored.head), nil
	}
	for _, d := range slices.Backward(s.beside.Bundles) {
		b, in, known, err := open(d)
		if err == nil {
			return b, in, known
		}
		if s.ctx.Err() != nil {
			return nil, nil, nil
		}
		s.t.log.Warn("a bundle cannot be used", "image", s.image.Name, "manifest", d.Digest.String(), "err", err)
	}
	if !s.t.auto() || s.found() || s.listErr != nil {
		return nil, nil, nil
	}
	// Most repositories have none, and it only saves work.
	d, err := s.image.predecessor(s.ctx)
	if err == nil {
		var b *fetcher.Bundle
		var in *BundleInfo
		if b, in, _, err = open(d); err == nil {
			in.Other = true
			return b, in, nil
		}
	}
	s.t.log.Debug("no bundle of another version can be used", "image", s.image.Name, "err", err)
	return nil, nil, nil
}

// trace reads and merges the traces to use. It includes the traces beside the image if
// stored is set; a bundle already has their chunks.
func (s *start) trace(stored bool) *tracefile.Trace {
	var traces []*tracefile.Trace
	for _, use := range s.t.Use {
		if use == Auto {
			if stored {
				traces = append(traces, s.image.storedTraces(s.ctx, s.beside.Traces, s.t.opener.readBlob, s.t.log)...)
			}
			continue
		}
		found, err := s.t.read(s.ctx, use, s.image)
		if err != nil {
			s.t.log.Warn("a trace cannot be used", "trace", use, "image", s.image.Name, "err", err)
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

// read reads the traces that the names in use stand for, and translates them to b.
func (t *tracer) read(ctx context.Context, use string, b *BlockImage) (traces []*tracefile.Trace, err error) {
	found, err := t.opener.readNamed(ctx, use)
	for _, r := range found {
		if r.Cut != nil && r.of == nil { // StoredTraces has logged the others
			t.log.Warn("a trace ends early; thaw uses the part that is there", "trace", use, "err", r.Cut)
		}
		if r.of == nil {
			// The cache may have the index of an image that was served before.
			if encoded, err := t.opener.cache.Blob(r.Index); err == nil {
				r.of, _ = blockmap.DecodeIndex(encoded) // nil if it is damaged
			}
		}
		trace, carried, fitErr := r.Fit(b)
		err = errors.Join(err, fitErr)
		if fitErr != nil {
			continue
		}
		if carried != nil {
			t.log.Info("a trace of another version is used", "image", b.Name, "carried", carried.String())
		}
		traces = append(traces, trace)
	}
	return traces, err
}

// await returns when this share of the trace has been prefetched, when the prefetch
// will bring no more of it, or when ctx ends.
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
		s.t.log.Warn("the device is ready, but less than asked for was prefetched", "image", s.image.Name, "err", err)
	}
}

// PrefetchInfo is the progress of the prefetch of a device.
type PrefetchInfo struct {
	State      string  `json:"state"`            // looking (for traces), running, ended, or none
	Source     string  `json:"source,omitempty"` // bundle, trace, or guess
	Chunks     int64   `json:"chunks"`           // of which the prefetch brings all or some leaves
	DoneChunks int64   `json:"done_chunks"`
	Failed     int64   `json:"failed_chunks"`
	Bytes      int64   `json:"stored_bytes"` // as they are stored in the registry
	DoneBytes  int64   `json:"done_stored_bytes"`
	Seconds    float64 `json:"seconds"` // since the prefetch began, or until it ended

	Bundle *BundleInfo `json:"bundle,omitempty"` // if the source is a bundle
	Use    *UseInfo    `json:"use,omitempty"`    // once the start is over, if it was compared
}

func (s *start) prefetchInfo() *PrefetchInfo {
	loaded := false
	select {
	case <-s.loaded:
		loaded = true
	default:
	}
	s.t.mu.Lock()
	r, source, bundled, use := s.replay, s.source, s.bundled, s.use
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
		Seconds: time.Since(p.Began).Seconds(), Bundle: bundled, Use: use,
	}
	if !p.Ended.IsZero() {
		in.State, in.Seconds = "ended", p.Ended.Sub(p.Began).Seconds()
	}
	return in
}

// stop ends the start's prefetch and recording, and logs how far the prefetch came. It
// must not be called while attach runs.
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
		go func() { _ = rec.Stop() }() // Stop may wait for the reader of a FIFO
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
	t.packing.stop()
	defer t.await(t.limit, t.packing.ended())
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
