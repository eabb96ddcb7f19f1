package nbd

import (
	"sync/atomic"
	"testing"
)

// Who sends one request at a time is waited for on the thread, unless there are
// other clients; who sends more at once, even now and then, is parked.
func TestPace(t *testing.T) {
	var clients atomic.Int32
	clients.Store(1)
	p := pace{clients: &clients}
	for range loneReads {
		if p.stay() {
			t.Fatal("it stays for a client that it does not know")
		}
		p.got(true)
	}
	if !p.stay() {
		t.Fatal("it parks for a client of depth 1")
	}
	clients.Store(2)
	if p.stay() {
		t.Error("it stays for one of two clients")
	}
	clients.Store(1)
	p.got(false)
	if p.stay() {
		t.Error("it stays for a client of more depth")
	}
}
