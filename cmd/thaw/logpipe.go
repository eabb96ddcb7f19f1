package main

import (
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// logPipe writes a log from a goroutine of its own, because the reader of stderr may be
// slow, stopped or gone, and no client of a server must wait for it. Lines that do not
// fit in the buffer are dropped and counted; lines that cannot be written are lost.
type logPipe struct {
	w    io.Writer
	done chan struct{}
	next chan struct{} // has a token when a line was written

	mu struct {
		sync.Mutex
		lines   chan []byte // nil once it is closed
		dropped int
	}
}

// logLines is how many lines may wait.
const logLines = 1024

// newLogPipe starts a pipe to w. It logs to warn how many lines were dropped.
func newLogPipe(w io.Writer, warn *slog.Logger) *logPipe {
	p := &logPipe{w: w, done: make(chan struct{}), next: make(chan struct{}, 1)}
	lines := make(chan []byte, logLines)
	p.mu.lines = lines
	go func() {
		defer close(p.done)
		for line := range lines {
			_, _ = w.Write(line)
			select {
			case p.next <- struct{}{}:
			default:
			}
			p.mu.Lock()
			n := p.mu.dropped
			p.mu.dropped = 0
			p.mu.Unlock()
			if n > 0 {
				warn.Warn("log lines were dropped: nothing reads them fast enough", "lines", n)
			}
		}
	}()
	return p
}

// Write takes one line. It never fails and never waits.
func (p *logPipe) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case p.mu.lines <- slices.Clone(line):
	default:
		p.mu.dropped++
	}
	return len(line), nil
}

// close writes the lines that wait, as long as each takes less than line, and all of them less
// than all.
func (p *logPipe) close(line, all time.Duration) {
	p.mu.Lock()
	lines := p.mu.lines
	p.mu.lines = nil // a nil channel takes nothing
	p.mu.Unlock()
	if lines != nil {
		close(lines)
	}
	end := time.NewTimer(all)
	defer end.Stop()
	for {
		stuck := time.NewTimer(line)
		select {
		case <-p.next:
			stuck.Stop()
			continue
		case <-p.done:
		case <-stuck.C:
		case <-end.C:
		}
		stuck.Stop()
		return
	}
}
