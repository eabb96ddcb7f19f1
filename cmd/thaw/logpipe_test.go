package main

import (
	"io"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// slowWriter takes so long for a line.
type slowWriter struct {
	each  time.Duration
	lines int
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(w.each)
	w.lines++
	return len(p), nil
}

// At the end the lines that wait are written as long as somebody takes them, also on a busy
// machine, where each takes a while.
func TestLogAtTheEnd(t *testing.T) {
	for _, c := range []struct {
		each  time.Duration
		lines int
		took  time.Duration
	}{
		{0, 10, 0},
		{200 * time.Millisecond, 10, 2 * time.Second},
		{200 * time.Millisecond, 50, 10 * time.Second}, // of which there is no time for the last ones
		{time.Minute, 10, 250 * time.Millisecond},      // nobody takes them
	} {
		synctest.Test(t, func(t *testing.T) {
			w := &slowWriter{each: c.each}
			p := newLogPipe(w, slog.New(slog.DiscardHandler))
			for range c.lines {
				io.WriteString(p, "a line\n")
			}
			began := time.Now()
			p.close(250*time.Millisecond, 5*time.Second)
			if took, most := time.Since(began), min(c.took, 5*time.Second); took != most {
				t.Errorf("%d lines of %v: it has waited for %v instead of %v", c.lines, c.each, took, most)
			}
			select {
			case <-p.done:
			default:
				if c.took <= 5*time.Second && c.each < 250*time.Millisecond {
					t.Errorf("%d lines of %v: not all are written", c.lines, c.each)
				}
			}
			<-p.done
		})
	}
}
