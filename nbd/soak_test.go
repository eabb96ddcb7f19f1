package nbd

import (
	"context"
	"encoding/binary"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

var soakTime = flag.Duration("soak", 2*time.Second, "how long TestSoak takes")

// TestSoak lets 64 clients connect, misbehave and vanish for a while. At the end the
// server has as many goroutines and descriptors and as much memory as at the start.
func TestSoak(t *testing.T) {
	const clients = 64
	const size = 8 << 20
	content := pattern(0, size)
	dev := newFullDevice(size)
	dev.OnFault = func(ctx context.Context, e blockmap.Extent) error {
		if e.Start%(7*4096) == 0 {
			return errBroken
		}
		select {
		case <-time.After(time.Millisecond):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	srv := &Server{
		Exports:          Static{{Name: "disk", Device: dev}},
		HandshakeTimeout: 50 * time.Millisecond,
		WriteTimeout:     50 * time.Millisecond,
	}
	path := serve(t, srv)

	// The counts before: taken after one round, so that pools are warm.
	var rounds atomic.Int64
	run := func(d time.Duration) {
		end := time.Now().Add(d)
		var wg sync.WaitGroup
		for i := range clients {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), uint64(d)))
				for time.Now().Before(end) {
					misbehave(t, path, rnd)
					rounds.Add(1)
					off := rnd.Int64N(dev.Size())
					dev.Evict(blockmap.Range(off, min(1<<20, dev.Size()-off)))
				}
			})
		}
		wg.Wait()
		// The server notices that the last clients are gone.
		eventually(t, "all connections end", func() bool { return srv.Stats().Conns == 0 })
		// What the clients have written or discarded is not what the server takes.
		dev.Fill(content, 0)
	}
	run(*soakTime / 4)
	goroutines, fds, heap := census(t)
	run(*soakTime)
	// A connection is counted as gone a moment before its goroutine ends.
	eventually(t, "there are no more goroutines than before", func() bool { return runtime.NumGoroutine() <= goroutines })
	goroutines2, fds2, heap2 := census(t)
	t.Logf("%d connections; goroutines %d then %d, descriptors %d then %d, heap %d then %d KiB",
		srv.Stats().Accepted, goroutines, goroutines2, fds, fds2, heap>>10, heap2>>10)
	if goroutines2 > goroutines {
		t.Errorf("%d goroutines, %d before", goroutines2, goroutines)
	}
	if fds2 > fds {
		t.Errorf("%d descriptors, %d before", fds2, fds)
	}
	if heap2 > heap+8<<20 {
		t.Errorf("%d KiB of heap, %d before", heap2>>10, heap>>10)
	}
	dev.NoPins(t)
	// The server still serves. A client that cannot keep its timeouts tries again.
	eventually(t, "a client is served", func() bool { return served(t, path) })
}

// served reports whether the server answers a READ of a client that does all at once.
func served(t testing.TB, path string) bool {
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(time.Minute))
	p := appendOption([]byte{0, 0, 0, 3}, optGo, infoData("disk"))
	nc.Write(appendRequest(p, cmdFlush, 0, 1, 0, 0)) // a client that is too late reads its end
	got, _ := io.ReadAll(io.LimitReader(nc, 18+2*20+12+simpleReplyLen))
	return len(got) == 18+2*20+12+simpleReplyLen && binary.BigEndian.Uint32(got[len(got)-simpleReplyLen:]) == magicSimple &&
		binary.BigEndian.Uint32(got[len(got)-simpleReplyLen+4:]) == 0
}

func census(t testing.TB) (goroutines, fds int, heap uint64) {
	for range 3 { // pools let go at the second
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	ents, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return runtime.NumGoroutine(), len(ents), m.HeapAlloc
}

// misbehave is one connection of a hostile or broken client.
func misbehave(t testing.TB, path string, rnd *rand.Rand) {
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Error(err)
		return
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(time.Minute))
	say := func(p []byte) { nc.Write(p) }
	switch rnd.IntN(12) {
	case 0: // silence, until the server has enough
		io.Copy(io.Discard, nc)
		return
	case 1: // gone at once
		return
	case 2: // noise
		p := make([]byte, rnd.IntN(10000))
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		say(p)
		return
	}
	p := []byte{0, 0, 0, 3}
	p = appendOption(p, optStructuredReply, nil)
	switch rnd.IntN(8) {
	case 0:
		say(append(p, appendOption(nil, optInfo, make([]byte, rnd.IntN(maxSkip)))...))
		return
	case 1:
		say(appendOption(p, optGo, infoData("nothing")))
		return
	}
	// The client sends options ahead, which the server also accepts.
	p = appendOption(p, optSetMetaContext, metaData("disk", "base:allocation", "x-thaw:resident"))
	say(appendOption(p, optGo, infoData("disk")))

	p = nil
	for range rnd.IntN(64) {
		cmd := uint16(rnd.IntN(9))
		if cmd == cmdDisc {
			cmd = cmdRead
		}
		off, n := rnd.Uint64N(8<<20), rnd.Uint32N(256<<10)
		if rnd.IntN(20) == 0 {
			off, n = rnd.Uint64(), rnd.Uint32()
		}
		p = appendRequest(p, cmd, uint16(rnd.IntN(2)), rnd.Uint64(), off, n)
		if cmd == cmdWrite && n < 1<<20 {
			p = append(p, make([]byte, n)...)
		}
	}
	switch rnd.IntN(6) {
	case 0: // half a request at the end
		p = p[:rnd.IntN(len(p)+1)]
	case 1: // bad magic
		p = append(p, make([]byte, requestLen)...)
	case 2: // a proper end
		p = appendRequest(p, cmdDisc, 0, 0, 0, 0)
	}
	switch rnd.IntN(3) {
	case 0: // reads nothing and hangs on, until the server has enough
		say(p)
		for i := 0; i < 100 && nc.SetReadDeadline(time.Now().Add(time.Millisecond)) == nil; i++ {
			if _, err := nc.Write(appendRequest(nil, cmdRead, 0, 1, 0, 1<<20)); err != nil {
				break
			}
		}
	case 1: // reads some
		n := rnd.Int64N(1 << 20)
		var wg sync.WaitGroup
		wg.Go(func() { io.CopyN(io.Discard, nc, n) })
		say(p)
		nc.Close()
		wg.Wait()
	case 2: // reads all there is, for a while
		var wg sync.WaitGroup
		wg.Go(func() { io.Copy(io.Discard, nc) })
		say(p)
		say(binary.BigEndian.AppendUint32(nil, magicRequest))
		nc.(*net.UnixConn).CloseWrite()
		wg.Wait()
	}
}
