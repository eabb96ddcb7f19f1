package nbd

import (
	"errors"
	"os"
	"time"
)

// idle bounds how long a session may go without a byte from the client and
// without a request in flight. It is the reader's own.
type idle struct {
	limit  time.Duration // 0: none
	last   time.Time     // when the client sent something
	before int           // requests in flight whose payload the reader waits for
}

// begin starts the clock.
func (i *idle) begin(s *session) {
	if i.limit > 0 {
		i.last = time.Now()
		s.c.setReadDeadline(i.last.Add(i.limit))
	}
}

// read is called after each read of s, with its error. It returns the error to go on
// with, or again where the deadline was too early and the caller is to read again: the
// deadline is not set anew for each read.
func (i *idle) read(s *session, err error) (again bool, _ error) {
	now := time.Now()
	if err == nil {
		i.last = now
		return false, nil
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || s.c.draining() {
		return false, err
	}
	s.mu.Lock()
	since := i.last
	if s.mu.wrote.After(since) {
		since = s.mu.wrote
	}
	if s.mu.writing || s.client.InFlight().Requests > i.before {
		since = now
	}
	s.mu.Unlock()
	if now.Sub(since) >= i.limit {
		return false, errIdle
	}
	s.c.setReadDeadline(since.Add(i.limit))
	return true, nil
}
