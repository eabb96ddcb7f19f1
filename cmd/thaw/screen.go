package main

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"
)

// screen is a terminal that shows rows which change, below what is written to it.
// It uses two sequences of ECMA-48, which every terminal knows: cursor up (CUU) and
// erase to the end of the screen (ED).
type screen struct {
	out  io.Writer
	size func() (width, height int) // of the terminal in characters, as of now

	mu    sync.Mutex // guards what follows, and out
	rows  func(now time.Time, width, most int) []string
	drawn []int // the lengths of the rows that are shown
	ended chan struct{}
	left  chan struct{}
}

// frame is the time between two drawings: quick enough for the eye, and for a slow
// line no load.
const frame = 100 * time.Millisecond

// stuckAfter is how long the end of a build waits for stderr.
const stuckAfter = time.Second

// start draws rows from now on, until stop. rows gets the widest row and the most
// rows that fit.
func (s *screen) start(rows func(now time.Time, width, most int) []string) {
	s.rows, s.ended, s.left = rows, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(s.left)
		t := time.NewTicker(frame)
		defer t.Stop()
		for {
			select {
			case <-s.ended:
				return
			case now := <-t.C:
				s.draw(now)
			}
		}
	}()
}

// stop takes the rows away. It gives up on a terminal that takes nothing.
func (s *screen) stop() {
	close(s.ended)
	t := time.NewTimer(stuckAfter)
	defer t.Stop()
	select {
	case <-s.left:
	case <-t.C:
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var b bytes.Buffer
	s.erase(&b)
	_, _ = s.out.Write(b.Bytes())
}

// draw replaces the rows that are shown.
func (s *screen) draw(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	width, height := s.size()
	var b bytes.Buffer
	s.erase(&b)
	// A row that reaches the last column makes some terminals go to the next line.
	for _, row := range s.rows(now, width-1, height-1) {
		b.WriteString(row)
		b.WriteByte('\n')
		s.drawn = append(s.drawn, len(row))
	}
	_, _ = s.out.Write(b.Bytes())
}

// erase takes the rows off the screen, of which some are several lines if the
// terminal has become narrower.
func (s *screen) erase(b *bytes.Buffer) {
	width, _ := s.size()
	lines := 0
	for _, n := range s.drawn {
		lines += max(1, (n+width-1)/max(width, 1))
	}
	if lines > 0 {
		fmt.Fprintf(b, "\x1b[%dA\x1b[J", lines)
	}
	s.drawn = nil
}

// Write writes above the rows, which are drawn anew soon. p is whole lines.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b bytes.Buffer
	s.erase(&b)
	b.Write(p)
	if _, err := s.out.Write(b.Bytes()); err != nil {
		return 0, err
	}
	return len(p), nil
}
