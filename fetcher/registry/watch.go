package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"
)

// leastBytes is how many bytes the body of an answer must bring in each StallTimeout that a
// reader waits for it, or the rest of the body if that is less. With a timer that any byte
// resets, a server could hold a reader for ever with a byte a second. 16 KiB in 8 s are
// 2 KiB/s: a link of 1 Mbit/s that 60 requests share is faster. A server that trickles is
// given up after one StallTimeout, or half of it if it is a mirror.
const leastBytes = 16 << 10

// Limits of reading what no caller asked for.
const (
	// drainTime limits reading the rest of an answer, which only frees the connection for
	// another request. It is the default of Options.drain.
	drainTime = 100 * time.Millisecond
	// drainBytes is how much of it: more would cost more than a connection.
	drainBytes = 32 << 10
	// refusalTime limits reading the text of a refusal.
	refusalTime = 2 * time.Second
	// prefixSpeed, in bytes a second, is how fast the bytes before a range must
	// come from a server that sends the whole blob.
	prefixSpeed = 1 << 20
)

// watch cancels a request that makes no progress.
type watch struct {
	cancel context.CancelCauseFunc
	mu     struct {
		sync.Mutex
		answered bool
	}
	timer *time.Timer
}

// sent notes progress in sending the body, which no longer matters once there is an answer.
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

// sentBody is the body of a request. The transport reads it a buffer at a time, and must send
// each within stall.
type sentBody struct {
	rc           io.ReadCloser
	w            *watch
	left         int64
	stall, limit time.Duration
}

func (b *sentBody) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	b.left -= int64(n)
	next := b.stall
	if b.left <= 0 {
		next = b.limit
	}
	b.w.sent(next)
	return n, err
}

func (b *sentBody) Close() error { return b.rc.Close() }

// watchedBody is the body of an answer. It counts bytes, is cancelled when it is too slow, and
// explains its errors. Only the time in Read counts, so a slow reader is not taken for a slow
// server.
type watchedBody struct {
	rc  io.ReadCloser
	w   *watch
	req *http.Request
	src *source

	drain  time.Duration // for what nobody asked for
	window time.Duration // in which leastBytes must come
	left   time.Duration // of the window
	came   int64         // in the window

	limited bool
	total   time.Duration // left for all further reads, if limited
}

// limit bounds the time that all further reads may take together.
func (b *watchedBody) limit(d time.Duration) {
	if !b.limited || d < b.total {
		b.limited, b.total = true, d
	}
}

// unlimit removes the limit.
func (b *watchedBody) unlimit() { b.limited = false }

func (b *watchedBody) Read(p []byte) (int, error) {
	limit := b.left
	if b.limited {
		limit = min(limit, b.total)
	}
	start := time.Now()
	b.w.timer.Reset(limit)
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

// trickles says whether a reader has waited for a second or more, and the body is slower than
// it must be.
func (b *watchedBody) trickles() bool {
	waited := b.window - b.left
	return waited >= min(time.Second, b.window/2) && float64(b.came) < leastBytes*waited.Seconds()/b.window.Seconds()
}

func (b *watchedBody) Close() error {
	err := b.rc.Close()
	b.w.end()
	return err
}

// limitBody limits the time for the rest of an answer.
func limitBody(resp *http.Response, d time.Duration) {
	if b, ok := resp.Body.(*watchedBody); ok {
		b.limit(d)
	}
}

// discard closes an answer whose body is not needed. It reads a short one first, so that the
// connection can be used again.
func discard(resp *http.Response) {
	if b, ok := resp.Body.(*watchedBody); ok {
		b.limit(b.drain)
	}
	_, _ = io.CopyN(io.Discard, resp.Body, 8<<10)
	resp.Body.Close()
}
