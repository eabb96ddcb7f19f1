package vhost

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
)

// A driver that breaks its ring loses that queue until it sets it up anew. Nothing else suffers.
func TestBrokenRings(t *testing.T) {
	outside := guest(memoryLen)
	// Each case writes the descriptors of slot 0, or the ring itself.
	for name, breakRing := range map[string]func(d *driver, s slot){
		"head too large": func(d *driver, s slot) { d.offer(uint16(d.num)) },
		"idx too far": func(d *driver, s slot) { // although each head is one of a chain
			d.chain(s, guest(s.data), 512)
			for i := range d.num {
				binary.LittleEndian.PutUint16(d.f.mem.at(d.avail+4+2*i, 2), s.head)
			}
			d.next += uint16(d.num)
			d.setAvail()
		},
		"chain is a loop": func(d *driver, s slot) {
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.header), headerSize, descNext, s.head)
			d.offer(s.head)
		},
		"loop in a table": func(d *driver, s slot) {
			d.f.mem.setDesc(s.table, guest(s.header), headerSize, descNext, 1)
			d.f.mem.setDesc(s.table+descLen, guest(s.data), 1, descNext|descWrite, 1)
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.table), 2*descLen, descIndirect, 0)
			d.offer(s.head)
		},
		"next too large": func(d *driver, s slot) {
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.header), headerSize, descNext, uint16(d.num))
			d.offer(s.head)
		},
		"largest next": func(d *driver, s slot) {
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.header), headerSize, descNext, 1<<16-1)
			d.offer(s.head)
		},
		"next beyond the table": func(d *driver, s slot) {
			d.f.mem.setDesc(s.table, guest(s.header), headerSize, descNext, 1)
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.table), descLen, descIndirect, 0)
			d.offer(s.head)
		},
		"buffer outside": func(d *driver, s slot) { d.chain(s, outside, 512) },
		"buffer at 0":    func(d *driver, s slot) { d.chain(s, 0, 512) },
		"buffer ends outside": func(d *driver, s slot) {
			d.chain(s, guest(memoryLen-511), 512)
		},
		"buffer wraps": func(d *driver, s slot) { d.chain(s, 1<<64-256, 512) },
		"buffer by its user address": func(d *driver, s slot) {
			d.chain(s, user(s.data), 512)
		},
		"largest buffer": func(d *driver, s slot) { d.chain(s, guest(0), 1<<32-1) },
		"table in a table": func(d *driver, s slot) {
			d.f.mem.setDesc(s.table, guest(s.table), descLen, descIndirect, 0)
			d.f.mem.setDesc(d.desc+int(s.head)*descLen, guest(s.table), descLen, descIndirect, 0)
			d.offer(s.head)
		},
		"table with a next":  func(d *driver, s slot) { d.table(s, guest(s.table), descLen, descNext) },
		"table is empty":     func(d *driver, s slot) { d.table(s, guest(s.table), 0, 0) },
		"table is cut":       func(d *driver, s slot) { d.table(s, guest(s.table), descLen+1, 0) },
		"table is too large": func(d *driver, s slot) { d.table(s, guest(0), (maxChain+1)*descLen, 0) },
		"table is huge":      func(d *driver, s slot) { d.table(s, guest(0), 1<<32-descLen, 0) },
		"table is outside":   func(d *driver, s slot) { d.table(s, outside, descLen, 0) },
		"table ends outside": func(d *driver, s slot) { d.table(s, guest(memoryLen-descLen), 2*descLen, 0) },
		"read after write": func(d *driver, s slot) {
			copy(d.f.mem.at(s.table, 64), table([]part{{s.header, 16, 0}, {s.status, 1, descWrite}, {s.data, 512, 0}}))
			d.table(s, guest(s.table), 3*descLen, 0)
		},
		"no status": func(d *driver, s slot) {
			copy(d.f.mem.at(s.table, 64), table([]part{{s.header, 16, 0}, {s.data, 512, 0}}))
			d.table(s, guest(s.table), 2*descLen, 0)
		},
		"header too short": func(d *driver, s slot) {
			copy(d.f.mem.at(s.table, 64), table([]part{{s.header, 15, 0}, {s.status, 1, descWrite}}))
			d.table(s, guest(s.table), 2*descLen, 0)
		},
		"nothing at all": func(d *driver, s slot) {
			copy(d.f.mem.at(s.table, 64), table([]part{{s.header, 0, 0}, {s.status, 0, descWrite}}))
			d.table(s, guest(s.table), 2*descLen, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev := filled(testSize)
			f := connect(t, serve(t, new(Server), nbd.Export{Device: dev}))
			f.negotiate(0)
			f.share(newGuestMemory(t))
			bad, good := f.newDriver(0, 64), f.newDriver(1, 16)
			bad.start(0)
			good.start(0)
			broken := eventfd(t)
			f.set(setVringErr, u64(0), broken)
			bad.ok(opIn, 0, nil, 4096)
			breakRing(bad, bad.slots[0])
			notify(bad.kick)
			p := []unix.PollFd{{Fd: int32(broken), Events: unix.POLLIN}}
			for end := time.Now().Add(limit); ; {
				n, err := unix.Poll(p, 100)
				if err == nil && n == 1 {
					break
				}
				if time.Now().After(end) {
					t.Fatal("the front end is not told")
				}
			}
			if bad.collect(); bad.seen != 1 {
				t.Errorf("%d requests were completed", bad.seen)
			}
			for i := range 20 {
				if p := good.ok(opIn, uint64(i), nil, 512); !bytes.Equal(p, content(dev, int64(i)*512, 512)) {
					t.Fatal("the other queue: wrong bytes")
				}
			}
			bad.stop()
			again := f.newDriver(0, 16)
			again.start(0)
			again.ok(opIn, 0, nil, 512)
			if !bytes.Equal(content(dev, 0, testSize), content(filled(testSize), 0, testSize)) {
				t.Error("the device has changed")
			}
		})
	}
}

// chain makes a chain of header, a buffer, and status available.
func (d *driver) chain(s slot, addr uint64, n uint32) {
	m := d.f.mem
	clear(m.at(s.header, headerSize))
	at := d.desc + int(s.head)*descLen
	m.setDesc(at, guest(s.header), headerSize, descNext, s.head+1)
	m.setDesc(at+descLen, addr, n, descNext|descWrite, s.head+2)
	m.setDesc(at+2*descLen, guest(s.status), 1, descWrite, 0)
	d.offer(s.head)
}

// table makes an indirect table available.
func (d *driver) table(s slot, addr uint64, n uint32, flags uint16) {
	d.f.mem.setDesc(d.desc+int(s.head)*descLen, addr, n, descIndirect|flags, s.head+1)
	d.offer(s.head)
}

// A request whose buffers overlap in the guest's memory, over and over, is bounded by its length.
func TestLargeRequest(t *testing.T) {
	dev := blocktest.NewMemory(256 << 20)
	f, d := disk(t, nbd.Export{Device: dev})
	s := d.slots[0]
	parts := []part{{s.header, 16, 0}}
	for range 200 {
		parts = append(parts, part{s.data, dataLen, descWrite})
	}
	parts = append(parts, part{s.status, 1, descWrite})
	at := f.mem.alloc(len(parts) * descLen)
	copy(f.mem.at(at, len(parts)*descLen), table(parts))
	clear(f.mem.at(s.header, headerSize))
	f.mem.setDesc(d.desc+int(s.head)*descLen, guest(at), uint32(len(parts)*descLen), descIndirect, 0)
	d.give(0)
	if code := f.mem.at(s.status, 1)[0]; code != statusIOErr {
		t.Errorf("status %d", code)
	}
}

// A message that makes no sense ends its connection, and nothing else.
func TestBadMessages(t *testing.T) {
	dev := filled(testSize)
	path := serve(t, new(Server), nbd.Export{Device: dev, ReadOnly: true})
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	must(t, err)
	defer file.Close()
	zero, err := os.Open("/dev/zero")
	must(t, err)
	defer zero.Close()
	mem := newGuestMemory(t)
	event := eventfd(t)
	fd := mem.fd
	regions := func(n ...uint64) []byte {
		p := u64(uint64(len(n) / 4))
		for _, v := range n {
			p = binary.LittleEndian.AppendUint64(p, v)
		}
		return p
	}
	area := func(size, off uint64, queues, num uint16) []byte {
		return append(inflightArea{size, off, queues, num}.payload(), 0, 0, 0, 0)
	}
	for name, c := range map[string]struct {
		id      requestID
		flags   uint32
		payload []byte
		fds     []int
	}{
		"unknown":                  {77, 0, nil, nil},
		"zero":                     {0, 0, nil, nil},
		"not offered":              {6, 0, u64(0), nil},
		"other version":            {getFeatures, 2, nil, nil},
		"a reply":                  {getFeatures, flagReply, nil, nil},
		"too long":                 {getFeatures, 0, make([]byte, maxPayload+1), nil},
		"short number":             {setFeatures, 0, make([]byte, 7), nil},
		"long number":              {setFeatures, 0, make([]byte, 9), nil},
		"packed ring":              {setFeatures, 0, u64(featurePacked), nil},
		"IOMMU":                    {setFeatures, 0, u64(featureIOMMU), nil},
		"protocol feature":         {setProtocolFeatures, 0, u64(1 << 1), nil},
		"owner with payload":       {setOwner, 0, u64(1), nil},
		"memory: nothing":          {setMemTable, 0, nil, nil},
		"memory: cut":              {setMemTable, 0, mem.table()[:71], []int{fd, fd}},
		"memory: no descriptors":   {setMemTable, 0, mem.table(), nil},
		"memory: one descriptor":   {setMemTable, 0, mem.table(), []int{fd}},
		"memory: too many regions": {setMemTable, 0, regions(make([]uint64, 36)...), []int{fd}},
		"memory: many descriptors": {setMemTable, 0, mem.table(), []int{fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd}},
		"memory: count":            {setMemTable, 0, append(u64(1<<32-1), mem.table()[8:]...), []int{fd, fd}},
		"memory: empty region":     {setMemTable, 0, regions(0, 0, 0, 0), []int{fd}},
		"memory: beyond the file":  {setMemTable, 0, regions(0, 4096, 0, memoryLen), []int{fd}},
		"memory: huge":             {setMemTable, 0, regions(0, 1<<50, 0, 0), []int{fd}},
		"memory: offset wraps":     {setMemTable, 0, regions(0, 4096, 0, 1<<64-4096), []int{fd}},
		"memory: guest wraps":      {setMemTable, 0, regions(1<<64-4096, 8192, 0, 0), []int{fd}},
		"memory: user wraps":       {setMemTable, 0, regions(0, 8192, 1<<64-4096, 0), []int{fd}},
		"memory: guest overlap":    {setMemTable, 0, regions(0, 8192, 0, 0, 4096, 8192, 1<<20, 0), []int{fd, fd}},
		"memory: user overlap":     {setMemTable, 0, regions(0, 8192, 0, 0, 1<<20, 8192, 4096, 0), []int{fd, fd}},
		"memory: an eventfd":       {setMemTable, 0, regions(0, 8192, 0, 0), []int{event}},
		"memory: empty file":       {setMemTable, 0, regions(0, 8192, 0, 0), []int{int(file.Fd())}},
		"queue":                    {setVringNum, 0, state(64, 64), nil},
		"queue to start":           {setVringEnable, 0, state(1<<31, 1), nil},
		"queue to stop":            {getVringBase, 0, state(64, 0), nil},
		"queue of nothing":         {setVringNum, 0, state(0, 0), nil},
		"queue of three":           {setVringNum, 0, state(0, 3), nil},
		"queue of 65536":           {setVringNum, 0, state(0, 65536), nil},
		"base":                     {setVringBase, 0, state(0, 65536), nil},
		"enable":                   {setVringEnable, 0, state(0, 2), nil},
		"address":                  {setVringAddr, 0, state(0, 0), nil},
		"kick of another queue":    {setVringKick, 0, u64(200), []int{event}},
		"kick by nothing":          {setVringKick, 0, u64(0x100), nil},
		"kick without descriptor":  {setVringKick, 0, u64(0), nil},
		"kick by two":              {setVringKick, 0, u64(0), []int{event, event}},
		"kick by a file":           {setVringKick, 0, u64(0), []int{int(file.Fd())}},
		"kick by /dev/zero":        {setVringKick, 0, u64(0), []int{int(zero.Fd())}},
		"call by a file":           {setVringCall, 0, u64(0), []int{int(file.Fd())}},
		"inflight: cut":            {getInflightFD, 0, area(0, 0, 1, 64)[:19], nil},
		"inflight: no queue":       {getInflightFD, 0, area(0, 0, 0, 64), nil},
		"inflight: many queues":    {getInflightFD, 0, area(0, 0, 65, 64), nil},
		"inflight: queue":          {getInflightFD, 0, area(0, 0, 1, 65535), nil},
		"inflight: no descriptor":  {setInflightFD, 0, area(4096, 0, 1, 64), nil},
		"inflight: too small":      {setInflightFD, 0, area(100, 0, 1, 64), []int{fd}},
		"inflight: small file":     {setInflightFD, 0, area(4096, 0, 1, 64), []int{int(file.Fd())}},
		"inflight: beyond":         {setInflightFD, 0, area(4096, memoryLen, 1, 64), []int{fd}},
		"inflight: offset wraps":   {setInflightFD, 0, area(4096, 1<<64-4096, 1, 64), []int{fd}},
		"inflight: not a page":     {setInflightFD, 0, area(4096, 8, 1, 64), []int{fd}},
		"inflight: an eventfd":     {setInflightFD, 0, area(4096, 0, 1, 64), []int{event}},
	} {
		t.Run(name, func(t *testing.T) {
			f := connect(t, path)
			f.send(c.id, c.flags, c.payload, c.fds...)
			if !f.hungUp() {
				t.Error("the connection is open")
			}
		})
	}
	t.Run("cut", func(t *testing.T) {
		f := connect(t, path)
		f.nc.Write([]byte{1, 0, 0})
		f.nc.CloseWrite()
		if !f.hungUp() {
			t.Error("the connection is open")
		}
	})
	t.Run("rings outside the memory", func(t *testing.T) {
		f := connect(t, path)
		f.negotiate(0)
		f.share(mem)
		d := f.newDriver(0, 16)
		d.desc = memoryLen - 64
		f.set(setVringNum, state(0, 16))
		f.set(setVringAddr, d.addr())
		f.set(setVringKick, u64(0), d.kick)
		f.send(setVringEnable, 0, state(0, 1))
		if !f.hungUp() {
			t.Error("the connection is open")
		}
	})
	t.Run("while it runs", func(t *testing.T) {
		for _, m := range []struct {
			id requestID
			p  []byte
		}{{setVringNum, state(0, 32)}, {setVringBase, state(0, 3)}, {setFeatures, u64(featureVersion1)}} {
			f := connect(t, path)
			f.negotiate(0)
			f.share(newGuestMemory(t))
			f.newDriver(0, 16).start(0)
			f.send(m.id, 0, m.p)
			if !f.hungUp() {
				t.Errorf("%v is taken while the queue runs", m.id)
			}
		}
	})
	f := connect(t, path)
	f.negotiate(0)
	f.share(newGuestMemory(t))
	d := f.newDriver(0, 16)
	d.start(0)
	d.ok(opIn, 0, nil, 512)
	if n := openFDs(t); n > 60 {
		t.Errorf("%d descriptors are open", n)
	}
}

func openFDs(t *testing.T) int {
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names)
}

// The memory of a guest is bounded.
func TestMaxMemory(t *testing.T) {
	f := connect(t, serve(t, &Server{MaxMemory: memoryLen}, nbd.Export{Device: filled(testSize)}))
	mem := newGuestMemory(t)
	f.negotiate(0)
	f.send(setMemTable, 0, mem.table(), mem.fd, mem.fd) // maps the first region's file to the end, and more
	if !f.hungUp() {
		t.Error("the connection is open")
	}
}

// So is the memory of all guests of one listener, which leaves the others theirs.
func TestMaxMemoryOfEndpoint(t *testing.T) {
	one := nbd.Export{Name: "one", Device: filled(testSize), ReadOnly: true}
	two := nbd.Export{Name: "two", Device: filled(testSize), ReadOnly: true}
	s := &Server{Exports: nbd.Static{one, two}}
	path, other := serve(t, s, one), serve(t, s, two)
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Ftruncate(fd, DefaultMaxMemory)) // which takes no memory
	table := append(u64(1), u64(guestBase)...)
	for _, n := range []uint64{DefaultMaxMemory, userBase, 0} {
		table = append(table, u64(n)...)
	}
	var last *frontEnd
	for range maxEndpointMapped / DefaultMaxMemory {
		last = connect(t, path)
		last.negotiate(0)
		last.set(setMemTable, table, fd)
	}
	f := connect(t, path)
	f.negotiate(0)
	must(t, f.send(setMemTable, 0, table, fd))
	if !f.hungUp() {
		t.Error("the guests of a socket have more than they may")
	}
	f = connect(t, other)
	f.negotiate(0)
	f.set(setMemTable, table, fd)
	last.nc.Close()
	eventually(t, "the connections end", func() bool { return s.Stats().Conns <= maxEndpointMapped/DefaultMaxMemory })
	f = connect(t, path)
	f.negotiate(0)
	f.set(setMemTable, table, fd)
}

// A front end that truncates its memory loses its connection. The process lives.
func TestTruncatedMemory(t *testing.T) {
	for _, what := range []string{"ring", "data", "a miss", "a write", "in flight"} {
		t.Run(what, func(t *testing.T) {
			dev := filled(testSize)
			dev.Evict(blockmap.Range(1<<20, 4096))
			asked, release := make(chan struct{}), make(chan struct{})
			dev.OnFault = func(context.Context, blockmap.Extent) error { close(asked); <-release; return nil }
			s := new(Server)
			path := serve(t, s, nbd.Export{Device: dev})
			f := connect(t, path)
			f.negotiate(0)
			f.share(newGuestMemory(t))
			if what == "in flight" {
				fd, err := unix.MemfdCreate("inflight", unix.MFD_CLOEXEC)
				must(t, err)
				defer unix.Close(fd)
				a := inflightArea{size: 1 << 20, queues: 1, queueSize: 64}
				must(t, unix.Ftruncate(fd, 1<<20))
				f.set(setInflightFD, append(a.payload(), 0, 0, 0, 0), fd)
				d := f.newDriver(0, 64)
				d.start(0)
				d.ok(opIn, 0, nil, 512)
				must(t, unix.Ftruncate(fd, 0))
				d.add(opIn, 0, nil, 512)
				notify(d.kick)
			} else {
				d := f.newDriver(0, 64)
				d.start(0)
				d.ok(opIn, 0, nil, 512)
				switch what {
				case "ring":
				case "data": // the second region is the beginning of the file
					for range 5 {
						d.free = append([]int{d.add(opIn, 0, nil, 512)}, d.free...)
					}
				case "a miss":
					d.add(opIn, 1<<20>>sectorShift, nil, 4096)
					notify(d.kick)
					<-asked
				case "a write":
					d.add(opOut, 0, make([]byte, 4096), 0)
				}
				must(t, unix.Ftruncate(f.mem.fd, 0))
				close(release)
				notify(d.kick)
			}
			if !f.hungUp() {
				t.Error("the connection is open")
			}
			g := connect(t, path) // once the first one has ended
			g.negotiate(0)
			g.share(newGuestMemory(t))
			d := g.newDriver(0, 16)
			d.start(0)
			d.ok(opIn, 0, nil, 512)
		})
	}
}

// fragile is a device whose bytes lie in a mapped file. Once those turn out to be
// damaged, the device shows copies.
type fragile struct {
	blockmap.WritableDevice
	mapped  []byte
	damaged atomic.Bool
	cold    bool // only Load shows bytes
	reports atomic.Int32
	report  func() // called with each report; nil: nothing
}

func (d *fragile) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if d.cold && !d.damaged.Load() {
		return v, false
	}
	return d.Load(context.Background(), e)
}

func (d *fragile) Load(ctx context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	if d.damaged.Load() {
		return d.WritableDevice.Load(ctx, e)
	}
	v.Append(d.mapped[e.Start:e.End], d, 0)
	return v, true
}

func (d *fragile) Unpin(uint64)        {}
func (d *fragile) Pinned(uint64) int64 { return 4096 }

func (d *fragile) Damaged(uint64) {
	d.damaged.Store(true)
	d.reports.Add(1)
	if d.report != nil {
		d.report()
	}
}

// Bytes of the cache that cannot be read are fetched again; the guest notices nothing.
func TestDamagedViews(t *testing.T) {
	for _, cold := range []bool{false, true} {
		fd, err := unix.MemfdCreate("cache", unix.MFD_CLOEXEC)
		must(t, err)
		must(t, unix.Ftruncate(fd, testSize))
		b, err := unix.Mmap(fd, 0, testSize, unix.PROT_READ, unix.MAP_SHARED)
		must(t, err)
		mem := filled(testSize)
		dev := &fragile{WritableDevice: mem, mapped: b, cold: cold}
		s := new(Server)
		_, d := diskOf(t, s, nbd.Export{Device: dev})
		must(t, unix.Ftruncate(fd, 0))
		for i := range 40 {
			if p := d.ok(opIn, uint64(i), nil, 8192); !bytes.Equal(p, content(mem, int64(i)*512, 8192)) {
				t.Fatal("wrong bytes")
			}
		}
		if dev.reports.Load() == 0 || s.Stats().Repaired == 0 {
			t.Errorf("cold=%v: no damage was reported: this tests nothing", cold)
		}
		unix.Munmap(b)
		unix.Close(fd)
	}
}

// A queue that is stopped, or gets other memory, just when bytes of the cache turn out to be
// damaged completes what it has answered, and does the damaged request later: once, and in
// the memory that the guest has then.
func TestDamagedViewOfAHaltedQueue(t *testing.T) {
	for _, how := range []string{"stopped", "moved"} {
		t.Run(how, func(t *testing.T) {
			fd, err := unix.MemfdCreate("cache", unix.MFD_CLOEXEC)
			must(t, err)
			defer unix.Close(fd)
			must(t, unix.Ftruncate(fd, testSize))
			b, err := unix.Mmap(fd, 0, testSize, unix.PROT_READ, unix.MAP_SHARED)
			must(t, err)
			defer unix.Munmap(b)
			mem := filled(testSize)
			s := new(Server)
			dev := &fragile{WritableDevice: mem, mapped: b}
			found := make(chan struct{})
			dev.report = func() { // on the goroutine of the queue, within its pass
				var q *queue
				s.conns().View(func(conns map[*conn]struct{}) {
					for c := range conns {
						q = c.queues[0]
					}
				})
				close(found)
				select {
				case <-q.taking.Done():
				case <-time.After(limit):
					t.Error("nobody halts the queue")
				}
			}
			f, d := diskOf(t, s, nbd.Export{Device: dev})
			must(t, unix.Ftruncate(fd, 4096))
			before := d.next
			whole, damaged := d.add(opIn, 0, nil, 512), d.add(opIn, 16, nil, 512)
			d.notify(before)
			<-found
			if how == "stopped" {
				base := d.stop()
				if d.collect(); base != before+1 || !d.done[whole] || d.done[damaged] {
					t.Errorf("the base is %d; completed: %v", base, d.done)
				}
				d.start(base)
			} else {
				f.share(f.mem)
			}
			d.await(whole)
			d.await(damaged)
			got := append([]byte(nil), f.mem.get(d.slots[damaged].data, 512)...)
			if !bytes.Equal(got, content(mem, 16*512, 512)) {
				t.Error("wrong bytes")
			}
			if p := d.ok(opIn, 32, nil, 512); !bytes.Equal(p, content(mem, 32*512, 512)) {
				t.Error("wrong bytes afterwards")
			}
		})
	}
}
