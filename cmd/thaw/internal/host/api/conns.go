package api

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of what clients can take.
const (
	maxConns        = 64 // of all clients
	maxConnsProcess = 32 // of one process
	maxWaits        = 32 // requests that wait for the registry, files or other clients
	maxWaitsProcess = 8
)

// conns are the connections of a server. Each is one of a process, and busy while a
// request of it is worked on. Others wait for their clients, and are closed for new ones.
type conns struct {
	mu    sync.Mutex
	open  map[net.Conn]*conn
	next  uint64
	waits int
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

// add makes room for a connection, or turns it away. It is the http.Server's ConnContext.
func (x *conns) add(ctx context.Context, nc net.Conn) context.Context {
	c := &conn{nc: nc, pid: process(nc)}
	x.mu.Lock()
	over, room := x.makeRoom(c.pid)
	c.order = x.next
	x.next++
	if room {
		x.open[nc] = c
	}
	x.mu.Unlock()
	if over != nil {
		over.Close()
	}
	if !room {
		// It is in the socket's buffer at once: the connection is new.
		nc.SetWriteDeadline(time.Now().Add(time.Second))
		nc.Write([]byte("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n" +
			"Retry-After: 1\r\nContent-Length: 34\r\n\r\n" + `{"error":"too many connections"}` + "\r\n"))
		nc.Close()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// makeRoom takes out the connection to close so that one more of process pid has room.
// x.mu is held.
func (x *conns) makeRoom(pid int) (over net.Conn, room bool) {
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
		return nil, true
	}
	if victim == nil {
		return nil, false
	}
	delete(x.open, victim.nc)
	return victim.nc, true
}

// changed forgets connections that are closed. It is the http.Server's ConnState.
func (x *conns) changed(nc net.Conn, state http.ConnState) {
	if state == http.StateClosed || state == http.StateHijacked {
		x.mu.Lock()
		defer x.mu.Unlock()
		delete(x.open, nc)
	}
}

// begin says that a request of c is worked on, unless too many requests wait and this one
// waits too.
func (x *conns) begin(c *conn, waits bool) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if waits {
		same := 0
		for _, o := range x.open {
			if o.waits && o.pid == c.pid {
				same++
			}
		}
		if x.waits >= maxWaits || same >= maxWaitsProcess {
			return false
		}
		x.waits++
	}
	c.busy, c.waits = true, waits
	return true
}

func (x *conns) end(c *conn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if c.waits {
		x.waits--
	}
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
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
