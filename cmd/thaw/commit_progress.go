package main

import (
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// commitState is how far a commit of a server was when it was asked last.
type commitState struct {
	atomic.Pointer[host.CommitInfo]
}

// commitProgress shows how a commit goes, on stderr: a row on a terminal, and a line at
// times elsewhere.
type commitProgress struct {
	to   string
	now  func() *host.CommitInfo // nil: not known yet
	rate meter
}

// showCommit begins to show a commit to dst. The caller calls stop.
func showCommit(a *app, log *slog.Logger, dst string, now func() *host.CommitInfo) (stop func()) {
	p := &commitProgress{to: dst, now: now}
	if s, ok := a.stderr.(*screen); ok {
		s.start(p.rows)
		return s.stop
	}
	ended, left := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(left)
		p.lines(a.stderr, log, a.logFormat == "json", ended)
	}()
	return func() {
		close(ended)
		select {
		case <-left:
		case <-time.After(stuckAfter):
		}
	}
}

func (p *commitProgress) lines(out io.Writer, log *slog.Logger, json bool, ended <-chan struct{}) {
	t := time.NewTicker(lineInterval)
	defer t.Stop()
	for {
		select {
		case <-ended:
			return
		case now := <-t.C:
			text, _ := p.text(now)
			if json {
				log.Info("committing", "target", p.to, "status", text)
			} else {
				fmt.Fprintln(out, text)
			}
		}
	}
}

func (p *commitProgress) rows(now time.Time, width, _ int) []string {
	text, part := p.text(now)
	return []string{fit(width, "commit"+bar(part)+text, text)}
}

// text says what the commit does, and how much of it is done.
func (p *commitProgress) text(now time.Time) (text string, part float64) {
	c := p.now()
	switch {
	case c == nil || c.Changed == 0 && c.Copy == 0:
		return "comparing what was written", 0
	case c.Send == 0 && c.Read < c.Changed:
		return "reading " + amount(c.Read, c.Changed) + rateString(p.rate.rate(now, c.Read)), float64(c.Read) / float64(c.Changed) / 2
	}
	send, sent := c.Send+c.Copy, c.Sent+c.Copied
	if send == 0 {
		return "pushing the index", 1
	}
	return "pushing " + amount(sent, send) + rateString(p.rate.rate(now, sent)), 0.5 + float64(sent)/float64(send)/2
}
