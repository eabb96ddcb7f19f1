package host

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// recording is the recording of one start.
type recording struct {
	*tracefile.Recorder
	start *start
	file  *recordFile
	asked bool          // the user has named the file
	saved chan struct{} // closed when the file is complete, or lost
	ended chan struct{} // closed when it is stored beside the image too, if it is to be
	state string        // as in RecordingInfo; guarded by start.t.mu
}

// RecordingInfo describes the recording of a device's start.
type RecordingInfo struct {
	State   string `json:"state"` // recording, saved, stored (beside the image), discarded (nothing was read, or nothing new), or lost
	File    string `json:"file"`  // its present or future path; a stored recording keeps its file only if the user named it
	Ranges  int64  `json:"ranges"`
	Bytes   int64  `json:"bytes"`         // bytes that clients touched
	Dropped int64  `json:"dropped_bytes"` // bytes that clients touched too fast to be recorded
}

const (
	recordingNow       = "recording"
	recordingSaved     = "saved"
	recordingStored    = "stored"
	recordingDiscarded = "discarded"
	recordingLost      = "lost"
)

func (rec *recording) set(state string) {
	rec.start.t.mu.Lock()
	defer rec.start.t.mu.Unlock()
	rec.state = state
}

// recordingInfo returns nil if the start is not recorded.
func (s *start) recordingInfo() *RecordingInfo {
	s.t.mu.Lock()
	rec := s.rec
	if rec == nil {
		s.t.mu.Unlock()
		return nil
	}
	in := &RecordingInfo{State: rec.state, File: rec.file.target}
	s.t.mu.Unlock()
	st := rec.Stats()
	in.Ranges, in.Bytes, in.Dropped = st.Ranges, st.Bytes, st.Dropped
	return in
}

// pushTimeout bounds the push of a recording.
const pushTimeout = time.Minute

func (s *start) startRecording(image *openImage) (blockmap.Device, error) {
	t := s.t
	rec := &recording{start: s, asked: t.Record != "", saved: make(chan struct{}), ended: make(chan struct{}), state: recordingNow}
	var err error
	if rec.asked {
		rec.file, err = createRecord(t.Record, t.log)
	} else {
		rec.file, err = t.dir.create(s.image, t.log)
	}
	if err != nil {
		return nil, err
	}
	if rec.file.direct && t.Push {
		rec.file.discard()
		return nil, InvalidError{fmt.Errorf("record to %s: it is not a regular file, so the recording cannot be read back and stored beside the image", t.Record)}
	}
	rec.Recorder = tracefile.NewRecorder(image.Image, s.image.IndexDigest(), rec.file, tracefile.Options{
		For: t.RecordFor, Bytes: t.RecordBytes, Quiet: t.RecordQuiet,
	})
	t.mu.Lock()
	s.rec = rec
	t.mu.Unlock()
	go func() {
		defer close(rec.ended)
		<-rec.Done()
		if t.save(rec) && t.Push {
			t.conclude(rec)
		}
	}()
	return rec.Recorder, nil
}

// save completes the recording's file, and reports whether there is a file to store.
func (t *tracer) save(rec *recording) bool {
	defer close(rec.saved)
	log := t.log.With("image", rec.start.image.Name)
	st, end := rec.Stats(), rec.End()
	if err := rec.Stop(); err != nil {
		rec.set(recordingLost)
		log.Error("the recording is lost", "file", rec.file.target, "interrupted", rec.file.interrupted(), "err", err)
		return false
	}
	if !t.serving.Load() || st.Bytes == 0 && (!rec.asked || rec.file.exists()) {
		rec.set(recordingDiscarded)
		rec.file.discard()
		log.Info("nothing was read, so no recording is kept", "file", rec.file.target)
		return false
	}
	if err := rec.file.keep(); err != nil {
		rec.set(recordingLost)
		log.Error("the recording is lost", "file", rec.file.target, "err", err)
		return false
	}
	rec.set(recordingSaved)
	log.Info("recorded a start", "ended", end.Why.String(), "bytes", st.Bytes, "dropped_bytes", st.Dropped, "file", rec.file.target)
	if !rec.asked {
		t.dir.prune()
	}
	return st.Bytes > 0
}

// conclude decides what becomes of a recording: it is stored beside its image if nothing is
// there yet, if the user has named its file, or if the image's starts no longer read what is
// stored. Afterwards a bundle is packed if there is none, or none of these traces.
func (t *tracer) conclude(rec *recording) {
	s := rec.start
	listed, anew := false, false
	select {
	case <-s.listed:
		listed = true
	default:
	}
	if listed && t.auto() && s.found() {
		<-s.loaded
		if anew = t.compare(rec); !anew && !rec.asked {
			rec.set(recordingDiscarded)
			os.Remove(rec.file.target)
			if len(s.beside.Bundles) == 0 {
				t.pack(s, nil, false)
			}
			return
		}
	}
	file, err := os.ReadFile(rec.file.target)
	if err == nil {
		err = t.store(rec, file, anew)
	}
	if err != nil {
		t.log.Error("the recording could not be stored beside its image", "image", s.image.Name, "err", err, "file", rec.file.target,
			"remedy", fmt.Sprintf("thaw trace push %s %s", s.image.Reference(), rec.file.target))
		return
	}
	if t.auto() {
		t.pack(s, file, anew)
	}
}

// store stores the recording beside its image, and removes its file unless the user has
// named it.
func (t *tracer) store(rec *recording, file []byte, anew bool) error {
	ctx, cancel := context.WithTimeout(t.limit, pushTimeout)
	defer cancel()
	if _, err := rec.start.image.PushTrace(ctx, file, anew); err != nil {
		return err
	}
	rec.set(recordingStored)
	t.log.Info("stored the recording beside its image", "image", rec.start.image.Name, "instead_of_earlier_ones", anew)
	if !rec.asked {
		os.Remove(rec.file.target)
	}
	return nil
}

// stopRecording ends the recording of the start, if there is one. It returns when the
// file is complete, or when ctx ends, and reports whether it has ended a recording.
func (s *start) stopRecording(ctx context.Context) (stopped bool) {
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
	go func() { _ = rec.Stop() }() // Stop may wait for the reader of a FIFO
	return s.t.await(ctx, rec.saved) && rec.Stop() == nil
}

// stopRecordings ends all recordings, and returns how many it has ended.
func (t *tracer) stopRecordings(ctx context.Context) int {
	var n atomic.Int64
	var wg sync.WaitGroup
	for _, s := range t.all() {
		wg.Go(func() {
			if s.stopRecording(ctx) {
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return int(n.Load())
}
