package main

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var soak = flag.Duration("soak", 0, "run the tests that kill servers or churn filesystems for this time; see scripts/soak-writes")

// sectorSize is less than a block, so that blocks are written in parts.
const sectorSize = 512

// writer is an NBD client that writes to a region of a device with requests in flight, and
// knows which content each sector may have: the last one whose write was answered, and
// those that are in flight. The content of a sector is the number of its write, 0: zeros.
type writer struct {
	rng   *rand.Rand
	first int64 // sector
	acked []uint64
	next  uint64 // number of the next write

	nc       net.Conn
	mu       sync.Mutex
	inflight map[uint64]*sent
	busy     []bool // sectors in flight
}

// sent is a request in flight.
type sent struct {
	at, n  int
	number uint64
}

func newWriter(seed uint64, first int64, sectors int) *writer {
	return &writer{rng: rand.New(rand.NewPCG(seed, 7)), first: first, acked: make([]uint64, sectors), next: 1}
}

// dial opens the default export of a socket. Its simple form of the handshake and the
// protocol needs nothing of package nbd.
func dial(path string) (net.Conn, error) {
	nc, err := net.DialTimeout("unix", path, atMost)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Now().Add(5 * atMost))
	var hello [18]byte
	if _, err := io.ReadFull(nc, hello[:]); err != nil {
		nc.Close()
		return nil, err
	}
	b := append(binary.BigEndian.AppendUint32(nil, 3), "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"...) // EXPORT_NAME
	var info [10]byte
	if _, err = nc.Write(b); err == nil {
		_, err = io.ReadFull(nc, info[:])
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return nc, nil
}

func request(flags, cmd uint16, cookie uint64, off int64, n int) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// sector is the content of a sector.
func sector(number uint64) []byte {
	if number == 0 {
		return make([]byte, sectorSize)
	}
	return bytes.Repeat(binary.BigEndian.AppendUint64(nil, number), sectorSize/8)
}

// run writes until the server is gone. count counts answers.
func (w *writer) run(path string, count *atomic.Int64) error {
	nc, err := dial(path)
	if err != nil {
		return err
	}
	defer nc.Close()
	w.nc, w.inflight, w.busy = nc, make(map[uint64]*sent), make([]bool, len(w.acked))
	ended := make(chan error, 1)
	go func() { ended <- w.receive(count) }()
	const depth = 8
	for {
		w.mu.Lock()
		n := len(w.inflight)
		w.mu.Unlock()
		if n < depth {
			if w.send() != nil {
				return <-ended
			}
			continue
		}
		select {
		case err := <-ended:
			return err
		case <-time.After(50 * time.Microsecond):
		}
	}
}

// send sends a request for sectors that are not in flight.
func (w *writer) send() error {
	n := 1 + w.rng.IntN(24)
	at := w.rng.IntN(len(w.acked) - n)
	if w.rng.IntN(2) == 0 { // whole blocks
		at, n = at&^7, (n+7)&^7
	}
	if at+n > len(w.acked) {
		return nil
	}
	w.mu.Lock()
	if slices.Contains(w.busy[at:at+n], true) {
		w.mu.Unlock()
		return nil
	}
	const write, flush, trim, zeroes, fua = 1, 3, 4, 6, 1
	off := (w.first + int64(at)) * sectorSize
	q := &sent{at: at, n: n, number: w.next}
	cookie := w.next
	w.next++
	var b []byte
	switch k := w.rng.IntN(40); {
	case k == 0:
		q.n = 0
		b = request(0, flush, cookie, 0, 0)
	case k < 4:
		q.number = 0
		b = request(uint16(w.rng.IntN(2)*2), zeroes, cookie, off, n*sectorSize) // with and without NO_HOLE
	case k < 6:
		q.number = 0
		b = request(0, trim, cookie, off, n*sectorSize)
	case k < 8:
		b = append(request(fua, write, cookie, off, n*sectorSize), bytes.Repeat(sector(q.number), n)...)
	default:
		b = append(request(0, write, cookie, off, n*sectorSize), bytes.Repeat(sector(q.number), n)...)
	}
	for i := range q.n {
		w.busy[at+i] = true
	}
	w.inflight[cookie] = q
	w.mu.Unlock()
	_, err := w.nc.Write(b)
	return err
}

// receive takes answers.
func (w *writer) receive(count *atomic.Int64) error {
	var h [16]byte
	for {
		if _, err := io.ReadFull(w.nc, h[:]); err != nil {
			return nil // the server was killed
		}
		cookie := binary.BigEndian.Uint64(h[8:])
		w.mu.Lock()
		q := w.inflight[cookie]
		delete(w.inflight, cookie)
		if e := binary.BigEndian.Uint32(h[4:]); q == nil || e != 0 {
			w.mu.Unlock()
			return fmt.Errorf("cookie %d: errno %d", cookie, e)
		}
		for i := range q.n {
			w.acked[q.at+i], w.busy[q.at+i] = q.number, false
		}
		w.mu.Unlock()
		count.Add(1)
	}
}

// check compares what the device has with what it may have, which it is from then on.
func (w *writer) check(p []byte) error {
	may := make([][]uint64, len(w.acked))
	for i, n := range w.acked {
		may[i] = append(may[i], n)
	}
	for _, q := range w.inflight {
		for i := range q.n {
			may[q.at+i] = append(may[q.at+i], q.number)
		}
	}
	for i := range may {
		got := p[i*sectorSize : (i+1)*sectorSize]
		number := binary.BigEndian.Uint64(got)
		if !bytes.Equal(got, sector(number)) || !slices.Contains(may[i], number) {
			return fmt.Errorf("sector %d has %x…; it may have the writes %d, the last answered first", w.first+int64(i), got[:16], may[i])
		}
		w.acked[i] = number
	}
	return nil
}

// readAll reads a part of the default export.
func readAll(path string, off int64, n int) ([]byte, error) {
	nc, err := dial(path)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	p := make([]byte, n)
	for at := 0; at < n; at += 1 << 20 {
		k := min(1<<20, n-at)
		if _, err := nc.Write(request(0, 0, 1, off+int64(at), k)); err != nil {
			return nil, err
		}
		var h [16]byte
		if _, err := io.ReadFull(nc, h[:]); err != nil {
			return nil, err
		}
		if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
			return nil, fmt.Errorf("read %d bytes at %d: errno %d", k, off+int64(at), e)
		}
		if _, err := io.ReadFull(nc, p[at:at+k]); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// A server that is killed at any moment loses no write that it has answered, and tears
// none below a sector. -soak 2m goes on for two minutes.
func TestKilledServerLosesNoAnsweredWrite(t *testing.T) {
	t.Parallel()
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	serve := func() *server {
		t.Helper()
		return serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
	}
	path := func(s *server) string { return strings.TrimPrefix(s.ready.Listen[0], "unix:") }

	const clients, sectors = 4, 8 << 10 // 4 MiB each, from 32 MiB on, which is a hole of the image
	seed := uint64(1)
	if *soak > 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	var writers []*writer
	for i := range clients {
		writers = append(writers, newWriter(seed+uint64(i), 32<<20/sectorSize+int64(i)*sectors, sectors))
	}
	rounds := 8
	var answered atomic.Int64
	end := time.Now().Add(*soak)
	for round := 0; round < rounds || time.Now().Before(end); round++ {
		s := serve()
		for _, w := range writers {
			p, err := readAll(path(s), w.first*sectorSize, sectors*sectorSize)
			if err == nil {
				err = w.check(p)
			}
			if err != nil {
				t.Fatalf("after %d kills: %v", round, err)
			}
		}
		before := answered.Load()
		var wg sync.WaitGroup
		for _, w := range writers {
			wg.Go(func() {
				if err := w.run(path(s), &answered); err != nil {
					t.Error(err)
				}
			})
		}
		// The moment of the kill: some writes after the first answers.
		after := before + 1 + int64(rng.IntN(20000))
		for begin := time.Now(); answered.Load() < after && time.Since(begin) < 500*time.Millisecond || answered.Load() == before && time.Since(begin) < atMost && !t.Failed(); {
			time.Sleep(time.Duration(rng.IntN(1000)) * time.Microsecond)
		}
		s.kill()
		wg.Wait()
		if answered.Load() == before {
			t.Fatal("no write was answered: this tests nothing")
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d writes were answered", answered.Load())
}
