package nbd

import (
	"sync/atomic"
	"testing"
)

// Who sends one request at a time is waited for on the thread; who sends more
// at once, even now and then, is parked; and threads are bounded.
func TestPace(t *testing.T) {
	var sleepers atomic.Int32
	p := pace{sleepers: &sleepers}
	for range loneReads {
		if p.stay() {
			t.Fatal("it stays for a client that it does not know")
		}
		p.got(true)
	}
	if !p.stay() || sleepers.Load() != 1 {
		t.Fatal("it parks for a client of depth 1")
	}
	p.leave()
	p.got(false)
	if p.stay() {
		t.Error("it stays for a client of more depth")
	}
	p.lone = loneReads
	sleepers.Store(maxSleepers)
	if p.stay() || sleepers.Load() != maxSleepers {
		t.Errorf("it stays, or counts itself, beyond the bound: %d", sleepers.Load())
	}
}
