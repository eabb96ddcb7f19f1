package vhost

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
)

const testSize = 8 << 20

// limit bounds every wait of a test.
const limit = time.Minute

// frontEnd is a virtual machine monitor with its guest's driver, in one: it sends messages,
// and works with rings in memory that it shares.
type frontEnd struct {
	t   testing.TB
	nc  *net.UnixConn
	mem *guestMemory

	features uint64
	protocol uint64
	inflight int // the file of what is in flight, -1: none
	area     []byte
}

// guestMemory is a memfd that holds two regions. Their guest addresses follow each other, so a
// buffer may lie in both; their places in the file do not.
type guestMemory struct {
	fd   int
	b    []byte // of the file
	next int    // what is not allocated
}

const (
	memoryLen  = 32 << 20
	lowLen     = 16 << 20 // of the first region
	lowOff     = 16 << 20 // of the first region in the file; the second one is at 0
	guestBase  = 1 << 32
	userBase   = 0x7f1200000000
	highUser   = 0x7f5600000000
	dataLen    = 1 << 20 // of the buffer of a slot
	queueSlots = 12
)

func newGuestMemory(t testing.TB) *guestMemory {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	must(t, err)
	must(t, unix.Ftruncate(fd, memoryLen))
	b, err := unix.Mmap(fd, 0, memoryLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	t.Cleanup(func() {
		unix.Munmap(b)
		unix.Close(fd)
	})
	return &guestMemory{fd: fd, b: b}
}

// at returns the n bytes at an offset from guestBase, which lie in one region.
func (g *guestMemory) at(off, n int) []byte {
	if off < lowLen {
		return g.b[lowOff+off:][:n:n]
	}
	return g.b[off-lowLen:][:n:n]
}

// put writes p at an offset, perhaps to both regions.
func (g *guestMemory) put(off int, p []byte) {
	for i, b := range p {
		g.at(off+i, 1)[0] = b
	}
}

// get reads n bytes at an offset, perhaps of both regions.
func (g *guestMemory) get(off, n int) (p []byte) {
	for i := range n {
		p = append(p, g.at(off+i, 1)[0])
	}
	return p
}

// part is a buffer of a chain.
type part struct {
	off, n int
	flags  uint16
}

// table is an indirect table with one chain.
func table(parts []part) (p []byte) {
	for i, part := range parts {
		flags := part.flags
		if i < len(parts)-1 {
			flags |= descNext
		}
		p = binary.LittleEndian.AppendUint64(p, guest(part.off))
		p = binary.LittleEndian.AppendUint32(p, uint32(part.n))
		p = binary.LittleEndian.AppendUint16(p, flags)
		p = binary.LittleEndian.AppendUint16(p, uint16(i+1))
	}
	return p
}

// alloc returns the offset of n bytes that nobody uses, aligned to 64 bytes.
func (g *guestMemory) alloc(n int) int {
	at := g.next
	if at < lowLen && at+n > lowLen {
		at = lowLen
	}
	if at+n > memoryLen {
		panic("the guest's memory is used up")
	}
	g.next = (at + n + 63) &^ 63
	return at
}

func user(off int) uint64 {
	if off < lowLen {
		return userBase + uint64(off)
	}
	return highUser + uint64(off-lowLen)
}

func guest(off int) uint64 { return guestBase + uint64(off) }

// table is the payload of SET_MEM_TABLE.
func (g *guestMemory) table() []byte {
	p := binary.LittleEndian.AppendUint64(nil, 2)
	for _, n := range []uint64{guestBase, lowLen, userBase, lowOff, guestBase + lowLen, memoryLen - lowLen, highUser, 0} {
		p = binary.LittleEndian.AppendUint64(p, n)
	}
	return p
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%v have passed, and this does not hold: %s", limit, what)
		}
	}
}

// serve serves e on a socket, and returns its path. The server is closed with the test.
func serve(t testing.TB, s *Server, e nbd.Export) string {
	if s.Exports == nil {
		s.Exports = nbd.Static{e}
	}
	if s.Log == nil {
		s.Log = slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := nbd.ListenPrivate(t.Context(), path)
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l, e.Name) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	return path
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// connect connects to a server.
func connect(t testing.TB, path string) *frontEnd {
	nc, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	must(t, err)
	f := &frontEnd{t: t, nc: nc, inflight: -1}
	t.Cleanup(func() { nc.Close() })
	return f
}

// send sends a message.
func (f *frontEnd) send(id requestID, flags uint32, payload []byte, fds ...int) error {
	b := binary.LittleEndian.AppendUint32(nil, uint32(id))
	b = binary.LittleEndian.AppendUint32(b, flagVersion|flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := f.nc.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

// reply reads the reply to a message. It is nil where the server has hung up.
func (f *frontEnd) reply(id requestID) (payload []byte, fds []int) {
	f.t.Helper()
	f.nc.SetReadDeadline(time.Now().Add(limit))
	var head [headerLen]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := f.nc.ReadMsgUnix(head[:], oob)
	if err != nil || n == 0 {
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			f.t.Fatalf("reply to %v: %v", id, err)
		}
		return nil, nil
	}
	fds, err = parseFDs(oob[:oobn])
	must(f.t, err)
	if got := requestID(binary.LittleEndian.Uint32(head[:])); got != id {
		f.t.Fatalf("reply to %v is one to %v", id, got)
	}
	if got := binary.LittleEndian.Uint32(head[4:]); got != flagVersion|flagReply {
		f.t.Fatalf("reply to %v has flags %#x", id, got)
	}
	payload = make([]byte, binary.LittleEndian.Uint32(head[8:]))
	if _, err := io.ReadFull(f.nc, payload); err != nil {
		f.t.Fatal(err)
	}
	return payload, fds
}

// ask sends a message, and returns its reply.
func (f *frontEnd) ask(id requestID, payload []byte) []byte {
	f.t.Helper()
	must(f.t, f.send(id, 0, payload))
	p, _ := f.reply(id)
	if p == nil {
		f.t.Fatalf("%v: the server has hung up", id)
	}
	return p
}

// set sends a message, and waits until it is done.
func (f *frontEnd) set(id requestID, payload []byte, fds ...int) {
	f.t.Helper()
	must(f.t, f.send(id, flagNeedReply, payload, fds...))
	if p, _ := f.reply(id); !bytes.Equal(p, u64(0)) {
		f.t.Fatalf("%v: the reply is %x", id, p)
	}
}

// hungUp reports whether the server has closed the connection, and waits for that.
func (f *frontEnd) hungUp() bool {
	f.nc.SetReadDeadline(time.Now().Add(limit))
	var b [1]byte
	_, err := f.nc.Read(b[:])
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET)
}

// refused reports whether the server hangs up instead of answering.
func (f *frontEnd) refused() bool {
	f.t.Helper()
	if f.send(getFeatures, 0, nil) != nil {
		return true
	}
	p, _ := f.reply(getFeatures)
	return p == nil
}

// negotiate takes all features but those in without.
func (f *frontEnd) negotiate(without uint64) {
	f.t.Helper()
	f.features = binary.LittleEndian.Uint64(f.ask(getFeatures, nil)) &^ without
	f.protocol = binary.LittleEndian.Uint64(f.ask(getProtocolFeatures, nil))
	must(f.t, f.send(setProtocolFeatures, 0, u64(f.protocol)))
	f.set(setOwner, nil)
	f.set(setFeatures, u64(f.features))
}

// share shares the guest's memory.
func (f *frontEnd) share(mem *guestMemory) {
	f.t.Helper()
	f.mem = mem
	f.set(setMemTable, mem.table(), mem.fd, mem.fd)
}

// keepInflight gets a file of what is in flight, or hands over the one that an earlier
// front end has got.
func (f *frontEnd) keepInflight(queues, size int, from *frontEnd) {
	f.t.Helper()
	a := inflightArea{queues: uint16(queues), queueSize: uint16(size)}
	if from != nil {
		f.inflight, f.area = from.inflight, from.area
	} else {
		must(f.t, f.send(getInflightFD, 0, append(a.payload(), 0, 0, 0, 0)))
		p, fds := f.reply(getInflightFD)
		if len(p) != inflightPadded || len(fds) != 1 {
			f.t.Fatalf("GET_INFLIGHT_FD: %x, %d descriptors", p, len(fds))
		}
		f.area, f.inflight = p, fds[0]
		f.t.Cleanup(func() { unix.Close(f.inflight) })
	}
	f.set(setInflightFD, f.area, f.inflight)
}

func state(index int, n uint32) []byte { return u64(uint64(index) | uint64(n)<<32) }

// disk connects to e, served by a server of its own, with one queue.
func disk(t testing.TB, e nbd.Export) (*frontEnd, *driver) {
	return diskOf(t, new(Server), e)
}

func diskOf(t testing.TB, s *Server, e nbd.Export) (*frontEnd, *driver) {
	f := connect(t, serve(t, s, e))
	f.negotiate(0)
	f.share(newGuestMemory(t))
	d := f.newDriver(0, 64)
	d.start(0)
	return f, d
}

// driver is the guest's end of a queue.
type driver struct {
	f       *frontEnd
	index   int
	num     int
	desc    int // offsets in the guest's memory
	avail   int
	used    int
	slots   []slot
	free    []int
	kick    int
	call    int
	next    uint16 // of the available ring
	seen    uint16 // of the used ring
	inTable bool   // uses indirect tables
	kicked  int
	called  int
	done    map[int]bool
	byHead  map[uint16]int
}

// slot is memory for a request.
type slot struct {
	head   uint16 // the first of its four descriptors
	header int
	status int
	data   int
	table  int
	n      int // bytes of data
}

func (f *frontEnd) newDriver(index, num int) *driver {
	m := f.mem
	d := &driver{f: f, index: index, num: num, done: make(map[int]bool), byHead: make(map[uint16]int)}
	d.desc, d.avail, d.used = m.alloc(num*descLen), m.alloc(6+2*num), m.alloc(6+8*num)
	for i := range min(num/4, queueSlots) {
		d.slots = append(d.slots, slot{head: uint16(4 * i), header: m.alloc(headerSize), status: m.alloc(1), data: m.alloc(dataLen), table: m.alloc(4 * descLen)})
		d.free = append(d.free, i)
	}
	d.kick, d.call = eventfd(f.t), eventfd(f.t)
	return d
}

func eventfd(t testing.TB) int {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (d *driver) addr() []byte {
	p := state(d.index, 0)
	for _, off := range []int{d.desc, d.used, d.avail} {
		p = binary.LittleEndian.AppendUint64(p, user(off))
	}
	return binary.LittleEndian.AppendUint64(p, 0)
}

// start starts the queue, as QEMU does.
func (d *driver) start(base uint16) {
	d.f.t.Helper()
	d.setUp(d.f, base)
}

// setUp starts the queue by the connection of f.
func (d *driver) setUp(f *frontEnd, base uint16) {
	f.t.Helper()
	d.f = f
	f.set(setVringCall, u64(uint64(d.index)), d.call)
	f.set(setVringNum, state(d.index, uint32(d.num)))
	f.set(setVringBase, state(d.index, uint32(base)))
	f.set(setVringAddr, d.addr())
	f.set(setVringKick, u64(uint64(d.index)), d.kick)
	if f.features&featureProtocol != 0 {
		f.set(setVringEnable, state(d.index, 1))
	}
}

// stop stops the queue, and returns its base.
func (d *driver) stop() uint16 {
	d.f.t.Helper()
	p := d.f.ask(getVringBase, state(d.index, 0))
	return uint16(binary.LittleEndian.Uint64(p) >> 32)
}

func (d *driver) eventIdx() bool { return d.f.features&featureEventIdx != 0 }

// setDesc writes a descriptor at an offset of the guest's memory.
func (m *guestMemory) setDesc(at int, addr uint64, n uint32, flags, next uint16) {
	p := m.at(at, descLen)
	binary.LittleEndian.PutUint64(p, addr)
	binary.LittleEndian.PutUint32(p[8:], n)
	binary.LittleEndian.PutUint16(p[12:], flags)
	binary.LittleEndian.PutUint16(p[14:], next)
}

// add makes a request available, and returns its slot. out is data for the device; in is how
// many bytes the device returns.
func (d *driver) add(op operation, sector uint64, out []byte, in int) int {
	i := d.free[len(d.free)-1]
	d.free = d.free[:len(d.free)-1]
	s := &d.slots[i]
	m := d.f.mem
	h := m.at(s.header, headerSize)
	binary.LittleEndian.PutUint32(h, uint32(op))
	binary.LittleEndian.PutUint64(h[8:], sector)
	m.at(s.status, 1)[0] = 0xee
	s.n = in
	flags := uint16(descWrite)
	if len(out) > 0 {
		s.n, flags = len(out), 0
		copy(m.at(s.data, len(out)), out)
	}
	table, first := d.desc+int(s.head)*descLen, s.head
	if d.inTable {
		table, first = s.table, 0
	}
	n := uint16(0)
	put := func(addr uint64, size int, flags uint16) {
		m.setDesc(table+int(n)*descLen, addr, uint32(size), flags, first+n+1)
		n++
	}
	put(guest(s.header), headerSize, descNext)
	if s.n > 0 {
		put(guest(s.data), s.n, flags|descNext)
	}
	put(guest(s.status), 1, descWrite)
	if d.inTable {
		m.setDesc(d.desc+int(s.head)*descLen, guest(s.table), uint32(n)*descLen, descIndirect, 0)
	}
	d.byHead[s.head] = i
	d.offer(s.head)
	return i
}

// offer makes a head available.
func (d *driver) offer(head uint16) {
	p := d.f.mem.at(d.avail, 6+2*d.num)
	binary.LittleEndian.PutUint16(p[4+2*(int(d.next)%d.num):], head)
	d.next++
	d.setAvail()
}

// give makes the chain available that begins at the head of slot i, and waits for its end.
func (d *driver) give(i int) {
	d.f.t.Helper()
	d.byHead[d.slots[i].head] = i
	old := d.next
	d.offer(d.slots[i].head)
	d.notify(old)
	d.await(i)
	delete(d.done, i)
}

// setAvail publishes the idx of the available ring.
func (d *driver) setAvail() {
	w := (*uint32)(unsafe.Pointer(&d.f.mem.at(d.avail, 4)[0]))
	atomic.StoreUint32(w, *w&0xffff|uint32(d.next)<<16)
}

// notify kicks the device if it wants that, now that the idx has grown from old.
func (d *driver) notify(old uint16) {
	u := d.f.mem.at(d.used, 6+8*d.num)
	wanted := atomic.LoadUint32((*uint32)(unsafe.Pointer(&u[0])))&usedNoNotify == 0
	if d.eventIdx() {
		event := binary.LittleEndian.Uint16(u[4+8*d.num:])
		wanted = d.next-event-1 < d.next-old
	}
	if wanted {
		d.kicked++
		notify(d.kick)
	}
}

// collect notes what is in the used ring. It fails the test for a head that was not given
// or was completed already.
func (d *driver) collect() {
	u := d.f.mem.at(d.used, 6+8*d.num)
	for idx := uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&u[0]))) >> 16); d.seen != idx; d.seen++ {
		head := uint16(binary.LittleEndian.Uint32(u[4+8*(int(d.seen)%d.num):]))
		i, ok := d.byHead[head]
		if !ok {
			d.f.t.Fatalf("head %d was completed, and is not in flight", head)
		}
		delete(d.byHead, head)
		d.done[i] = true
	}
}

// wantCall says whether the device is to interrupt at the next completion.
func (d *driver) wantCall(on bool) {
	p := d.f.mem.at(d.avail, 6+2*d.num)
	if d.eventIdx() {
		event := d.seen
		if !on {
			event = d.seen - 1
		}
		binary.LittleEndian.PutUint16(p[4+2*d.num:], event)
		d.setAvail() // a barrier
		return
	}
	w := (*uint32)(unsafe.Pointer(&p[0]))
	flags := uint32(availNoInterrupt)
	if on {
		flags = 0
	}
	atomic.StoreUint32(w, flags|uint32(d.next)<<16)
}

// wait waits for a request by the device's interrupts, and returns its status and data.
func (d *driver) wait(i int) (byte, []byte) {
	d.f.t.Helper()
	d.await(i)
	s := &d.slots[i]
	delete(d.done, i)
	d.free = append(d.free, i)
	return d.f.mem.at(s.status, 1)[0], d.f.mem.at(s.data, s.n)
}

func (d *driver) await(i int) {
	d.f.t.Helper()
	d.awaitThat(func() bool { return d.done[i] })
}

// awaitAny waits until some request is done.
func (d *driver) awaitAny() {
	d.f.t.Helper()
	d.awaitThat(func() bool { return len(d.done) > 0 })
}

func (d *driver) awaitThat(is func() bool) {
	d.f.t.Helper()
	end := time.Now().Add(limit)
	for {
		if d.collect(); is() {
			return
		}
		d.wantCall(true)
		if d.collect(); is() {
			return
		}
		p := []unix.PollFd{{Fd: int32(d.call), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 1000)
		if err != nil && err != unix.EINTR {
			d.f.t.Fatal(err)
		}
		if n > 0 {
			d.called++
			var b [8]byte
			unix.Read(d.call, b[:])
		} else if time.Now().After(end) {
			d.f.t.Fatalf("no interrupt within %v", limit)
		}
	}
}

// do does one request.
func (d *driver) do(op operation, sector uint64, out []byte, in int) (byte, []byte) {
	d.f.t.Helper()
	old := d.next
	i := d.add(op, sector, out, in)
	d.notify(old)
	return d.wait(i)
}

// ok does one request that has to succeed.
func (d *driver) ok(op operation, sector uint64, out []byte, in int) []byte {
	d.f.t.Helper()
	code, p := d.do(op, sector, out, in)
	if code != statusOK {
		d.f.t.Fatalf("%v at sector %d: status %d", op, sector, code)
	}
	return p
}

// filled is a device with content.
func filled(size int64) *blocktest.Memory {
	d := blocktest.NewMemory(size)
	p := make([]byte, size)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(i)*0x9e3779b97f4a7c15+1)
	}
	d.Fill(p, 0)
	return d
}

func content(d *blocktest.Memory, off, n int64) []byte { return d.Content(blockmap.Range(off, n)) }
