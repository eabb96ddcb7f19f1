// Package lines bounds log lines that a client, a guest or a front end can cause as often as it likes.
package lines

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Limiter writes at most one line a second. The next line says how many were suppressed.
// The zero value is ready.
type Limiter struct {
	mu struct {
		sync.Mutex
		next       time.Time
		suppressed int
	}
}

const every = time.Second

// Log writes a line, unless there was one within the last second.
func (l *Limiter) Log(log *slog.Logger, level slog.Level, msg string, args ...any) {
	l.mu.Lock()
	now := time.Now()
	if now.Before(l.mu.next) {
		l.mu.suppressed++
		l.mu.Unlock()
		return
	}
	n := l.mu.suppressed
	l.mu.next, l.mu.suppressed = now.Add(every), 0
	l.mu.Unlock()
	if n > 0 {
		args = append(args, "suppressed", n)
	}
	log.Log(context.Background(), level, msg, args...)
}
