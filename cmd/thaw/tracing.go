package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
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
	}
	return nil
}

// tracer records the starts of devices, and fetches ahead what they will read.
type tracer struct {
	traceOptions
	opener *opener
	log    *slog.Logger

	mu     sync.Mutex // of what follows, and of each start's rec
	starts map[*start]struct{}
}

func newTracer(o traceOptions, opener *opener, log *slog.Logger) *tracer {
	return &tracer{traceOptions: o, opener: opener, log: log, starts: make(map[*start]struct{})}
}

// findTimeout bounds how long a device waits for word of its traces.
const findTimeout = 10 * time.Second

// start is the start of one device.
type start struct {
	t      *tracer
	image  *blockImage
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

// recording is a start that is being recorded.
type recording struct {
	*tracefile.Recorder
	image *blockImage
	file  *os.File
	keep  bool // it was asked for under this name
	ended chan struct{}
}

// open opens an image, and begins its start.
func (t *tracer) open(ctx context.Context, name string) (s *start, image *openImage, err error) {
	image, err = t.opener.open(ctx, name, func(b *blockImage) { s = t.begin(b) })
	if err != nil && s != nil {
		s.stop()
	}
	return s, image, err
}

// begin looks for what is known of an image's starts, from the moment on that its
// manifest is known: the index is fetched meanwhile.
func (t *tracer) begin(b *blockImage) *start {
	s := &start{t: t, image: b, listed: make(chan struct{}), loaded: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	t.mu.Lock()
	t.starts[s] = struct{}{}
	t.mu.Unlock()
	go func() {
		defer close(s.listed)
		if t.auto() && !b.recalled {
			ctx, cancel := context.WithTimeout(s.ctx, findTimeout)
			defer cancel()
			s.beside, s.listErr = findBeside(ctx, b)
		}
	}()
	return s
}

// attach makes of an image the device to serve: itself, with what its start will
// read being fetched ahead, or a recorder of it. What goes wrong with traces
// costs speed, and no more.
func (s *start) attach(image *openImage) (blockmap.Device, error) {
	t := s.t
	s.attached = true
	<-s.listed
	if s.listErr != nil {
		t.log.Warn("what is beside the image cannot be found", "image", s.image.name, "cause", s.listErr)
	}
	known := len(s.beside.traces)+len(s.beside.bundles) > 0
	load := func() {
		defer close(s.loaded)
		s.load(image)
		if s.replay == nil && t.ahead.readahead {
			image.fetcher.ReadAhead()
		}
	}
	if t.record == "" && (known || !t.auto()) {
		go load() // which asks the registry again; the device can be mounted meanwhile
		return image.Image, nil
	}
	if load(); s.replay != nil && t.record == "" {
		return image.Image, nil
	}
	device, err := s.startRecording(image)
	if err != nil {
		s.stop()
	}
	return device, err
}

// load starts to fetch what bundles and traces say.
func (s *start) load(image *openImage) {
	t, log := s.t, s.t.log.With("image", s.image.name)
	o := fetcher.ReplayOptions{Rate: int64(t.rate)}
	what := []any{}
	if bundle := s.bundle(image); bundle != nil {
		o.Bundle = bundle
		what = append(what, "bundle_parts", len(bundle.Parts))
	}
	if o.Bundle == nil {
		s.guess(image) // which goes on until there is something better
	}
	var wants []blockmap.Want
	if trace := s.trace(o.Bundle == nil); trace != nil {
		plan, err := tracefile.NewPlan(trace, image.Index())
		if err == nil {
			wants, err = plan.Wants(t.opener.cache.Stream)
		}
		if err != nil {
			log.Warn("the trace cannot be replayed", "cause", err)
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
			if b, err = stored.of(image.Index(), s.t.opener.cache); err == nil {
				return b
			}
			stored.close()
		}
		if s.ctx.Err() != nil {
			return nil
		}
		s.t.log.Warn("a bundle is of no use", "image", s.image.name, "manifest", d.Digest.String(), "cause", err)
	}
	return nil
}

// guess fetches ahead what any start is likely to read, where nothing says what
// this one will.
func (s *start) guess(image *openImage) {
	var wants []blockmap.Want
	if s.t.ahead.metadata {
		wants = image.MissingMetadata(smallMetadata)
	}
	if s.t.ahead.program {
		extents, err := s.image.manifest.Guess(image.Index().Blocks)
		if err != nil {
			s.t.log.Warn("the image's guess of its start is of no use", "image", s.image.name, "cause", err)
		}
		for _, e := range extents {
			wants = append(wants, image.Missing(e)...)
		}
	}
	if len(wants) > 0 && s.ctx.Err() == nil {
		s.guessed = image.fetcher.Replay(s.ctx, wants, fetcher.ReplayOptions{Rate: int64(s.t.rate)})
	}
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
			s.t.log.Warn("a trace is of no use", "trace", use, "image", s.image.name, "cause", err)
		}
		traces = append(traces, found...)
	}
	if len(traces) == 0 {
		return nil
	}
	merged, err := tracefile.Merge(traces...)
	if err != nil {
		s.t.log.Warn("the traces cannot be merged", "image", s.image.name, "cause", err)
		return nil
	}
	return merged
}

// read reads what one --trace names, and makes it be of b.
func (t *tracer) read(ctx context.Context, use string, b *blockImage) (traces []*tracefile.Trace, err error) {
	found, err := readNamed(ctx, t.opener.client, t.opener.platform, t.log, use)
	for _, r := range found {
		if r.Cut != nil && r.of == nil { // storedTraces has said so of the others
			t.log.Warn("a trace ends early; what there is of it is used", "trace", use, "cause", r.Cut)
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

func (s *start) startRecording(image *openImage) (blockmap.Device, error) {
	t := s.t
	rec := &recording{image: s.image, keep: t.record != "", ended: make(chan struct{})}
	var err error
	if rec.keep {
		rec.file, err = os.Create(t.record)
	} else {
		rec.file, err = os.CreateTemp("", "thaw-trace-")
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	rec.Recorder = tracefile.NewRecorder(image.Image, digestOf(s.image.manifest.Index.Digest), rec.file, tracefile.Options{
		For: t.recordFor, Bytes: int64(t.recordBytes), Quiet: t.recordQuiet,
	})
	t.mu.Lock()
	s.rec = rec
	t.mu.Unlock()
	go func() {
		defer close(rec.ended)
		<-rec.Done()
		t.finish(rec)
	}()
	return rec.Device(), nil
}

// finish says what was recorded, and stores it where that is wanted.
func (t *tracer) finish(rec *recording) {
	log := t.log.With("image", rec.image.name)
	defer rec.file.Close()
	if !rec.keep {
		defer os.Remove(rec.file.Name())
	}
	st, end := rec.Stats(), rec.End()
	if err := rec.Stop(); err != nil {
		log.Error("the recording is lost", "cause", err)
		return
	}
	log.Info("recorded a start", "ended", end.Why.String(), "bytes", st.Bytes, "dropped_bytes", st.Dropped, "file", rec.file.Name())
	if !t.push || st.Bytes == 0 {
		return
	}
	file, err := os.ReadFile(rec.file.Name())
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, err = pushTrace(ctx, rec.image, file)
	}
	if err != nil {
		log.Error("the recording could not be stored beside its image", "cause", err)
		return
	}
	log.Info("stored the recording beside its image")
}

// await returns when enough has been fetched ahead. When it cannot be, the start
// goes on without.
func (s *start) await(ctx context.Context) {
	if s.t.wait == 0 {
		return
	}
	select {
	case <-s.loaded:
	case <-ctx.Done():
		return
	}
	if s.replay == nil {
		return
	}
	if err := s.replay.Wait(ctx, float64(s.t.wait)/100); err != nil && ctx.Err() == nil {
		s.t.log.Warn("ready, though less than asked for was prefetched", "cause", err)
	}
}

// stopRecording ends the recording of the start, if there is one and it has not
// ended.
func (s *start) stopRecording() (stopped bool) {
	s.t.mu.Lock()
	rec := s.rec
	s.t.mu.Unlock()
	if rec == nil {
		return false
	}
	select {
	case <-rec.ended:
		return false
	default:
	}
	err := rec.Stop()
	<-rec.ended
	return err == nil
}

// stop ends all of it, and says what was lost. It is not called while attach is.
func (s *start) stop() {
	s.t.mu.Lock()
	_, first := s.t.starts[s]
	delete(s.t.starts, s)
	s.t.mu.Unlock()
	if !first {
		return
	}
	s.cancel()
	<-s.listed
	if !s.attached {
		return
	}
	s.stopRecording()
	<-s.loaded
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
	for _, s := range t.all() {
		s.stop()
	}
}

func (t *tracer) all() []*start {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Collect(maps.Keys(t.starts))
}

// stopRecording ends what is being recorded, and says how many recordings that
// were.
func (t *tracer) stopRecording() (n int) {
	for _, s := range t.all() {
		if s.stopRecording() {
			n++
		}
	}
	return n
}
