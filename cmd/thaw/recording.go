package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// recording is a start that is being recorded.
type recording struct {
	*tracefile.Recorder
	start *start
	file  *recordFile
	asked bool          // for under this name: its file is the result
	saved chan struct{} // closed when the file is there, or lost
	ended chan struct{} // closed when it is stored beside the image, where that is wanted
}

// pushTimeout bounds how long a recording is on its way to the registry.
const pushTimeout = time.Minute

func (s *start) startRecording(image *openImage) (blockmap.Device, error) {
	t := s.t
	rec := &recording{start: s, asked: t.record != "", saved: make(chan struct{}), ended: make(chan struct{})}
	var err error
	if rec.asked {
		rec.file, err = createRecord(t.record, t.log)
	} else {
		rec.file, err = t.dir.create(s.image, t.log)
	}
	if err != nil {
		return nil, err
	}
	if rec.file.direct && t.push {
		rec.file.discard()
		return nil, usageError{fmt.Errorf("--trace-push reads the recording back: --record %s is not a regular file", t.record)}
	}
	rec.Recorder = tracefile.NewRecorder(image.Image, s.image.indexDigest(), rec.file, tracefile.Options{
		For: t.recordFor, Bytes: int64(t.recordBytes), Quiet: t.recordQuiet,
	})
	t.mu.Lock()
	s.rec = rec
	t.mu.Unlock()
	go func() {
		defer close(rec.ended)
		<-rec.Done()
		if t.save(rec) && t.push {
			t.store(rec)
		}
	}()
	return rec.Recorder, nil
}

// save makes the recording's file what it is to be, and says whether there is one
// to store.
func (t *tracer) save(rec *recording) bool {
	defer close(rec.saved)
	log := t.log.With("image", rec.start.image.name)
	st, end := rec.Stats(), rec.End()
	if err := rec.Stop(); err != nil {
		log.Error("the recording is lost", "file", rec.file.target, "interrupted", rec.file.interrupted(), "err", err)
		return false
	}
	if !t.ready.Load() || st.Bytes == 0 && (!rec.asked || rec.file.exists()) {
		rec.file.discard()
		log.Info("nothing was read, so there is no recording", "file", rec.file.target)
		return false
	}
	if err := rec.file.keep(); err != nil {
		log.Error("the recording is lost", "file", rec.file.target, "err", err)
		return false
	}
	log.Info("recorded a start", "ended", end.Why.String(), "bytes", st.Bytes, "dropped_bytes", st.Dropped, "file", rec.file.target)
	if !rec.asked {
		t.dir.prune()
	}
	return st.Bytes > 0
}

// store stores the recording beside its image. One that nobody asked for by name
// has no other use.
func (t *tracer) store(rec *recording) {
	image := rec.start.image
	log := t.log.With("image", image.name)
	select {
	case <-rec.start.listed:
		if !rec.asked && rec.start.found() {
			log.Info("traces are beside the image by now; the recording stays where it is", "file", rec.file.target)
			return
		}
	default:
	}
	ctx, cancel := context.WithTimeout(t.limit, pushTimeout)
	defer cancel()
	file, err := os.ReadFile(rec.file.target)
	if err == nil {
		_, err = pushTrace(ctx, image, file)
	}
	if err != nil {
		log.Error("the recording could not be stored beside its image", "err", err, "file", rec.file.target,
			"remedy", fmt.Sprintf("thaw trace push %s %s", image.at(), rec.file.target))
		return
	}
	log.Info("stored the recording beside its image")
	if !rec.asked {
		os.Remove(rec.file.target)
	}
}

// stopRecording ends the recording of the start, if there is one and it has not
// ended, and returns when its file is there.
func (s *start) stopRecording() (stopped bool) {
	s.t.mu.Lock()
	rec := s.rec
	s.t.mu.Unlock()
	if rec == nil {
		return false
	}
	select {
	case <-rec.saved:
		return false
	default:
	}
	go rec.Stop() // which waits for whoever reads a FIFO
	return s.t.await(rec.saved) && rec.Stop() == nil
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
