package vhost

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
)

// What was in flight when the connection ended is done by the next one, once.
func TestResubmit(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 1<<20))
	faults := make(chan struct{}, 64)
	var up atomic.Bool // the origin
	dev.OnFault = func(ctx context.Context, _ blockmap.Extent) error {
		if up.Load() {
			return nil
		}
		faults <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	s := new(Server)
	path := serve(t, s, nbd.Export{Device: dev})
	f := connect(t, path)
	f.negotiate(0)
	f.share(newGuestMemory(t))
	f.keepInflight(1, 64, nil)
	d := f.newDriver(0, 64)
	d.start(0)
	for range 100 { // so that the rings wrap
		d.ok(opIn, 0, nil, 512)
	}
	var slots []int
	old := d.next
	for i := range 4 {
		slots = append(slots, d.add(opIn, uint64(1<<20>>sectorShift+8*i), nil, 4096))
	}
	d.notify(old)
	for range slots {
		<-faults
	}
	d.ok(opIn, 0, nil, 512) // overtakes them

	// The front end stops the queue and starts it again, as for a pause.
	base := d.stop()
	if base != 105 {
		t.Errorf("the base is %d", base)
	}
	if d.collect(); len(d.byHead) != 4 {
		t.Fatalf("%d requests are in flight after the stop", len(d.byHead))
	}
	d.start(base)
	for range slots {
		<-faults
	}
	// It loses its connection, and connects again.
	f.nc.Close()
	slots = append(slots, d.add(opIn, 5, nil, 512)) // meanwhile
	g := connect(t, path)
	g.negotiate(0)
	g.mem = f.mem
	up.Store(true)
	g.share(f.mem)
	g.keepInflight(1, 64, f)
	d.setUp(g, 101) // the idx of the used ring is what QEMU believes
	for i, at := range slots {
		off := int64(1<<20 + 4096*i)
		n := int64(4096)
		if i == 4 {
			off, n = 5*512, 512
		}
		if code, p := d.wait(at); code != statusOK || !bytes.Equal(p, content(dev, off, n)) {
			t.Errorf("request %d: status %d, or wrong bytes", i, code)
		}
	}
	if n := s.Stats().Resumed; n != 8 {
		t.Errorf("%d requests were resumed", n)
	}
	d.ok(opIn, 0, nil, 512)
	dev.NoPins(t)
}

// Without a file of what is in flight, a queue that is stopped finishes its requests.
func TestStopFinishes(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 4096))
	asked, release := make(chan struct{}), make(chan struct{})
	dev.OnFault = func(context.Context, blockmap.Extent) error { close(asked); <-release; return nil }
	_, d := disk(t, nbd.Export{Device: dev})
	old := d.next
	i := d.add(opIn, 1<<20>>sectorShift, nil, 4096)
	d.notify(old)
	<-asked
	time.AfterFunc(20*time.Millisecond, func() { close(release) })
	if base := d.stop(); base != 1 {
		t.Errorf("the base is %d", base)
	}
	if d.collect(); !d.done[i] {
		t.Fatal("the request is not done")
	}
	if code, _ := d.wait(i); code != statusOK {
		t.Errorf("status %d", code)
	}
}

// testRegion makes a region for a ring of 8 descriptors.
func testRegion(used, last uint16, taken map[uint16]uint64, next map[uint16]uint16) *inflight {
	f := &inflight{b: make([]byte, inflightHeaderLen+8*inflightEntryLen), num: 8}
	binary.LittleEndian.PutUint16(f.b[8:], inflightVersion)
	binary.LittleEndian.PutUint16(f.b[10:], 8)
	binary.LittleEndian.PutUint16(f.b[12:], last)
	binary.LittleEndian.PutUint16(f.b[14:], used)
	for head, counter := range taken {
		f.entry(head)[0] = 1
		binary.LittleEndian.PutUint64(f.entry(head)[8:], counter)
	}
	for head, n := range next {
		binary.LittleEndian.PutUint16(f.entry(head)[6:], n)
	}
	return f
}

// What a process has left at any moment is restored as the specification says.
func TestRestore(t *testing.T) {
	for name, c := range map[string]struct {
		f    *inflight
		used uint16
		want []uint16
		fail bool
	}{
		"nothing":      {f: testRegion(7, 0, nil, nil), used: 7},
		"in order":     {f: testRegion(7, 0, map[uint16]uint64{1: 9, 5: 3, 2: 1 << 40}, nil), used: 7, want: []uint16{5, 1, 2}},
		"batch":        {f: testRegion(65535, 3, map[uint16]uint64{1: 1, 3: 2, 4: 3}, map[uint16]uint16{3: 1}), used: 1, want: []uint16{4}},
		"listed only":  {f: testRegion(7, 3, map[uint16]uint64{1: 1, 3: 2}, map[uint16]uint16{3: 1}), used: 7, want: []uint16{1, 3}},
		"batch of all": {f: testRegion(0, 0, map[uint16]uint64{0: 1}, map[uint16]uint16{0: 0}), used: 8},
		"too far":      {f: testRegion(0, 0, nil, nil), used: 9, fail: true},
		"bad list":     {f: testRegion(0, 8, nil, nil), used: 1, fail: true},
		"version":      {f: func() *inflight { f := testRegion(0, 0, nil, nil); f.b[8] = 2; return f }(), fail: true},
		"new":          {f: &inflight{b: bytes.Repeat([]byte{0}, inflightHeaderLen+8*inflightEntryLen), num: 8}, used: 77},
	} {
		heads, err := c.f.restore(c.used)
		if (err != nil) != c.fail || !slices.Equal(heads, c.want) {
			t.Errorf("%s: %v, %v", name, heads, err)
			continue
		}
		if err != nil {
			continue
		}
		// A second crash at once finds the same.
		again := &inflight{b: c.f.b, num: 8}
		if heads, err := again.restore(c.used); err != nil || !slices.Equal(heads, c.want) {
			t.Errorf("%s, restored again: %v, %v", name, heads, err)
		}
		if again.counter != c.f.counter || len(c.want) > 0 && again.counter == 0 {
			t.Errorf("%s: the counter is %d", name, again.counter)
		}
	}
}

// The bytes of a region are those of the specification, which other backends write too.
func TestInflightLayout(t *testing.T) {
	f := &inflight{b: make([]byte, inflightHeaderLen+4*inflightEntryLen), num: 4}
	if _, err := f.restore(0x1234); err != nil {
		t.Fatal(err)
	}
	f.take(2)
	f.take(1)
	f.list(2)
	f.untake(2)
	f.setUsed(0x1235)
	want := make([]byte, len(f.b))
	copy(want, []byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 4, 0, 2, 0, 0x35, 0x12})
	want[16+16], want[16+16+8] = 1, 1
	if !bytes.Equal(f.b, want) {
		t.Errorf("the region is\n%x, want\n%x", f.b, want)
	}
	if n := (inflightArea{queueSize: 128}).region(); n != 2112 {
		t.Errorf("a region for 128 descriptors has %d bytes", n)
	}
}

// backendEnv makes the test program a backend that listens there.
const backendEnv = "VHOST_TEST_BACKEND"

// backendMain serves the file beside the socket until it is killed.
func backendMain(path string) {
	dev, err := openFile(path + ".img")
	if err == nil {
		err = serveFile(path, dev)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func serveFile(path string, dev blockmap.Device) error {
	l, err := nbd.ListenPrivate(context.Background(), path)
	if err != nil {
		return err
	}
	s := &Server{Exports: nbd.Static{{Device: dev}}, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	fmt.Println("ready")
	return s.Serve(l, "")
}

// fileDevice is a file, some of whose requests take a while.
type fileDevice struct {
	f      *os.File
	mapped []byte
}

func openFile(path string) (*fileDevice, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	return &fileDevice{f, b}, err
}

// slow reports whether requests there take a while.
func slow(off int64) bool { return off/(64<<10)%3 == 1 }

func (d *fileDevice) Size() int64 { return int64(len(d.mapped)) }
func (d *fileDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil || slow(e.Start) {
		return v, false
	}
	v.Append(d.mapped[e.Start:e.End], nil, 0)
	return v, true
}
func (d *fileDevice) Load(_ context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil {
		return v, false
	}
	if slow(e.Start) {
		time.Sleep(3 * time.Millisecond)
	}
	v.Append(d.mapped[e.Start:e.End], nil, 0)
	return v, true
}
func (d *fileDevice) Fault(context.Context, blockmap.Extent) error { return nil }
func (d *fileDevice) Prefetch(blockmap.Extent)                     {}
func (d *fileDevice) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Resident: true}
}
func (d *fileDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	if slow(off) {
		time.Sleep(2 * time.Millisecond)
	}
	_, err := d.f.WriteAt(p, off)
	return err
}
func (d *fileDevice) Zero(ctx context.Context, e blockmap.Extent, _ bool) error {
	return d.WriteAt(ctx, make([]byte, e.Len()), e.Start)
}
func (d *fileDevice) Discard(context.Context, blockmap.Extent) error { return nil }
func (d *fileDevice) Flush(context.Context) error                    { return d.f.Sync() }

// kill -9 at any moment: the guest sees each request completed once, with the right bytes.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	f, err := os.Create(path + ".img")
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(testSize))
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	mem := newGuestMemory(t)
	var before *frontEnd
	var ds []*driver
	// Slot i of driver q has a part of the disk to itself, so its content is known.
	const share = 64 << 10
	home := func(d *driver, i int) int64 { return int64(d.index*queueSlots+i) * share }
	want := make(map[int64][]byte)
	type op struct {
		write bool
		p     []byte
	}
	doing := make(map[*driver]map[int]op)
	const rounds = 40
	total, resumed := 0, 0
	for round := range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), backendEnv+"="+path)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("the backend says %q, %v", line, err)
		}
		fe := connect(t, path)
		fe.negotiate(0)
		fe.share(mem)
		fe.keepInflight(2, 64, before)
		before = fe
		for i := range 2 {
			if round == 0 {
				d := fe.newDriver(i, 64)
				d.inTable = i == 1
				doing[d] = make(map[int]op)
				ds = append(ds, d)
			}
			resumed += len(ds[i].byHead)
			ds[i].setUp(fe, ds[i].seen)
		}
		last := round == rounds-1
		begun, end := time.Now(), 20+rng.IntN(300)
		for n := 0; ; {
			busy, any := 0, false
			for _, d := range ds {
				old := d.next
				for len(d.free) > 0 && n < end {
					i := d.free[len(d.free)-1]
					at := home(d, i)
					o := op{write: rng.IntN(2) == 0, p: make([]byte, 4096)}
					if o.write {
						for j := range o.p {
							o.p[j] = byte(rng.Uint32())
						}
						want[at] = o.p
						d.add(opOut, uint64(at>>sectorShift), o.p, 0)
					} else {
						d.add(opIn, uint64(at>>sectorShift), nil, 4096)
					}
					doing[d][i] = o
					n++
				}
				if d.next != old {
					d.notify(old)
				}
				d.collect()
				d.wantCall(true)
				d.collect()
				for i := range d.done {
					any = true
					code, p := d.wait(i)
					o := doing[d][i]
					delete(doing[d], i)
					total++
					expect := want[home(d, i)]
					if expect == nil {
						expect = make([]byte, 4096)
					}
					if code != statusOK || !o.write && !bytes.Equal(p, expect) {
						t.Fatalf("round %d: queue %d slot %d: status %d, or wrong bytes (a write: %v)", round, d.index, i, code, o.write)
					}
				}
				busy += len(d.byHead)
			}
			if n >= end && (busy == 0 || !last) {
				break
			}
			if any {
				continue // and asks for interrupts anew
			}
			var b [8]byte
			p := []unix.PollFd{{Fd: int32(ds[0].call), Events: unix.POLLIN}, {Fd: int32(ds[1].call), Events: unix.POLLIN}}
			unix.Poll(p, 100)
			unix.Read(ds[0].call, b[:])
			unix.Read(ds[1].call, b[:])
			if time.Since(begun) > limit {
				t.Fatalf("round %d: %d requests are in flight, and none is done", round, busy)
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		fe.nc.Close()
	}
	if resumed == 0 {
		t.Error("nothing was in flight at any kill: this tests nothing")
	}
	got, err := os.ReadFile(path + ".img")
	must(t, err)
	for at, p := range want {
		if !bytes.Equal(got[at:at+4096], p) {
			t.Errorf("the disk has other bytes at %d", at)
		}
	}
	t.Logf("%d requests, %d of them in flight at a kill", total, resumed)
}
