package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/tracefile"
)

// A trace in a registry is a manifest of artifactTypeTrace whose one layer is
// the trace file, and whose subject is the block image that it is of.
const (
	artifactTypeTrace = "application/vnd.thaw.trace.v1"
	mediaTypeTrace    = types.MediaType("application/vnd.thaw.trace.v1")

	// maxTraces is how many traces of an image are looked at, the last ones.
	maxTraces = 32
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
}

func (o *traceOptions) auto() bool {
	for _, u := range o.use {
		if u == "auto" {
			return true
		}
	}
	return false
}

// check says what does not go together.
func (o *traceOptions) check(images int) error {
	switch {
	case o.record != "" && images != 1:
		return errors.New("--record is of one image: serve one")
	case o.push && !o.auto() && o.record == "":
		return errors.New("--trace-push needs a recording: --trace auto or --record FILE")
	case o.wait < 0 || o.wait > 100:
		return fmt.Errorf("--prefetch-wait %d: it is a percentage", o.wait)
	}
	return nil
}

// tracer records and replays the starts of the images that a server begins
// with.
type tracer struct {
	traceOptions
	opener *opener
	log    *slog.Logger

	mu         sync.Mutex // of what follows
	recordings []*recording
	replays    []*fetcher.Replay
}

// recording is a start that is being recorded.
type recording struct {
	*tracefile.Recorder
	image *blockImage
	file  *os.File
	keep  bool // it was asked for under this name
	ended chan struct{}
}

// attach makes of an image the device to serve: itself, with what its traces
// say being fetched ahead, or a recorder of it. What goes wrong with traces
// costs speed, and no more.
func (t *tracer) attach(ctx context.Context, b *blockImage, image *blockmap.Image) (blockmap.Device, error) {
	trace := t.find(ctx, b)
	if trace != nil {
		t.replay(ctx, b, image, trace)
	}
	if t.record == "" && (trace != nil || !t.auto()) {
		return image, nil
	}
	return t.startRecording(b, image)
}

// find collects the traces that are to be used for an image, and merges them.
func (t *tracer) find(ctx context.Context, b *blockImage) *tracefile.Trace {
	var traces []*tracefile.Trace
	for _, use := range t.use {
		found, err := t.load(ctx, use, b)
		if err != nil {
			t.log.Warn("a trace is of no use", "trace", use, "image", b.name, "cause", err)
		}
		traces = append(traces, found...)
	}
	if len(traces) == 0 {
		return nil
	}
	merged, err := tracefile.Merge(traces...)
	if err != nil {
		t.log.Warn("the traces cannot be merged", "image", b.name, "cause", err)
		return nil
	}
	return merged
}

// load reads what one --trace names: those stored beside the image, a file, or
// those stored beside another version of the image.
func (t *tracer) load(ctx context.Context, use string, b *blockImage) ([]*tracefile.Trace, error) {
	if use == "auto" {
		return storedTraces(ctx, b, t.log)
	}
	if f, err := os.Open(use); err == nil {
		defer f.Close()
		trace, err := tracefile.Read(f)
		if err != nil {
			return nil, err
		}
		return t.fit(trace, nil, b)
	}
	other, err := findImage(ctx, t.opener.client, use, t.opener.platform)
	if err != nil {
		return nil, fmt.Errorf("it is no file, and as an image: %w", err)
	}
	found, err := storedTraces(ctx, other, t.log)
	var traces []*tracefile.Trace
	for _, trace := range found {
		fitting, fitErr := t.fit(trace, other.index, b)
		err = errors.Join(err, fitErr)
		traces = append(traces, fitting...)
	}
	return traces, err
}

// fit makes a trace be one of b, where old is the index that it is of.
func (t *tracer) fit(trace *tracefile.Trace, old *blockmap.Index, b *blockImage) ([]*tracefile.Trace, error) {
	if trace.Cut != nil {
		t.log.Warn("a trace ends early; what there is of it is used", "cause", trace.Cut)
	}
	if trace.Index == digestOf(b.manifest.Index.Digest) {
		return []*tracefile.Trace{trace}, nil
	}
	if old == nil {
		// An index that was served once is still in the cache.
		encoded, err := t.opener.cache.Blob(trace.Index)
		if err != nil {
			return nil, tracefile.ErrOtherImage
		}
		if old, err = blockmap.DecodeIndex(encoded); err != nil {
			return nil, err
		}
	}
	translated, carried, err := tracefile.Translate(trace, old, b.index)
	if err != nil {
		return nil, err
	}
	t.log.Info("a trace of another version is used", "image", b.name, "what", carried.String())
	return []*tracefile.Trace{translated}, nil
}

// storedTraces reads the traces that are beside an image.
func storedTraces(ctx context.Context, b *blockImage, log *slog.Logger) ([]*tracefile.Trace, error) {
	all, err := b.repo.Referrers(ctx, v1.Descriptor{Digest: b.digest}, artifactTypeTrace)
	if err != nil {
		return nil, err
	}
	var traces []*tracefile.Trace
	for _, d := range all[max(0, len(all)-maxTraces):] {
		trace, err := storedTrace(ctx, b.repo, d)
		if err == nil && trace.Index != digestOf(b.manifest.Index.Digest) {
			err = tracefile.ErrOtherImage
		}
		if err != nil {
			log.Warn("a stored trace is of no use", "image", b.name, "manifest", d.Digest.String(), "cause", err)
			continue
		}
		traces = append(traces, trace)
	}
	return traces, nil
}

func storedTrace(ctx context.Context, repo *registry.Repo, d v1.Descriptor) (*tracefile.Trace, error) {
	raw, err := repo.Manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != mediaTypeTrace || m.Layers[0].Size > tracefile.MaxSize {
		return nil, errors.New("its manifest is not that of a trace")
	}
	blob, err := repo.Blob(ctx, m.Layers[0])
	if err != nil {
		return nil, err
	}
	return tracefile.Read(bytes.NewReader(blob))
}

// pushTrace stores a trace beside its image.
func pushTrace(ctx context.Context, b *blockImage, file []byte) (v1.Descriptor, error) {
	layer, err := b.repo.PushBytes(ctx, file, mediaTypeTrace)
	if err != nil {
		return v1.Descriptor{}, err
	}
	config, err := b.repo.PushBytes(ctx, []byte("{}"), "application/vnd.oci.empty.v1+json")
	if err != nil {
		return v1.Descriptor{}, err
	}
	raw, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: artifactTypeTrace, Config: config,
		Layers:  []v1.Descriptor{layer},
		Subject: &v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: b.digest, Size: b.size},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	return b.repo.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
}

// replay starts to fetch what a trace says.
func (t *tracer) replay(ctx context.Context, b *blockImage, image *blockmap.Image, trace *tracefile.Trace) {
	plan, err := tracefile.NewPlan(trace, image.Index())
	if err == nil {
		var wants []blockmap.Want
		if wants, err = plan.Wants(t.opener.cache.Stream); err == nil {
			r := t.opener.fetcher.From(origin{b.repo}).Replay(ctx, wants, fetcher.ReplayOptions{Rate: int64(t.rate)})
			t.mu.Lock()
			t.replays = append(t.replays, r)
			t.mu.Unlock()
			t.log.Info("replaying a trace", "image", b.name, "starts", trace.Starts, "chunks", len(wants), "stored_bytes", plan.Stored)
			return
		}
	}
	t.log.Warn("the trace cannot be replayed", "image", b.name, "cause", err)
}

// await returns when enough has been prefetched. When it cannot be, the start
// goes on without.
func (t *tracer) await(ctx context.Context) {
	if t.wait == 0 {
		return
	}
	for _, r := range t.replays {
		if err := r.Wait(ctx, float64(t.wait)/100); err != nil && ctx.Err() == nil {
			t.log.Warn("ready, though less than asked for was prefetched", "cause", err)
		}
	}
}

func (t *tracer) startRecording(b *blockImage, image *blockmap.Image) (blockmap.Device, error) {
	rec := &recording{image: b, keep: t.record != "", ended: make(chan struct{})}
	var err error
	if rec.keep {
		rec.file, err = os.Create(t.record)
	} else {
		rec.file, err = os.CreateTemp("", "thaw-trace-")
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	rec.Recorder = tracefile.NewRecorder(image, digestOf(b.manifest.Index.Digest), rec.file, tracefile.Options{
		For: t.recordFor, Bytes: int64(t.recordBytes), Quiet: t.recordQuiet,
	})
	t.mu.Lock()
	t.recordings = append(t.recordings, rec)
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

// stopRecording ends what is being recorded, and says how many recordings that
// were.
func (t *tracer) stopRecording() (n int) {
	t.mu.Lock()
	recordings := t.recordings
	t.recordings = nil
	t.mu.Unlock()
	for _, rec := range recordings {
		if err := rec.Stop(); err == nil {
			n++
		}
		<-rec.ended
	}
	return n
}

// stop ends all of it, and says what was lost.
func (t *tracer) stop() {
	t.stopRecording()
	t.mu.Lock()
	replays := t.replays
	t.replays = nil
	t.mu.Unlock()
	for _, r := range replays {
		r.Stop()
		p := r.Progress()
		log := t.log.Info
		if p.Failed > 0 {
			log = t.log.Warn
		}
		log("replayed", "chunks", p.DoneChunks, "of", p.Chunks, "bytes", p.DoneBytes, "failed", p.Failed,
			"seconds", p.Ended.Sub(p.Began).Seconds())
	}
}
