package vhost

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// limiter writes at most one line a second. The next line says how many were suppressed.
// It is for lines that a guest or a front end can cause as often as it likes.
type limiter struct {
	mu struct {
		sync.Mutex
		next       time.Time
		suppressed int
	}
}

const lineEvery = time.Second

func (l *limiter) log(log *slog.Logger, level slog.Level, msg string, args ...any) {
	l.mu.Lock()
	now := time.Now()
	if now.Before(l.mu.next) {
		l.mu.suppressed++
		l.mu.Unlock()
		return
	}
	n := l.mu.suppressed
	l.mu.next, l.mu.suppressed = now.Add(lineEvery), 0
	l.mu.Unlock()
	if n > 0 {
		args = append(args, "suppressed", n)
	}
	log.Log(context.Background(), level, msg, args...)
}
