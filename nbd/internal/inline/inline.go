// Package inline decides which writes whoever serves a queue does itself, and notices the one
// that takes long.
//
// To give a write away takes two switches between threads, which cost several times what a
// small write of whole blocks does: the device puts the bytes in the page cache. It reads
// nothing for whole blocks, so it waits for no origin.
//
// Such a write may wait for the disk all the same, and the other requests of the queue with
// it: where the disk is slower than the writers, say. So writes are given away after a slow
// one, for longer each time, until one is fast again ([Writes]). And where another goroutine
// can serve the queue, it takes over from one that is stuck in a request ([Watchdog]).
package inline

import (
	"time"

	"thaw/blockmap"
)

// MaxLen is how many bytes a write has at most that a queue's thread does.
const MaxLen = 64 << 10

const (
	slow    = 2 * time.Millisecond // a write that takes longer is slow
	awayMin = 64                   // writes that are given away after a slow one
	awayMax = 64 << 6              // and after many
)

// Writes is what the thread of a queue knows of its own writes. It is for one goroutine.
type Writes struct {
	away int // writes to come that are given away
	next int // how many they are after the next slow one
}

// Take reports whether the thread is to do a write of e. The write is not one that has to
// be durable at its end.
func (w *Writes) Take(e blockmap.Extent) bool {
	if e.Len() > MaxLen || e.Start%blockmap.BlockSize != 0 || e.End%blockmap.BlockSize != 0 {
		return false
	}
	if w.away > 0 {
		w.away--
		return false
	}
	return true
}

// Took notes how long a write took that the thread did.
func (w *Writes) Took(d time.Duration) {
	if d <= slow {
		w.next = awayMin
		return
	}
	w.next = max(w.next, awayMin)
	w.away, w.next = w.next, min(2*w.next, awayMax)
}
