package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// ring is a split virtqueue (virtio 1.2, section 2.7), which lies in the guest's memory:
//
//	descriptor table, 16 bytes for each of num
//	  0   u64  guest address of a buffer, or of an indirect table
//	  8   u32  its length
//	  12  u16  flags: 1 another descriptor follows, 2 the device writes it, 4 indirect
//	  14  u16  index of the next descriptor
//
//	available ring, written by the driver
//	  0   u16  flags: 1 no interrupts
//	  2   u16  idx: heads that it has made available, modulo 65536
//	  4   u16  head of a chain, for each of num
//	      u16  used_event, with EVENT_IDX: interrupt at this idx of the used ring
//
//	used ring, written by the device
//	  0   u16  flags: 1 no kicks
//	  2   u16  idx
//	  4        for each of num: u32 head, u32 bytes written
//	      u16  avail_event, with EVENT_IDX: kick at this idx of the available ring
//
// The driver may change any of it at any time. So each value is read once, and checked
// before it is used.
type ring struct {
	num      uint32
	desc     []byte
	avail    []byte
	used     []byte
	eventIdx bool
}

const (
	descLen = 16

	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2

	availNoInterrupt = 1 << 0
	usedNoNotify     = 1 << 0

	// maxQueueSize is that of the specification (section 2.7).
	maxQueueSize = 32768
	// maxChain is how many descriptors a request may have. The device says that it
	// takes segMax with data.
	maxChain = 1024
)

// newRing finds a ring of num descriptors in mem.
func newRing(mem *memory, num uint32, a vringAddr, eventIdx bool) (*ring, error) {
	n := uint64(num)
	r := &ring{
		num:      num,
		desc:     mem.user(a.desc, n*descLen),
		avail:    mem.user(a.avail, 6+n*2),
		used:     mem.user(a.used, 6+n*8),
		eventIdx: eventIdx,
	}
	for _, part := range []struct {
		name  string
		b     []byte
		addr  uint64
		align uintptr // section 2.7, table of alignments
	}{{"descriptor table", r.desc, a.desc, 16}, {"available ring", r.avail, a.avail, 2}, {"used ring", r.used, a.used, 4}} {
		switch {
		case part.b == nil:
			return nil, fmt.Errorf("its %s, at user address %#x, is outside the guest's memory", part.name, part.addr)
		case uintptr(unsafe.Pointer(&part.b[0]))%part.align != 0:
			return nil, fmt.Errorf("its %s, at user address %#x, is not aligned to %d bytes", part.name, part.addr, part.align)
		}
	}
	return r, nil
}

// load16 loads the 16 bits at an even offset of b. There is no atomic load of 16 bits, so
// it loads the aligned word around them, which lies in the same page.
func load16(b []byte, at uint32) uint16 {
	p := unsafe.Pointer(&b[at])
	odd := uintptr(p) & 2
	w := atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(odd))))
	return uint16(w >> (8 * odd))
}

// availIdx is how many heads the driver has made available. What it wrote before is
// visible afterwards.
func (r *ring) availIdx() uint16 { return load16(r.avail, 2) }

// head is the head at the index i of the available ring.
func (r *ring) head(i uint16) uint16 {
	return binary.LittleEndian.Uint16(r.avail[4+2*(uint32(i)%r.num):])
}

func (r *ring) usedIdx() uint16 { return load16(r.used, 2) }

// put writes an element of the used ring. The driver sees it after setUsedIdx.
func (r *ring) put(i uint16, head uint16, written uint32) {
	e := r.used[4+8*(uint32(i)%r.num):]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], written)
}

// setUsedIdx publishes the elements before i. It is a full barrier. flags and idx share
// a word.
func (r *ring) setUsedIdx(i uint16, flags uint16) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&r.used[0])), uint32(flags)|uint32(i)<<16)
}

// setAvailEvent asks for a kick once the head at the index i is available. A full barrier
// has to follow.
func (r *ring) setAvailEvent(i uint16) {
	binary.LittleEndian.PutUint16(r.used[4+8*r.num:], i)
}

// interrupt reports whether the driver wants an interrupt, now that the used ring has
// gone from old to now (section 2.7.7).
func (r *ring) interrupt(old, now uint16) bool {
	if !r.eventIdx {
		return load16(r.avail, 0)&availNoInterrupt == 0
	}
	event := load16(r.avail, 4+2*r.num)
	return now-event-1 < now-old
}

// errBroken: what the driver has put in the ring makes no sense. The ring is not used
// any more until it is set up anew.
var errBroken = errors.New("the driver has broken the ring")

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errBroken}, args...)...)
}

// chain collects the buffers of the chain that begins at head: those that the device
// reads, and those that it writes. scratch is for an indirect table that lies in more
// than one region.
func (r *ring) chain(mem *memory, head uint16, reads, writes [][]byte, scratch *[]byte) (_, _ [][]byte, err error) {
	if uint32(head) >= r.num {
		return reads, writes, broken("a head is %d, of %d descriptors", head, r.num)
	}
	table, n, i := r.desc, r.num, uint32(head)
	indirect := false
	for hops := 0; ; hops++ {
		if hops >= maxChain {
			return reads, writes, broken("a chain has more than %d descriptors, or is a loop", maxChain)
		}
		var d [descLen]byte
		copy(d[:], table[i*descLen:])
		addr := binary.LittleEndian.Uint64(d[:])
		length := binary.LittleEndian.Uint32(d[8:])
		flags := binary.LittleEndian.Uint16(d[12:])
		next := uint32(binary.LittleEndian.Uint16(d[14:]))
		if flags&descIndirect != 0 {
			if indirect || flags&descNext != 0 || length == 0 || length%descLen != 0 || length > maxChain*descLen {
				return reads, writes, broken("an indirect table of %d bytes has flags %#x", length, flags)
			}
			if table = mem.piece(addr, uint64(length)); len(table) < int(length) {
				if cap(*scratch) < maxChain*descLen {
					*scratch = make([]byte, maxChain*descLen)
				}
				table = (*scratch)[:length]
				if err := mem.read(table, addr); err != nil {
					return reads, writes, broken("an indirect table of %d bytes at %#x: %w", length, addr, err)
				}
			}
			n, i, indirect = length/descLen, 0, true
			continue
		}
		write := flags&descWrite != 0
		if !write && len(writes) > 0 {
			return reads, writes, broken("a buffer to read follows one to write")
		}
		for left := uint64(length); left > 0; {
			b := mem.piece(addr, left)
			if len(b) == 0 {
				return reads, writes, broken("a buffer of %d bytes at %#x: %w", left, addr, errOutside)
			}
			if write {
				writes = append(writes, b)
			} else {
				reads = append(reads, b)
			}
			left -= uint64(len(b))
			addr += uint64(len(b))
		}
		if flags&descNext == 0 {
			return reads, writes, nil
		}
		if next >= n {
			return reads, writes, broken("a descriptor is followed by %d, of %d", next, n)
		}
		i = next
	}
}
