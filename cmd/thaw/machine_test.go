package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// machine is a virtual machine as thaw sees it: a front end of vhost-user, and the guest's
// driver of one disk with one queue. Like a virtual machine it outlives its connection. It
// shares no code with package nbd/vhost.
type machine struct {
	t        testing.TB
	nc       *net.UnixConn
	memfd    int
	mem      []byte
	kick     int
	call     int
	inflight int    // the file of what is in flight, -1 before there is one
	area     []byte // which describes it
	features uint64
	next     uint16 // of the available ring
	seen     uint16 // of the used ring
	done     map[uint16]bool
}

// Messages of vhost-user, features and requests of a virtio disk.
const (
	getFeatures, setFeatures, setOwner, setMemTable                  = 1, 2, 3, 5
	setVringNum, setVringAddr, setVringBase                          = 8, 9, 10
	setVringKick, setVringCall, getProtocol, setProtocol             = 12, 13, 15, 16
	setVringEnable, getConfig, getInflight, setInflight              = 18, 24, 31, 32
	featureRO, featureFlush, featureProtocol, featureVersion1        = 1 << 5, 1 << 9, 1 << 30, 1 << 32
	protocolReplyAck, protocolConfig, protocolInflight               = 1 << 3, 1 << 9, 1 << 12
	diskRead, diskWrite, diskFlush                            uint32 = 0, 1, 4

	machineMemory = 4 << 20
	queueSize     = 64
	slots         = 16 // requests, of four descriptors each
	slotData      = 64 << 10
	guestAddress  = 1 << 30
	userAddress   = 0x7f0000000000

	// Where things are in the memory.
	descTable, availRing, usedRing, slotArea = 0, 4 << 10, 8 << 10, 64 << 10
	slotSize                                 = slotData + 512
)

func newMachine(t testing.TB) *machine {
	t.Helper()
	fd, err := unix.MemfdCreate("machine", unix.MFD_CLOEXEC)
	check(t, err)
	check(t, unix.Ftruncate(fd, machineMemory))
	mem, err := unix.Mmap(fd, 0, machineMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(t, err)
	m := &machine{t: t, memfd: fd, mem: mem, inflight: -1, done: make(map[uint16]bool)}
	for _, p := range []*int{&m.kick, &m.call} {
		*p, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		check(t, err)
	}
	t.Cleanup(func() {
		m.disconnect()
		unix.Munmap(mem)
		for _, fd := range []int{fd, m.kick, m.call, m.inflight} {
			unix.Close(fd)
		}
	})
	return m
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *machine) disconnect() {
	if m.nc != nil {
		m.nc.Close()
	}
}

// send sends a message.
func (m *machine) send(id, flags uint32, payload []byte, fds ...int) error {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint32(b, 1|flags)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := m.nc.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

// reply receives the reply to a message.
func (m *machine) reply(id uint32) (payload []byte, fd int, err error) {
	m.nc.SetReadDeadline(time.Now().Add(atMost))
	var head [12]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := m.nc.ReadMsgUnix(head[:], oob)
	if err == nil && n < len(head) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, -1, fmt.Errorf("reply to message %d: %w", id, err)
	}
	if got := binary.LittleEndian.Uint32(head[:]); got != id {
		return nil, -1, fmt.Errorf("the reply to message %d is one to %d", id, got)
	}
	fd = -1
	if cs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(cs) == 1 {
		if fds, err := unix.ParseUnixRights(&cs[0]); err == nil && len(fds) == 1 {
			fd = fds[0]
		}
	}
	payload = make([]byte, binary.LittleEndian.Uint32(head[8:]))
	_, err = io.ReadFull(m.nc, payload)
	return payload, fd, err
}

func (m *machine) ask(id uint32, payload []byte) ([]byte, error) {
	if err := m.send(id, 0, payload); err != nil {
		return nil, err
	}
	p, _, err := m.reply(id)
	return p, err
}

// set sends a message, and waits until it is done.
func (m *machine) set(id uint32, payload []byte, fds ...int) error {
	if err := m.send(id, 8, payload, fds...); err != nil {
		return err
	}
	p, _, err := m.reply(id)
	if err == nil && (len(p) != 8 || binary.LittleEndian.Uint64(p) != 0) {
		err = fmt.Errorf("message %d is refused: %x", id, p)
	}
	return err
}

func words64(n ...uint64) (p []byte) {
	for _, n := range n {
		p = binary.LittleEndian.AppendUint64(p, n)
	}
	return p
}

// connect connects to a socket, and starts the queue where an earlier connection has left it.
func (m *machine) connect(path string) error {
	m.disconnect()
	nc, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	if err != nil {
		return err
	}
	m.nc = nc
	offered, err := m.ask(getFeatures, nil)
	if err != nil {
		return err
	}
	m.features = binary.LittleEndian.Uint64(offered) & (featureRO | featureFlush | featureProtocol | featureVersion1)
	if _, err := m.ask(getProtocol, nil); err != nil {
		return err
	}
	if err := m.send(setProtocol, 0, words64(protocolReplyAck|protocolConfig|protocolInflight)); err != nil {
		return err
	}
	if m.inflight < 0 {
		if err := m.send(getInflight, 0, append(words64(0, 0), 1, 0, queueSize, 0, 0, 0, 0, 0)); err != nil {
			return err
		}
		if m.area, m.inflight, err = m.reply(getInflight); err != nil {
			return err
		}
	}
	table := append(words64(1), words64(guestAddress, machineMemory, userAddress, 0)...)
	ring := words64(0, userAddress+descTable, userAddress+usedRing, userAddress+availRing, 0)
	for _, step := range []struct {
		id      uint32
		payload []byte
		fds     []int
	}{
		{setOwner, nil, nil},
		{setFeatures, words64(m.features), nil},
		{setMemTable, table, []int{m.memfd}},
		{setInflight, m.area, []int{m.inflight}},
		{setVringCall, words64(0), []int{m.call}},
		{setVringNum, words64(queueSize << 32), nil},
		{setVringBase, words64(uint64(m.seen) << 32), nil},
		{setVringAddr, ring, nil},
		{setVringKick, words64(0), []int{m.kick}},
		{setVringEnable, words64(1 << 32), nil},
	} {
		if err := m.set(step.id, step.payload, step.fds...); err != nil {
			return err
		}
	}
	return nil
}

// mustConnect is connect, again and again while the server is not there.
func (m *machine) mustConnect(path string) {
	m.t.Helper()
	for end := time.Now().Add(atMost); ; time.Sleep(20 * time.Millisecond) {
		err := m.connect(path)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("connect to %s: %v", path, err)
		}
	}
}

// size is the size of the disk, by the configuration space.
func (m *machine) size() int64 {
	m.t.Helper()
	p := binary.LittleEndian.AppendUint32(nil, 0)
	p = binary.LittleEndian.AppendUint32(p, 60)
	c, err := m.ask(getConfig, append(p, make([]byte, 4+60)...))
	check(m.t, err)
	return int64(binary.LittleEndian.Uint64(c[12:])) * sectorSize
}

// begin gives the disk a request in a slot that is free: to write out, or to read n bytes.
func (m *machine) begin(slot int, op uint32, off int64, out []byte, n int) {
	at := slotArea + slot*slotSize
	head := m.mem[at+slotData:]
	binary.LittleEndian.PutUint64(head, uint64(op))
	binary.LittleEndian.PutUint64(head[8:], uint64(off/sectorSize))
	head[16] = 0xee // the status
	first := uint16(4 * slot)
	desc := func(i uint16, at, n int, flags uint16) {
		d := m.mem[descTable+16*int(first+i):]
		binary.LittleEndian.PutUint64(d, guestAddress+uint64(at))
		binary.LittleEndian.PutUint32(d[8:], uint32(n))
		binary.LittleEndian.PutUint16(d[12:], flags)
		binary.LittleEndian.PutUint16(d[14:], first+i+1)
	}
	const next, write = 1, 2
	desc(0, at+slotData, 16, next)
	i := uint16(1)
	if copy(m.mem[at:at+slotData], out); len(out) > 0 {
		desc(i, at, len(out), next)
		i++
	} else if n > 0 {
		desc(i, at, n, next|write)
		i++
	}
	desc(i, at+slotData+16, 1, write)
	delete(m.done, first)
	binary.LittleEndian.PutUint16(m.mem[availRing+4+2*(int(m.next)%queueSize):], first)
	m.next++
	// The idx, behind all stores before it.
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&m.mem[availRing])), uint32(m.next)<<16)
	unix.Write(m.kick, words64(1))
}

// end waits for the request of a slot, and returns its status and data.
func (m *machine) end(slot, n int) (status byte, data []byte) {
	m.t.Helper()
	first := uint16(4 * slot)
	for end := time.Now().Add(atMost); ; {
		idx := uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&m.mem[usedRing]))) >> 16)
		for ; m.seen != idx; m.seen++ {
			head := uint16(binary.LittleEndian.Uint32(m.mem[usedRing+4+8*(int(m.seen)%queueSize):]))
			if m.done[head] {
				m.t.Fatalf("request %d is completed twice", head/4)
			}
			m.done[head] = true
		}
		if m.done[first] {
			at := slotArea + slot*slotSize
			return m.mem[at+slotData+16], m.mem[at : at+n]
		}
		if time.Now().After(end) {
			m.t.Fatalf("request %d is not completed", slot)
		}
		p := []unix.PollFd{{Fd: int32(m.call), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 100); err != nil && !errors.Is(err, unix.EINTR) {
			m.t.Fatal(err)
		}
		var b [8]byte
		unix.Read(m.call, b[:])
	}
}

// ended reports whether the request of a slot is completed, and does not wait.
func (m *machine) ended(slot int) bool {
	at := slotArea + slot*slotSize
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&m.mem[at+slotData+16])))&0xff != 0xee
}

// read reads n bytes, which has to succeed.
func (m *machine) read(off int64, n int) []byte {
	m.t.Helper()
	m.begin(0, diskRead, off, nil, n)
	status, p := m.end(0, n)
	if status != 0 {
		m.t.Fatalf("read of %d bytes at %d: status %d", n, off, status)
	}
	return p
}

// write writes p, and flushes if that is possible. It returns the status.
func (m *machine) write(off int64, p []byte) byte {
	m.t.Helper()
	m.begin(0, diskWrite, off, p, 0)
	status, _ := m.end(0, 0)
	if status == 0 {
		m.begin(0, diskFlush, 0, nil, 0)
		status, _ = m.end(0, 0)
	}
	return status
}
