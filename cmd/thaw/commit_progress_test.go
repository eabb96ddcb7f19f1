package main

import (
	"strings"
	"testing"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// The row of a commit says what it does, and its bar never goes back.
func TestCommitProgress(t *testing.T) {
	var now *host.CommitInfo
	p := &commitProgress{to: "registry.example/app:v1", now: func() *host.CommitInfo { return now }}
	begin := time.Now()
	bar := -1
	for i, c := range []struct {
		at   *host.CommitInfo
		want string
	}{
		{nil, "comparing what was written"},
		{&host.CommitInfo{}, "comparing what was written"},
		{&host.CommitInfo{Changed: 100 << 20, Read: 25 << 20}, "reading 25 of 100 MiB"},
		{&host.CommitInfo{Changed: 100 << 20, Read: 100 << 20, Send: 40 << 20}, "pushing 0 B of 40 MiB"},
		{&host.CommitInfo{Changed: 100 << 20, Read: 100 << 20, Send: 40 << 20, Sent: 30 << 20}, "pushing 30 of 40 MiB"},
		{&host.CommitInfo{Changed: 100 << 20, Read: 100 << 20, Send: 40 << 20, Sent: 40 << 20, Copy: 10 << 20, Copied: 10 << 20}, "pushing 50 of 50 MiB"},
		{&host.CommitInfo{Changed: 1 << 20, Read: 1 << 20}, "pushing the index"},
	} {
		now = c.at
		rows := p.rows(begin.Add(time.Duration(i)*time.Second), 80, 24)
		if len(rows) != 1 || !strings.Contains(rows[0], c.want) || len(rows[0]) > 80 {
			t.Errorf("%+v: %q, want %q", c.at, rows, c.want)
		}
		if n := strings.Count(rows[0], "#"); n < bar {
			t.Errorf("%q goes back from %d", rows[0], bar)
		} else {
			bar = n
		}
		if rows := p.rows(begin.Add(time.Duration(i)*time.Second), 20, 24); len(rows[0]) > 20 {
			t.Errorf("%q is wider than 20", rows[0])
		}
	}
}
