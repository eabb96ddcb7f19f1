package blockmap

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// errUnreadable says that a chunk is not stored, because the disk could not read it back
// when it was stored before.
var errUnreadable = errors.New("the disk takes this chunk and does not read it back: it is not stored again for some minutes")

const (
	// mostLost is how often a chunk is lost before it is no longer stored. Once may be
	// a file that somebody cut short.
	mostLost = 2
	// lostFor is when the disk is tried again.
	lostFor = 10 * time.Minute
)

// unreadable are the chunks of a stream that the disk has taken and not read back. Such a
// chunk would be fetched, stored, found unreadable, and fetched again, for as long as its
// reader waits. After mostLost times Fill refuses it, and it is held in memory instead.
type unreadable struct {
	any atomic.Bool // without any, nothing takes the lock
	mu  struct {
		sync.Mutex
		chunks map[int]lost
	}
}

type lost struct {
	times int
	at    time.Time // the last time
}

// add counts a chunk that could not be read.
func (u *unreadable) add(i int, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mu.chunks == nil {
		u.mu.chunks = make(map[int]lost)
	}
	l := u.mu.chunks[i]
	if now.Sub(l.at) > lostFor {
		l.times = 0
	}
	u.mu.chunks[i] = lost{l.times + 1, now}
	u.any.Store(true)
}

// has reports whether a chunk is not to be stored at present.
func (u *unreadable) has(i int, now time.Time) bool {
	if !u.any.Load() {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.mu.chunks[i]
	return l.times >= mostLost && now.Sub(l.at) <= lostFor
}
