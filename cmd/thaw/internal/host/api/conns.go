package api

import (
	"context"
	"net"
	"net/http"
	"sync"

	"golang.org/x/sys/unix"
)

// Bounds of what clients can take, all of them and each process. There are fewer busy
// connections than connections, so that one of the others can always go.
const (
	maxConns        = 64
	maxConnsProcess = 32
	maxBusy         = 48 // requests at a time
	maxBusyProcess  = 24
	maxWaits        = 32 // of these, that wait for the registry, files or other clients
	maxWaitsProcess = 8
)

// conns are the connections of a server. Each is one of a process, and busy while a
// request of it is worked on. Others wait for their clients, and are closed for new ones.
type conns struct {
	mu   sync.Mutex
	open map[net.Conn]*conn
	next uint64
}

// conn is a connection. Its fields are guarded by the mu of its conns.
type conn struct {
	nc    net.Conn
	pid   int
	order uint64
	busy  bool
	waits bool
}

type connKey struct{}

// add makes room for a connection. It is the http.Server's ConnContext.
func (x *conns) add(ctx context.Context, nc net.Conn) context.Context {
	c := &conn{nc: nc, pid: process(nc)}
	x.mu.Lock()
	over := x.makeRoom(c.pid)
	c.order = x.next
	x.next++
	x.open[nc] = c
	x.mu.Unlock()
	if over != nil {
		over.Close()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// makeRoom takes out the connection to close so that one more of process pid has room,
// nil where none has to go. x.mu is held.
func (x *conns) makeRoom(pid int) net.Conn {
	of := make(map[int]int)
	for _, c := range x.open {
		of[c.pid]++
	}
	var all, process *conn // the oldest that is not busy, of the largest party and of pid
	for _, c := range x.open {
		if c.busy {
			continue
		}
		if c.pid == pid && (process == nil || c.order < process.order) {
			process = c
		}
		if all == nil || of[c.pid] > of[all.pid] || of[c.pid] == of[all.pid] && c.order < all.order {
			all = c
		}
	}
	victim := all
	switch {
	case of[pid] >= maxConnsProcess:
		victim = process
	case len(x.open) < maxConns:
		return nil
	}
	if victim == nil {
		return nil
	}
	delete(x.open, victim.nc)
	return victim.nc
}

// changed forgets connections that are closed. It is the http.Server's ConnState.
func (x *conns) changed(nc net.Conn, state http.ConnState) {
	if state == http.StateClosed || state == http.StateHijacked {
		x.mu.Lock()
		defer x.mu.Unlock()
		delete(x.open, nc)
	}
}

// begin says that a request of c is worked on. It reports false where there are too many
// already.
func (x *conns) begin(c *conn, waits bool) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	var busy, busySame, waiting, waitingSame int
	for _, o := range x.open {
		if !o.busy {
			continue
		}
		busy++
		if o.pid == c.pid {
			busySame++
		}
		if o.waits {
			waiting++
			if o.pid == c.pid {
				waitingSame++
			}
		}
	}
	if busy >= maxBusy || busySame >= maxBusyProcess || waits && (waiting >= maxWaits || waitingSame >= maxWaitsProcess) || x.open[c.nc] != c {
		return false // the last: it was closed for another one
	}
	c.busy, c.waits = true, waits
	return true
}

func (x *conns) end(c *conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	c.busy, c.waits = false, false
}

// closeIdle closes the connections that wait for their clients.
func (x *conns) closeIdle() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for nc, c := range x.open {
		if !c.busy {
			nc.Close()
		}
	}
}

// process is the process that has connected, 0 where that is not known.
func process(nc net.Conn) (pid int) {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
