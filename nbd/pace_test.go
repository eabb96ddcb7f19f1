package nbd

import (
	"sync/atomic"
	"testing"
)

// A thread waits for a client that sends one request at a time, unless there are other
// clients. A client that sends more at once, even occasionally, is parked.
func TestPace(t *testing.T) {
	var clients atomic.Int32
	clients.Store(1)
	p := pace{clients: &clients}
	for range loneReads {
		if p.stay() {
			t.Fatal("the thread waits for an unknown client")
		}
		p.got(true)
	}
	if !p.stay() {
		t.Fatal("the thread does not wait for a client of depth 1")
	}
	clients.Store(2)
	if p.stay() {
		t.Error("the thread waits for one of two clients")
	}
	clients.Store(1)
	p.got(false)
	if p.stay() {
		t.Error("the thread waits for a client of greater depth")
	}
}
