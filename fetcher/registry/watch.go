package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// leastBytes is what the body of an answer must bring in each StallTimeout that
// is spent waiting for it, or all that is left of it if that is less. A timer
// that any byte resets lets a server hold a reader for ever with a byte a
// second. 16 KiB are 2 KiB/s at 8 s: a line of 1 Mbit/s that 60 requests share
// is faster, and a server that trickles is given up after one StallTimeout, or
// half of it if it is a mirror.
const leastBytes = 16 << 10

// Bounds of what is read though nobody waits for it.
const (
	// drainTime is how long the rest of an answer may take whose only use is
	// that the connection can be used again.
	drainTime = 100 * time.Millisecond
	// refusalTime is how long the text of a refusal may take.
	refusalTime = 2 * time.Second
	// prefixSpeed, in bytes a second, is how fast the bytes before a range must
	// come from a server that sends the whole blob.
	prefixSpeed = 1 << 20
)

// watch ends a request that makes no progress.
type watch struct {
	cancel context.CancelCauseFunc
	mu     struct {
		sync.Mutex
		answered bool
	}
	timer *time.Timer
}

// sent tells of progress in sending, which no longer counts once there is an
// answer.
func (w *watch) sent(next time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.mu.answered {
		w.timer.Reset(next)
	}
}

func (w *watch) answered() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.answered = true
	w.timer.Stop()
}

func (w *watch) end() {
	w.timer.Stop()
	w.cancel(nil)
}

// sentBody is the body of a request. The transport reads it a buffer at a time,
// and each has to be taken within stall.
type sentBody struct {
	rc              io.ReadCloser
	w               *watch
	left            int64
	stall, patience time.Duration
}

func (b *sentBody) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	b.left -= int64(n)
	next := b.stall
	if b.left <= 0 {
		next = b.patience
	}
	b.w.sent(next)
	return n, err
}

func (b *sentBody) Close() error { return b.rc.Close() }

// watchedBody is the body of an answer: counted, ended when it is too slow, and
// with errors that say what happened. Only the time spent in Read counts, so a
// slow reader is not the server's fault.
type watchedBody struct {
	rc  io.ReadCloser
	w   *watch
	req *http.Request
	src *source

	window time.Duration // in which leastBytes must come
	left   time.Duration // of the window
	came   int64         // in the window

	limited bool
	total   time.Duration // left for all that is still to come, if limited
}

// limit bounds the time that all further reads may take together.
func (b *watchedBody) limit(d time.Duration) {
	if !b.limited || d < b.total {
		b.limited, b.total = true, d
	}
}

// unlimit takes the limit away.
func (b *watchedBody) unlimit() { b.limited = false }

func (b *watchedBody) Read(p []byte) (int, error) {
	patience := b.left
	if b.limited {
		patience = min(patience, b.total)
	}
	start := time.Now()
	b.w.timer.Reset(patience)
	n, err := b.rc.Read(p)
	b.w.timer.Stop()
	took := time.Since(start)
	b.left -= took
	b.total -= took
	if b.came += int64(n); b.came >= leastBytes {
		b.came, b.left = 0, b.window
	}
	b.src.bytes.Add(int64(n))
	switch {
	case err == nil, err == io.EOF:
		return n, err
	case errors.Is(err, io.ErrUnexpectedEOF) && context.Cause(b.req.Context()) == nil:
		err = &httpError{method: b.req.Method, url: redact(b.req.URL), err: ErrTruncated}
	default:
		err = noAnswer(b.req, err)
	}
	return n, err
}

// trickles says whether a reader has waited for a second or more and the body
// has come more slowly than it must.
func (b *watchedBody) trickles() bool {
	waited := b.window - b.left
	return waited >= min(time.Second, b.window/2) && float64(b.came) < leastBytes*waited.Seconds()/b.window.Seconds()
}

func (b *watchedBody) Close() error {
	err := b.rc.Close()
	b.w.end()
	return err
}

// limitBody bounds the time that the rest of an answer may take.
func limitBody(resp *http.Response, d time.Duration) {
	if b, ok := resp.Body.(*watchedBody); ok {
		b.limit(d)
	}
}

// discard closes an answer whose body nobody wants. A short one is read, so that
// the connection can be used again.
func discard(resp *http.Response) {
	limitBody(resp, drainTime)
	io.CopyN(io.Discard, resp.Body, 8<<10)
	resp.Body.Close()
}
