package vhost

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
	"thaw/nbd/internal/lifecycle"
)

// What a guest reads and writes is what the device has, with each combination of the
// features of rings.
func TestReadWrite(t *testing.T) {
	for name, without := range map[string]uint64{
		"all": 0, "no EVENT_IDX": featureEventIdx, "no FLUSH": featureFlush, "no protocol features bit": featureProtocol,
	} {
		for _, indirect := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				dev := filled(testSize)
				f := connect(t, serve(t, new(Server), nbd.Export{Name: "disk", Device: dev}))
				f.negotiate(without)
				f.share(newGuestMemory(t))
				d := f.newDriver(0, 64)
				d.inTable = indirect
				d.start(0)
				want := content(dev, 0, testSize)
				rng := rand.New(rand.NewPCG(1, 2))
				for range 200 {
					off := rng.Int64N(testSize/sectorSize) * sectorSize
					n := min(1+rng.Int64N(64), (testSize-off)/sectorSize) * sectorSize
					if rng.IntN(2) == 0 {
						p := make([]byte, n)
						for i := range p {
							p[i] = byte(rng.Uint32())
						}
						d.ok(opOut, uint64(off/sectorSize), p, 0)
						copy(want[off:], p)
						if dirty := dev.Dirty(); without == featureFlush && dirty != 0 {
							t.Fatalf("the driver does not flush, and %d writes are not durable", dirty)
						}
					} else if p := d.ok(opIn, uint64(off/sectorSize), nil, int(n)); !bytes.Equal(p, want[off:off+n]) {
						t.Fatalf("read of %d bytes at %d: wrong bytes", n, off)
					}
				}
				d.ok(opFlush, 0, nil, 0)
				if dirty := dev.Dirty(); dirty != 0 {
					t.Errorf("after a flush %d writes are not durable", dirty)
				}
				if !bytes.Equal(content(dev, 0, testSize), want) {
					t.Error("the device has other bytes")
				}
				dev.NoPins(t)
			})
		}
	}
}

// Bytes come from everywhere a device has them: memory, the disk, a source; in requests of
// any size.
func TestMisses(t *testing.T) {
	dev := filled(testSize)
	dev.Chill(blockmap.Range(1<<20, 1<<20))
	dev.Evict(blockmap.Range(2<<20, 1<<20))
	s := new(Server)
	_, d := diskOf(t, s, nbd.Export{Device: dev, ReadOnly: true})
	var total int64
	rng := rand.New(rand.NewPCG(3, 4))
	for range 60 {
		dev.Evict(blockmap.Range(2<<20, 1<<20))
		old := d.next
		type read struct {
			off int64
			n   int
			at  int
		}
		var reads []read
		for range 8 {
			off := rng.Int64N(4<<20/sectorSize) * sectorSize
			n := (1 + rng.IntN(dataLen/sectorSize)) * sectorSize
			if rng.IntN(3) > 0 {
				n = 4096
			}
			reads = append(reads, read{off, n, d.add(opIn, uint64(off/sectorSize), nil, n)})
		}
		d.notify(old)
		for _, r := range reads {
			if code, p := d.wait(r.at); code != statusOK || !bytes.Equal(p, content(dev, r.off, int64(r.n))) {
				t.Fatalf("read of %d bytes at %d: status %d, or wrong bytes", r.n, r.off, code)
			}
			total += int64(r.n)
		}
	}
	if st := s.Stats(); st.Read != total || st.Hits+st.Misses != 60*8 {
		t.Errorf("%+v after %d bytes", st, total)
	}
	dev.NoPins(t)
}

// A miss holds up no hit, nor another miss.
func TestMissHoldsUpNothing(t *testing.T) {
	dev := filled(testSize)
	slow := blockmap.Range(1<<20, 4096)
	dev.Evict(slow)
	release := make(chan struct{})
	dev.OnFault = func(ctx context.Context, e blockmap.Extent) error {
		if e.Start >= slow.Start && e.Start < slow.End {
			<-release
		}
		return nil
	}
	_, d := disk(t, nbd.Export{Device: dev})
	old := d.next
	miss := d.add(opIn, uint64(slow.Start/sectorSize), nil, 4096)
	d.notify(old)
	for range 100 {
		d.ok(opIn, 0, nil, 4096)
		d.ok(opOut, 0, make([]byte, 4096), 0)
	}
	if d.collect(); d.done[miss] {
		t.Fatal("the miss has not missed")
	}
	close(release)
	if code, p := d.wait(miss); code != statusOK || !bytes.Equal(p, content(dev, slow.Start, 4096)) {
		t.Errorf("the miss: status %d, or wrong bytes", code)
	}
}

// ranges is the data of DISCARD and WRITE_ZEROES.
func ranges(n ...uint64) (p []byte) {
	for ; len(n) > 0; n = n[3:] {
		p = binary.LittleEndian.AppendUint64(p, n[0])
		p = binary.LittleEndian.AppendUint32(p, uint32(n[1]))
		p = binary.LittleEndian.AppendUint32(p, uint32(n[2]))
	}
	return p
}

func TestDiscardAndZeroes(t *testing.T) {
	dev := filled(testSize)
	_, d := disk(t, nbd.Export{Device: dev})
	d.ok(opWriteZeroes, 0, ranges(8, 8, 0, 32, 16, unmapFlag), 0)
	d.ok(opDiscard, 0, ranges(100*8, 8, 0), 0)
	for _, e := range []blockmap.Extent{blockmap.Range(8*512, 8*512), blockmap.Range(32*512, 16*512), blockmap.Range(100*4096, 4096)} {
		if p := content(dev, e.Start, e.Len()); !bytes.Equal(p, make([]byte, e.Len())) {
			t.Errorf("%v is not zero", e)
		}
	}
	hole := func(off int64) bool { return dev.Status(blockmap.Range(off, 4096)).Zero }
	if hole(8*512) || !hole(32*512) {
		t.Error("zeroes are a hole although that was not allowed, or are none although it was")
	}
	before := content(dev, 0, testSize)
	for name, c := range map[string]struct {
		op   operation
		p    []byte
		want byte
	}{
		"unmap in a discard":       {opDiscard, ranges(0, 8, unmapFlag), statusUnsup},
		"unknown flag":             {opWriteZeroes, ranges(0, 8, 2), statusUnsup},
		"second range bad":         {opWriteZeroes, ranges(0, 8, 0, testSize/512, 8, 0), statusIOErr},
		"beyond the end":           {opDiscard, ranges(testSize/512-1, 2, 0), statusIOErr},
		"sector overflows":         {opDiscard, ranges(1<<63, 2, 0), statusIOErr},
		"too many sectors":         {opWriteZeroes, ranges(0, maxDiscardSectors+1, 0), statusIOErr},
		"not a whole range":        {opDiscard, ranges(0, 8, 0)[:15], statusIOErr},
		"too many ranges":          {opDiscard, bytes.Repeat(ranges(0, 8, 0), maxDiscardSegs+1), statusIOErr},
		"no range":                 {opDiscard, nil, statusIOErr},
		"read to too small sector": {opIn, nil, statusOK},
	} {
		if code, _ := d.do(c.op, 0, c.p, 0); code != c.want {
			t.Errorf("%s: status %d, want %d", name, code, c.want)
		}
	}
	if !bytes.Equal(content(dev, 0, testSize), before) {
		t.Error("a request that has failed has changed the device")
	}
}

// Errors of requests are statuses, and end nothing.
func TestRequestErrors(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 4096))
	dev.OnFault = func(context.Context, blockmap.Extent) error { return errors.New("the origin is down") }
	dev.OnWrite = func(_ context.Context, e blockmap.Extent) error {
		if e.Start == 4096 {
			return blockmap.ErrNoSpace
		}
		return nil
	}
	_, d := disk(t, nbd.Export{Name: "a name that is longer than 20 bytes", Device: dev})
	end := uint64(testSize / sectorSize)
	for name, c := range map[string]struct {
		op     operation
		sector uint64
		out    []byte
		in     int
		want   byte
	}{
		"read beyond the end":    {opIn, end, nil, 512, statusIOErr},
		"read over the end":      {opIn, end - 1, nil, 1024, statusIOErr},
		"sector overflows":       {opIn, 1 << 62, nil, 512, statusIOErr},
		"largest sector":         {opIn, 1<<64 - 1, nil, 512, statusIOErr},
		"write over the end":     {opOut, end - 1, make([]byte, 1024), 0, statusIOErr},
		"part of a sector":       {opIn, 0, nil, 100, statusIOErr},
		"write part of a sector": {opOut, 0, make([]byte, 100), 0, statusIOErr},
		"fetch fails":            {opIn, 1 << 20 >> sectorShift, nil, 4096, statusIOErr},
		"no space":               {opOut, 8, make([]byte, 4096), 0, statusIOErr},
		"unknown":                {99, 0, nil, 512, statusUnsup},
		"nothing to read":        {opIn, 0, nil, 0, statusOK},
		"nothing to write":       {opOut, 0, nil, 0, statusOK},
	} {
		if code, _ := d.do(c.op, c.sector, c.out, c.in); code != c.want {
			t.Errorf("%s: status %d, want %d", name, code, c.want)
		}
	}
	id := deviceID("a name that is longer than 20 bytes")
	if p := d.ok(opGetID, 0, nil, idLen); !bytes.Equal(p, id[:]) || bytes.Contains(p, []byte{0}) {
		t.Errorf("the ID is %q", p)
	}
	d.ok(opIn, 0, nil, 4096)
}

func TestReadOnly(t *testing.T) {
	dev := filled(testSize)
	f, d := disk(t, nbd.Export{Name: "disk", Device: dev, ReadOnly: true})
	if f.features&featureRO == 0 || f.features&(featureFlush|featureDiscard|featureWriteZeroes) != 0 {
		t.Errorf("the features are %#x", f.features)
	}
	before := content(dev, 0, testSize)
	if code, _ := d.do(opOut, 0, make([]byte, 512), 0); code != statusIOErr {
		t.Errorf("write: status %d", code)
	}
	if code, _ := d.do(opDiscard, 0, ranges(0, 8, 0), 0); code != statusUnsup {
		t.Errorf("discard: status %d", code)
	}
	d.ok(opFlush, 0, nil, 0)
	if p := d.ok(opGetID, 0, nil, idLen); string(p[:5]) != "disk\x00" {
		t.Errorf("the ID is %q", p)
	}
	if !bytes.Equal(content(dev, 0, testSize), before) {
		t.Error("the device has changed")
	}
}

func TestConfig(t *testing.T) {
	dev := filled(testSize)
	f := connect(t, serve(t, &Server{MaxQueues: 7}, nbd.Export{Device: dev}))
	f.negotiate(0)
	ask := func(off, n uint32) []byte {
		p := binary.LittleEndian.AppendUint32(nil, off)
		p = binary.LittleEndian.AppendUint32(p, n)
		p = append(p, 0, 0, 0, 0)
		return f.ask(getConfig, append(p, make([]byte, min(n, 300))...))
	}
	p := ask(0, configLen)
	if len(p) != configHeaderLen+configLen {
		t.Fatalf("the configuration space has %d bytes", len(p))
	}
	c := p[configHeaderLen:]
	if n := binary.LittleEndian.Uint64(c); n != testSize/512 {
		t.Errorf("capacity %d", n)
	}
	if n := binary.LittleEndian.Uint16(c[34:]); n != 7 {
		t.Errorf("%d queues", n)
	}
	if n := binary.LittleEndian.Uint64(f.ask(getQueueNum, nil)); n != 7 {
		t.Errorf("%d queues", n)
	}
	if p := ask(8, 96); len(p) != configHeaderLen+96 || !bytes.Equal(p[configHeaderLen:][:configLen-8], c[8:]) {
		t.Errorf("a part of the configuration space is %x", p)
	}
	if p := ask(mmioConfig, configLen); !bytes.Equal(p[configHeaderLen:], c) || binary.LittleEndian.Uint32(p) != mmioConfig {
		t.Errorf("at the offset of virtio-mmio the configuration space is %x", p)
	}
	if p := ask(maxConfig+1, 8); len(p) != 0 {
		t.Errorf("beyond the configuration space: %x", p)
	}
	// No field can be written to.
	must(t, f.send(setConfig, flagNeedReply, append(make([]byte, configHeaderLen), 1)))
	if p, _ := f.reply(setConfig); !bytes.Equal(p, u64(1)) {
		t.Errorf("SET_CONFIG: %x", p)
	}
}

// The driver can turn interrupts and kicks off, and the server does without them.
func TestSuppression(t *testing.T) {
	for _, without := range []uint64{0, featureEventIdx} {
		dev := filled(testSize)
		s := new(Server)
		f := connect(t, serve(t, s, nbd.Export{Device: dev}))
		f.negotiate(without)
		f.share(newGuestMemory(t))
		d := f.newDriver(0, 64)
		d.start(0)
		d.ok(opIn, 0, nil, 512)
		// The driver sees a completion before the server decides whether to interrupt. A queue
		// that gets its memory anew has ended its pass.
		f.share(f.mem)
		var b [8]byte
		unix.Read(d.call, b[:])
		d.wantCall(false)
		before := s.Stats().Interrupts
		var slots []int
		old := d.next
		for i := range queueSlots {
			slots = append(slots, d.add(opIn, uint64(8*i), nil, 4096))
		}
		d.notify(old)
		for end := time.Now().Add(limit); len(d.byHead) > 0; d.collect() {
			if time.Now().After(end) {
				t.Fatal("the requests are not done")
			}
		}
		f.share(f.mem)
		if _, err := unix.Read(d.call, b[:]); err != unix.EAGAIN || s.Stats().Interrupts != before {
			t.Errorf("without %#x: the driver was interrupted although it does not want that", without)
		}
		for _, i := range slots {
			d.wait(i)
		}
		if st := s.Stats(); st.Hits != queueSlots+1 || st.Read != 512+queueSlots*4096 || st.Kicks > 3 || st.Conns != 1 || st.Accepted != 1 {
			t.Errorf("%+v", st)
		}
	}
}

// Queues work side by side. Each is stopped and started on its own.
func TestQueues(t *testing.T) {
	dev := filled(testSize)
	f := connect(t, serve(t, new(Server), nbd.Export{Device: dev}))
	f.negotiate(0)
	f.share(newGuestMemory(t))
	var ds []*driver
	for i := range 2 {
		d := f.newDriver(i, 16)
		d.start(0)
		ds = append(ds, d)
	}
	for i := range 50 {
		for _, d := range ds {
			if p := d.ok(opIn, uint64(i), nil, 512); !bytes.Equal(p, content(dev, int64(i)*512, 512)) {
				t.Fatalf("queue %d: wrong bytes", d.index)
			}
		}
	}
	if base := ds[0].stop(); base != 50 {
		t.Errorf("the base is %d", base)
	}
	old := ds[0].next
	i := ds[0].add(opIn, 7, nil, 512)
	ds[0].notify(old)
	ds[1].ok(opIn, 1, nil, 512)
	if ds[0].collect(); ds[0].done[i] {
		t.Error("a stopped queue has done a request")
	}
	var b [8]byte
	unix.Read(ds[0].call, b[:])
	ds[0].wantCall(false)
	ds[0].start(50)
	// An interrupt may have been lost with the earlier connection, so there is one more.
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(ds[0].call), Events: unix.POLLIN}}, 10_000); n != 1 {
		t.Errorf("the start interrupts nobody: %v", err)
	}
	if code, p := ds[0].wait(i); code != statusOK || !bytes.Equal(p, content(dev, 7*512, 512)) {
		t.Errorf("after the start: status %d, or wrong bytes", code)
	}
	// A disabled one waits, too.
	f.set(setVringEnable, state(1, 0))
	i = ds[1].add(opIn, 9, nil, 512)
	notify(ds[1].kick)
	ds[0].ok(opIn, 1, nil, 512)
	if ds[1].collect(); ds[1].done[i] {
		t.Error("a disabled queue has done a request")
	}
	f.set(setVringEnable, state(1, 1))
	if code, _ := ds[1].wait(i); code != statusOK {
		t.Errorf("enabled again: status %d", code)
	}
	// After a reset the device is set up from the beginning.
	f.set(resetDevice, nil)
	f.set(setFeatures, u64(f.features))
	d := f.newDriver(0, 16)
	d.start(0)
	d.ok(opIn, 0, nil, 512)
}

// Buffers and tables may lie in two regions, and a request may be divided in any way.
func TestLayouts(t *testing.T) {
	dev := filled(testSize)
	f, d := disk(t, nbd.Export{Device: dev})
	m := f.mem
	s := d.slots[0]
	m.next = lowLen + 8192 // what follows the edge of the regions is in use
	header := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(opIn)), 16)
	for name, c := range map[string]struct {
		table, data int
		parts       []part
	}{
		"header in parts":  {s.table, s.data, []part{{s.header, 5, 0}, {s.header + 5, 11, 0}, {s.data, 4096, descWrite}, {s.status, 1, descWrite}}},
		"status with data": {s.table, s.data, []part{{s.header, 16, 0}, {s.data, 4097, descWrite}}},
		"data in parts": {s.table, s.data, []part{
			{s.header, 16, 0}, {s.data, 1, descWrite}, {s.data + 1, 4000, descWrite}, {s.data + 4001, 95, descWrite}, {s.status, 1, descWrite}}},
		"data in two regions":  {s.table, lowLen - 2048, []part{{s.header, 16, 0}, {lowLen - 2048, 4096, descWrite}, {s.status, 1, descWrite}}},
		"table in two regions": {lowLen - 24, s.data, []part{{s.header, 16, 0}, {s.data, 4096, descWrite}, {s.status, 1, descWrite}}},
		"empty buffers":        {s.table, s.data, []part{{s.header, 16, 0}, {s.data, 0, 0}, {s.data, 4096, descWrite}, {s.data, 0, descWrite}, {s.status, 1, descWrite}, {0, 0, descWrite}}},
	} {
		t.Run(name, func(t *testing.T) {
			d.f.t = t
			m.put(c.data, make([]byte, 4097))
			m.put(s.header, header)
			m.put(s.status, []byte{0xee})
			m.put(c.table, table(c.parts))
			m.setDesc(d.desc+int(s.head)*descLen, guest(c.table), uint32(len(c.parts)*descLen), descIndirect, 0)
			d.give(0)
			if got := m.get(c.data, 4096); !bytes.Equal(got, content(dev, 16*512, 4096)) {
				t.Error("wrong bytes")
			}
			status := c.parts[len(c.parts)-1]
			if name == "empty buffers" {
				status = c.parts[len(c.parts)-2]
			}
			if code := m.get(status.off+status.n-1, 1)[0]; code != statusOK {
				t.Errorf("status %d", code)
			}
		})
	}
	d.f.t = t
}

// A new memory table takes effect while queues run and requests are in flight.
func TestMemoryChanges(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 4096))
	release := make(chan struct{})
	dev.OnFault = func(context.Context, blockmap.Extent) error { <-release; return nil }
	f, d := disk(t, nbd.Export{Device: dev})
	old := d.next
	miss := d.add(opIn, 1<<20>>sectorShift, nil, 4096)
	d.notify(old)
	for range 20 {
		f.set(setMemTable, f.mem.table(), f.mem.fd, f.mem.fd)
		if p := d.ok(opIn, 3, nil, 4096); !bytes.Equal(p, content(dev, 3*512, 4096)) {
			t.Fatal("wrong bytes")
		}
	}
	close(release)
	if code, p := d.wait(miss); code != statusOK || !bytes.Equal(p, content(dev, 1<<20, 4096)) {
		t.Errorf("the miss: status %d, or wrong bytes", code)
	}
}

// Shutdown completes what is in flight; a front end that connects to the next server goes on.
func TestShutdown(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 4096))
	asked, release := make(chan struct{}), make(chan struct{})
	dev.OnFault = func(context.Context, blockmap.Extent) error { close(asked); <-release; return nil }
	s := new(Server)
	f, d := diskOf(t, s, nbd.Export{Device: dev})
	old := d.next
	miss := d.add(opIn, 1<<20>>sectorShift, nil, 4096)
	d.notify(old)
	<-asked
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	eventually(t, "the shutdown begins", s.conns().Closed)
	close(release)
	if code, p := d.wait(miss); code != statusOK || !bytes.Equal(p, content(dev, 1<<20, 4096)) {
		t.Errorf("status %d, or wrong bytes", code)
	}
	if err := <-down; err != nil || !f.hungUp() {
		t.Errorf("shutdown: %v", err)
	}
	if st := s.Stats(); st.Conns != 0 || st.Misses != 1 {
		t.Errorf("%+v", st)
	}
	dev.NoPins(t)
}

// Close cancels what waits, and reports a device that does not return.
func TestClose(t *testing.T) {
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 4096))
	asked := make(chan struct{})
	dev.OnFault = func(ctx context.Context, _ blockmap.Extent) error {
		close(asked)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	s := new(Server)
	f, d := diskOf(t, s, nbd.Export{Device: dev})
	old := d.next
	d.add(opIn, 1<<20>>sectorShift, nil, 4096)
	d.notify(old)
	<-asked
	must(t, s.Close())
	if !f.hungUp() {
		t.Error("the connection is open")
	}
	if d.collect(); len(d.byHead) != 1 {
		t.Error("the request was completed")
	}
}

// A writable export has one virtual machine at a time; a read-only one any number.
func TestExclusive(t *testing.T) {
	dev := filled(testSize)
	// The first one is not a connection: it would have to send something within the timeout.
	s := &Server{OpenTimeout: 100 * time.Millisecond}
	path := serve(t, s, nbd.Export{Name: "disk", Device: dev})
	s.conns()
	must(t, s.lock(t.Context(), "disk"))
	if !connect(t, path).refused() {
		t.Error("a second virtual machine is served")
	}

	s = &Server{OpenTimeout: limit}
	path = serve(t, s, nbd.Export{Name: "disk", Device: dev})
	first := connect(t, path)
	first.negotiate(0)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.lock(ended, "disk"); !errors.Is(err, context.Canceled) {
		t.Errorf("a virtual machine is connected, and there may be another one: %v", err)
	}
	second := connect(t, path) // waits
	first.nc.Close()
	second.negotiate(0)

	path = serve(t, new(Server), nbd.Export{Device: dev, ReadOnly: true})
	for range 3 {
		connect(t, path).negotiate(0)
	}
}

// opener is Exports that tells when an export is released.
type opener struct {
	nbd.Static
	export   atomic.Pointer[nbd.Export]
	released chan struct{}
}

func (o *opener) Open(context.Context, string, nbd.ClientInfo) (*nbd.Export, func(), error) {
	e := o.export.Load()
	if e == nil {
		return nil, nil, nbd.ErrUnknownExport
	}
	return e, func() { o.released <- struct{}{} }, nil
}

// An export is opened by each connection, and released at its end. One that fails to open ends the
// connection only.
func TestExports(t *testing.T) {
	dev := filled(testSize)
	o := &opener{released: make(chan struct{}, 1)}
	o.export.Store(&nbd.Export{Name: "disk", Device: dev})
	s := &Server{Exports: o}
	path := serve(t, s, nbd.Export{Name: "disk"})
	f := connect(t, path)
	f.negotiate(0)
	select {
	case <-o.released:
		t.Error("the export was released early")
	default:
	}
	f.nc.Close()
	<-o.released
	o.export.Store(nil)
	if !connect(t, path).refused() {
		t.Error("an unknown export is served")
	}
	o.export.Store(&nbd.Export{Name: "disk", Device: dev, Clients: []string{"somebody"}})
	if !connect(t, path).refused() {
		t.Error("an export for certificates is served")
	}
	<-o.released
	if !connect(t, serve(t, &Server{OpenTimeout: 50 * time.Millisecond}, nbd.Export{Device: dev, ReadOnly: true})).hungUp() {
		t.Error("a front end that sends nothing keeps its connection")
	}
}

// Each listener has a bound of its own: who fills one takes nothing from another.
func TestMaxConns(t *testing.T) {
	one := nbd.Export{Name: "one", Device: filled(testSize), ReadOnly: true}
	two := nbd.Export{Name: "two", Device: filled(testSize), ReadOnly: true}
	s := &Server{MaxConns: 1, Exports: nbd.Static{one, two}}
	path := serve(t, s, one)
	f := connect(t, path)
	f.negotiate(0)
	if !connect(t, path).refused() {
		t.Error("a second connection is served")
	}
	other := connect(t, serve(t, s, two))
	other.negotiate(0)
	if st := s.Stats(); st.Conns != 2 || st.Accepted != 2 {
		t.Errorf("%+v", st)
	}
	f.nc.Close()
	eventually(t, "a connection is served after the first one has ended", func() bool { return !connect(t, path).refused() })
}

func TestCheck(t *testing.T) {
	for _, s := range []*Server{
		{MaxConns: -1}, {MaxQueues: -1}, {MaxQueues: 257}, {MaxWaiters: -1}, {MaxMemory: -1}, {MaxInFlightBytes: 1}, {FaultTimeout: -1}, {OpenTimeout: -1},
	} {
		if s.Check() == nil {
			t.Errorf("%+v is taken", s)
		}
	}
	must(t, new(Server).Check())
}

// What guests have in flight is bounded, for each and for all.
func TestAdmission(t *testing.T) {
	a, err := nbd.NewAdmission(nbd.Limits{Requests: 3})
	must(t, err)
	dev := filled(testSize)
	dev.Evict(blockmap.Range(1<<20, 1<<20))
	gate := make(chan struct{})
	waiting := make(chan struct{}, 64)
	dev.OnFault = func(context.Context, blockmap.Extent) error { waiting <- struct{}{}; <-gate; return nil }
	_, d := diskOf(t, &Server{Admission: a, MaxWaiters: 2}, nbd.Export{Device: dev})
	old := d.next
	var slots []int
	for i := range 8 {
		slots = append(slots, d.add(opIn, uint64(1<<20>>sectorShift+8*i), nil, 4096))
	}
	d.notify(old)
	<-waiting
	<-waiting
	select {
	case <-waiting:
		t.Error("three requests wait for the device, of at most two")
	case <-time.After(50 * time.Millisecond):
	}
	if n := a.InFlight().Requests; n != 2 {
		t.Errorf("%d requests in flight", n)
	}
	close(gate)
	for _, i := range slots {
		if code, _ := d.wait(i); code != statusOK {
			t.Errorf("status %d", code)
		}
	}
	eventually(t, "nothing is in flight", func() bool { return a.InFlight() == nbd.Limits{} })
}

func TestMain(m *testing.M) {
	if path := os.Getenv(backendEnv); path != "" {
		backendMain(path)
		return
	}
	lifecycle.CloseTime = limit // a test whose server leaves a connection behind fails
	os.Exit(m.Run())
}
