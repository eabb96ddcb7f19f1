package vhost

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The front end keeps a file that says which requests are in flight ("Inflight I/O
// tracking"). When it connects again, to this process or to the one that follows a
// crash, those requests are done again: each head is completed once, although a write
// may reach the device twice. The file has a region for each queue, each a multiple of
// 64 bytes:
//
//	0   u64  features: 0
//	8   u16  version: 1, or 0 where nothing was written yet
//	10  u16  number of entries, which is the size of the queue
//	12  u16  head of the list of the last batch that was completed
//	14  u16  idx of the used ring, after that batch
//	16       for each descriptor:
//	         0   u8   1 while the chain with this head is in flight
//	         6   u16  next in the list of the last batch
//	         8   u64  counter, in the order in which chains were taken
//
// The order of the stores makes it hold at each moment. A batch is listed before the
// used ring has it, and its entries are reset afterwards. Where the idx of the used ring
// is not the one in the region, the process has ended in between, and the entries of the
// list are reset then.
const (
	inflightHeaderLen = 16
	inflightEntryLen  = 16
	inflightAlign     = 64
	inflightVersion   = 1

	// inflightLen is the payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD: u64 size,
	// u64 offset, u16 queues, u16 size of a queue. Front ends pad it to 24 bytes.
	inflightLen    = 20
	inflightPadded = 24
)

// inflightArea is the payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD.
type inflightArea struct {
	size, off uint64
	queues    uint16
	queueSize uint16
}

func (m *message) inflight() (a inflightArea, err error) {
	if len(m.payload) != inflightPadded {
		if err := m.size(inflightLen); err != nil {
			return a, err
		}
	}
	p := m.payload
	a = inflightArea{
		size:      binary.LittleEndian.Uint64(p),
		off:       binary.LittleEndian.Uint64(p[8:]),
		queues:    binary.LittleEndian.Uint16(p[16:]),
		queueSize: binary.LittleEndian.Uint16(p[18:]),
	}
	if a.queues == 0 || a.queueSize == 0 || a.queueSize > maxQueueSize {
		return a, fmt.Errorf("it is for %d queues of %d descriptors", a.queues, a.queueSize)
	}
	return a, nil
}

// payload is a as the payload of a reply.
func (a inflightArea) payload() []byte {
	p := binary.LittleEndian.AppendUint64(nil, a.size)
	p = binary.LittleEndian.AppendUint64(p, a.off)
	p = binary.LittleEndian.AppendUint16(p, a.queues)
	return binary.LittleEndian.AppendUint16(p, a.queueSize)
}

// region is the size of the region of one queue.
func (a inflightArea) region() uint64 {
	n := inflightHeaderLen + inflightEntryLen*uint64(a.queueSize)
	return (n + inflightAlign - 1) / inflightAlign * inflightAlign
}

// makeInflight makes a file for a, all zeros, that cannot be truncated.
func makeInflight(a inflightArea) (fd int, size uint64, err error) {
	size = uint64(a.queues) * a.region()
	fd, err = unix.MemfdCreate("vhost-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, 0, fmt.Errorf("memfd_create: %w", err)
	}
	if err = unix.Ftruncate(fd, int64(size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("a file of %d bytes: %w", size, err)
	}
	return fd, size, nil
}

// inflightFile is such a file, mapped. Its regions are accessed like the guest's memory.
type inflightFile struct {
	area   inflightArea
	mapped []byte
}

// mapInflight maps the file fd, as SET_INFLIGHT_FD describes it.
func mapInflight(fd int, a inflightArea, queues int) (*inflightFile, error) {
	need := uint64(a.queues) * a.region()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("fstat: %w", err)
	}
	switch {
	case int(a.queues) > queues:
		return nil, fmt.Errorf("it is for %d queues, of at most %d", a.queues, queues)
	case a.size < need:
		return nil, fmt.Errorf("it has %d bytes, and %d queues of %d descriptors take %d", a.size, a.queues, a.queueSize, need)
	case a.off%uint64(unix.Getpagesize()) != 0:
		return nil, fmt.Errorf("its offset is %d, which is not a multiple of a page", a.off)
	case st.Size < 0 || a.off > uint64(st.Size) || need > uint64(st.Size)-a.off:
		return nil, fmt.Errorf("its file has %d bytes, and it takes %d at %d", st.Size, need, a.off)
	}
	b, err := unix.Mmap(fd, int64(a.off), int(need), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	return &inflightFile{area: a, mapped: b}, nil
}

func (f *inflightFile) unmap() { _ = unix.Munmap(f.mapped) }

// queue returns the region of queue i, whose ring has num descriptors.
func (f *inflightFile) queue(i int, num uint32) (*inflight, error) {
	if i >= int(f.area.queues) || num > uint32(f.area.queueSize) {
		return nil, fmt.Errorf("queue %d has %d descriptors, and the file of what is in flight is for %d queues of %d", i, num, f.area.queues, f.area.queueSize)
	}
	n := f.area.region()
	return &inflight{b: f.mapped[uint64(i)*n:][:n:n], num: num}, nil
}

// inflight is the region of one queue.
type inflight struct {
	b       []byte
	num     uint32
	counter uint64
}

// entry is the entry of a head, which is less than num.
func (f *inflight) entry(head uint16) []byte {
	return f.b[inflightHeaderLen+inflightEntryLen*int(head):][:inflightEntryLen]
}

// restore returns the heads that are in flight, in the order in which they were taken.
// used is the idx of the used ring.
func (f *inflight) restore(used uint16) ([]uint16, error) {
	b := f.b
	if binary.LittleEndian.Uint16(b[8:]) == 0 {
		clear(b)
		binary.LittleEndian.PutUint16(b[10:], uint16(f.num))
		binary.LittleEndian.PutUint16(b[14:], used)
		binary.LittleEndian.PutUint16(b[8:], inflightVersion)
		return nil, nil
	}
	if v := binary.LittleEndian.Uint16(b[8:]); v != inflightVersion {
		return nil, fmt.Errorf("the file of what is in flight has version %d, want %d", v, inflightVersion)
	}
	batch := used - binary.LittleEndian.Uint16(b[14:])
	if uint32(batch) > f.num {
		return nil, fmt.Errorf("the used ring is %d ahead of the file of what is in flight, of at most %d", batch, f.num)
	}
	for at := binary.LittleEndian.Uint16(b[12:]); batch > 0; batch-- {
		if uint32(at) >= f.num {
			return nil, fmt.Errorf("the file of what is in flight lists head %d, of %d", at, f.num)
		}
		e := f.entry(at)
		e[0] = 0
		at = binary.LittleEndian.Uint16(e[6:])
	}
	f.setUsed(used)
	type taken struct {
		head    uint16
		counter uint64
	}
	var all []taken
	for i := range uint16(f.num) {
		if e := f.entry(i); e[0] != 0 {
			all = append(all, taken{i, binary.LittleEndian.Uint64(e[8:])})
		}
	}
	slices.SortFunc(all, func(a, b taken) int { return cmp.Compare(a.counter, b.counter) })
	heads := make([]uint16, len(all))
	for i, t := range all {
		heads[i], f.counter = t.head, max(f.counter, t.counter+1)
	}
	return heads, nil
}

// take notes that head is in flight.
func (f *inflight) take(head uint16) {
	e := f.entry(head)
	binary.LittleEndian.PutUint64(e[8:], f.counter)
	f.counter++
	f.setFlag(e, 1)
}

// untake takes back what take has noted.
func (f *inflight) untake(head uint16) { f.setFlag(f.entry(head), 0) }

// list adds head to the list of the batch that is about to be published.
func (f *inflight) list(head uint16) {
	binary.LittleEndian.PutUint16(f.entry(head)[6:], binary.LittleEndian.Uint16(f.b[12:]))
	binary.LittleEndian.PutUint16(f.b[12:], head)
}

// setFlag stores the first byte of an entry, after all stores before it. The other bytes of
// its word are padding.
func (f *inflight) setFlag(e []byte, v uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&e[0])), v)
}

// setUsed notes the idx of the used ring, after all stores before it. It shares a word
// with the head of the list.
func (f *inflight) setUsed(used uint16) {
	w := (*uint32)(unsafe.Pointer(&f.b[12]))
	atomic.StoreUint32(w, *w&0xffff|uint32(used)<<16)
}
