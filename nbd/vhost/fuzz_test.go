package vhost

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
)

// The image of a guest's memory that FuzzRing fills: a ring of 8 descriptors, and the rest.
const (
	fuzzNum   = 8
	fuzzDesc  = 0
	fuzzAvail = fuzzDesc + fuzzNum*descLen
	fuzzUsed  = (fuzzAvail + 6 + 2*fuzzNum + 3) &^ 3
	fuzzData  = (fuzzUsed + 6 + 8*fuzzNum + 63) &^ 63
	fuzzLen   = 4096
	fuzzBase  = 0x10000
)

// image is what FuzzRing starts from: a chain of the parts, with data from fuzzData on.
func image(op operation, sector uint64, rest []byte, indirect bool, parts ...part) []byte {
	p := make([]byte, fuzzLen)
	binary.LittleEndian.PutUint32(p[fuzzData:], uint32(op))
	binary.LittleEndian.PutUint64(p[fuzzData+8:], sector)
	copy(p[fuzzData+headerSize:], rest)
	at := fuzzDesc
	if indirect {
		at = fuzzLen - 16*descLen
		binary.LittleEndian.PutUint64(p, fuzzBase+uint64(at))
		binary.LittleEndian.PutUint32(p[8:], uint32(len(parts)*descLen))
		binary.LittleEndian.PutUint16(p[12:], descIndirect)
	}
	for i, part := range parts {
		d := p[at+i*descLen:]
		binary.LittleEndian.PutUint64(d, fuzzBase+uint64(part.off))
		binary.LittleEndian.PutUint32(d[8:], uint32(part.n))
		flags := part.flags
		if i < len(parts)-1 {
			flags |= descNext
		}
		binary.LittleEndian.PutUint16(d[12:], flags)
		binary.LittleEndian.PutUint16(d[14:], uint16(i+1))
	}
	binary.LittleEndian.PutUint16(p[fuzzAvail+2:], 1)
	return p
}

// A guest's memory of any content ends neither the process nor the server, and the server touches
// nothing beyond it: the mapping ends there.
func FuzzRing(f *testing.F) {
	header := part{fuzzData, headerSize, 0}
	status := part{fuzzData + 1024, 1, descWrite}
	f.Add(image(opIn, 1, nil, false, header, part{fuzzData + 64, 512, descWrite}, status), true, false)
	f.Add(image(opIn, 1, nil, true, header, part{fuzzData + 64, 512, descWrite}, status), false, true)
	f.Add(image(opOut, 1, nil, false, header, part{fuzzData + 64, 512, 0}, status), true, true)
	f.Add(image(opFlush, 0, nil, false, header, status), true, false)
	f.Add(image(opGetID, 0, nil, false, header, part{fuzzData + 64, 20, descWrite}, status), true, false)
	f.Add(image(opDiscard, 0, ranges(0, 8, 0), true, header, part{fuzzData + headerSize, 16, 0}, status), true, false)
	f.Add(image(opWriteZeroes, 0, ranges(0, 8, 1), false, header, part{fuzzData + headerSize, 16, 0}, status), true, true)
	f.Add(image(opIn, 1, nil, false, part{fuzzData, 5, 0}, part{fuzzData + 5, 11, 0}, part{fuzzData + 64, 513, descWrite}), true, false)
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, fuzzLen); err != nil {
		f.Fatal(err)
	}
	table := binary.LittleEndian.AppendUint64(nil, 1)
	for _, n := range []uint64{fuzzBase, fuzzLen, userBase, 0} {
		table = binary.LittleEndian.AppendUint64(table, n)
	}
	const size = 64 << 10
	dev := filled(size)
	dev.Evict(blockmap.Range(8192, 4096))
	call := eventfd(f)
	f.Fuzz(func(t *testing.T, img []byte, eventIdx, tracked bool) {
		s := new(Server)
		s.conns()
		c := newConn(s, nil, &endpoint{srv: s, export: "disk"})
		c.ctx, c.cancel = t.Context(), func(error) {}
		c.use(&nbd.Export{Name: "disk", Device: dev})
		mem, err := parseMemTable(&message{payload: table, fds: []int{fd}}, 1<<30)
		must(t, err)
		defer mem.release()
		copy(mem.regions[0].bytes, make([]byte, fuzzLen))
		copy(mem.regions[0].bytes, img)
		q := newQueue(c, 0)
		q.mem, q.mu.call = mem, call
		q.ring, err = newRing(mem, fuzzNum, vringAddr{userBase + fuzzDesc, userBase + fuzzUsed, userBase + fuzzAvail}, eventIdx)
		must(t, err)
		if tracked {
			a := inflightArea{queues: 1, queueSize: fuzzNum}
			file := &inflightFile{area: a, mapped: make([]byte, a.region())}
			q.inflight, _ = file.queue(0, fuzzNum)
			_, err := q.inflight.restore(0)
			must(t, err)
		}
		q.ctx, q.taking = t.Context(), t.Context()
		q.cur = &request{q: q, mem: mem}
		if _, err := q.pass(); err != nil && !errors.Is(err, errBroken) {
			t.Fatal(err)
		}
		q.tasks.Wait()
		if n := q.mu.used; n > fuzzNum || n > q.at {
			t.Fatalf("%d requests were completed, of %d", n, q.at)
		}
		if st := c.client.InFlight(); st != (nbd.Limits{}) {
			t.Fatalf("%+v are in flight", st)
		}
		dev.NoPins(t)
	})
}

// A file of what is in flight of any content is read, or refused.
func FuzzRestore(f *testing.F) {
	f.Add(testRegion(65535, 3, map[uint16]uint64{1: 1, 3: 2, 4: 3}, map[uint16]uint16{3: 1}).b, uint16(1))
	f.Add(testRegion(7, 0, map[uint16]uint64{1: 9, 5: 3}, nil).b, uint16(7))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, used uint16) {
		r := &inflight{b: make([]byte, inflightHeaderLen+8*inflightEntryLen), num: 8}
		copy(r.b, b)
		heads, err := r.restore(used)
		if err != nil {
			return
		}
		seen := make(map[uint16]bool)
		for _, h := range heads {
			if h >= 8 || seen[h] {
				t.Fatalf("heads %v", heads)
			}
			seen[h] = true
		}
		if again, err := (&inflight{b: r.b, num: 8}).restore(used); err != nil || len(again) != len(heads) {
			t.Fatalf("heads %v, and then %v, %v", heads, again, err)
		}
	})
}

// Messages of any content, with descriptors of any kind, end a connection at most. Each is
//
//	0  u8   request
//	1  u8   flags
//	2  u8   length of the payload
//	3  u8   descriptors: low half how many, high half of which kind
//	4       payload
func FuzzMessages(f *testing.F) {
	message := func(id requestID, kind byte, fds int, payload []byte) []byte {
		return append([]byte{byte(id), flagNeedReply, byte(len(payload)), byte(fds) | kind<<4}, payload...)
	}
	var start []byte
	add := func(id requestID, kind byte, fds int, payload []byte) {
		start = append(start, message(id, kind, fds, payload)...)
	}
	table := binary.LittleEndian.AppendUint64(nil, 1)
	for _, n := range []uint64{0, 1 << 20, 0, 0} {
		table = binary.LittleEndian.AppendUint64(table, n)
	}
	add(getFeatures, 0, 0, nil)
	add(setProtocolFeatures, 0, 0, u64(protocolOffered))
	add(setFeatures, 0, 0, u64(featureProtocol|featureEventIdx|featureVersion1))
	add(setMemTable, 0, 1, table)
	add(getInflightFD, 0, 0, append(inflightArea{queues: 1, queueSize: 8}.payload(), 0, 0, 0, 0))
	add(setInflightFD, 0, 1, append(inflightArea{size: 4096, queues: 1, queueSize: 8}.payload(), 0, 0, 0, 0))
	add(setVringNum, 0, 0, state(0, 8))
	add(setVringBase, 0, 0, state(0, 0))
	addr := state(0, 0)
	for _, n := range []uint64{0, 4096, 8192, 0} {
		addr = binary.LittleEndian.AppendUint64(addr, n)
	}
	add(setVringAddr, 0, 0, addr)
	add(setVringCall, 1, 1, u64(0))
	add(setVringErr, 1, 1, u64(0))
	add(setVringKick, 1, 1, u64(0))
	add(setVringEnable, 0, 0, state(0, 1))
	add(getConfig, 0, 0, append(append(state(0, 60), 0, 0, 0, 0), make([]byte, 60)...))
	f.Add(start)
	f.Add(append(append([]byte(nil), start...), message(getVringBase, 0, 0, state(0, 0))...))
	f.Add(append(append([]byte(nil), start...), message(setMemTable, 0, 1, table)...))
	f.Add(append(append([]byte(nil), start...), message(resetDevice, 0, 0, nil)...))
	f.Add(append(append([]byte(nil), start...), message(setVringEnable, 0, 0, state(0, 0))...))
	f.Add(message(setConfig, 0, 0, make([]byte, 13)))
	f.Add([]byte{77, 0, 0, 0})
	memory, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	defer unix.Close(memory)
	if err := unix.Ftruncate(memory, 1<<20); err != nil {
		f.Fatal(err)
	}
	kinds := []int{memory, eventfd(f)}
	dev := filled(64 << 10)
	path := serve(f, &Server{Log: slog.New(slog.DiscardHandler)}, nbd.Export{Device: dev, ReadOnly: true})
	f.Fuzz(func(t *testing.T, p []byte) {
		fe := connect(t, path)
		go func() { // takes the replies
			var b [4096]byte
			for {
				if _, err := fe.nc.Read(b[:]); err != nil {
					return
				}
			}
		}()
		fe.nc.SetWriteDeadline(time.Now().Add(limit))
		for range 64 {
			if len(p) < 4 {
				break
			}
			n := min(int(p[2]), len(p)-4)
			var fds []int
			for range p[3] & 15 {
				fds = append(fds, kinds[int(p[3]>>4)%len(kinds)])
			}
			if fe.send(requestID(p[0]), uint32(p[1])&^flagVersion, p[4:4+n], fds...) != nil {
				break
			}
			p = p[4+n:]
		}
		fe.nc.Close()
	})
}
