package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The payload of SET_MEM_TABLE ("Memory regions description"):
//
//	0   u32  number of regions
//	4   u32  padding
//	8        regions, each with a descriptor in the ancillary data:
//	         0   u64  guest address: what the guest's descriptors hold
//	         8   u64  size
//	         16  u64  user address: what the front end's messages hold
//	         24  u64  offset of the region in its file
const (
	memTableLen = 8
	regionLen   = 32

	// maxRegions is that of the protocol without CONFIGURE_MEM_SLOTS.
	maxRegions = 8
)

// memory is a guest's memory, as one SET_MEM_TABLE describes it. It stays mapped until
// the last request that uses it has ended, whatever table comes meanwhile.
//
// The mapped files belong to the front end, which may truncate them at any time. An
// access faults then, so each access is made within [access], or on a goroutine that
// recovers from faults as the one of a queue does.
type memory struct {
	regions []region
	refs    atomic.Int64
	counted *endpoint // that has counted its bytes, nil for none
}

type region struct {
	guest, user, size uint64
	bytes             []byte // of the region
	mapped            []byte // from the beginning of the file, in whole pages
}

// parseMemTable maps what m describes. It holds one reference. The bound limit is on
// the bytes to map.
func parseMemTable(m *message, limit int64) (*memory, error) {
	if len(m.payload) < memTableLen {
		return nil, fmt.Errorf("its payload has %d bytes, want at least %d", len(m.payload), memTableLen)
	}
	n := binary.LittleEndian.Uint32(m.payload)
	if n > maxRegions {
		return nil, fmt.Errorf("it has %d regions, of at most %d", n, maxRegions)
	}
	if err := m.size(memTableLen + int(n)*regionLen); err != nil {
		return nil, err
	}
	if len(m.fds) != int(n) {
		return nil, fmt.Errorf("it has %d regions and %d file descriptors", n, len(m.fds))
	}
	mem := new(memory)
	mem.refs.Store(1)
	for i := range int(n) {
		p := m.payload[memTableLen+i*regionLen:]
		r := region{
			guest: binary.LittleEndian.Uint64(p),
			size:  binary.LittleEndian.Uint64(p[8:]),
			user:  binary.LittleEndian.Uint64(p[16:]),
		}
		off := binary.LittleEndian.Uint64(p[24:])
		err := r.check(off, limit)
		if err == nil {
			err = mem.overlaps(&r)
		}
		if err == nil {
			err = r.mmap(m.fds[i], off)
		}
		if err != nil {
			mem.release()
			return nil, fmt.Errorf("region %d of %d bytes at guest address %#x: %w", i, r.size, r.guest, err)
		}
		limit -= int64(len(r.mapped))
		mem.regions = append(mem.regions, r)
	}
	return mem, nil
}

func (r *region) check(off uint64, limit int64) error {
	switch {
	case r.size == 0:
		return errors.New("it is empty")
	case r.guest+r.size < r.guest, r.user+r.size < r.user, off+r.size < off:
		return errors.New("its end is beyond the largest address")
	case off+r.size > uint64(max(limit, 0)):
		return fmt.Errorf("its end is at %d of its file, and only %d bytes more may be mapped: raise MaxMemory", off+r.size, limit)
	}
	return nil
}

// overlaps fails where r has addresses of another region.
func (m *memory) overlaps(r *region) error {
	for i := range m.regions {
		o := &m.regions[i]
		if r.guest < o.guest+o.size && o.guest < r.guest+r.size || r.user < o.user+o.size && o.user < r.user+r.size {
			return fmt.Errorf("it overlaps region %d", i)
		}
	}
	return nil
}

// mmap maps the file from its beginning. The offset of a region need not be a multiple
// of a page, and the page of a file of hugetlbfs may be a gigabyte.
func (r *region) mmap(fd int, off uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && uint64(st.Size) < off+r.size {
		return fmt.Errorf("its end is at %d of a file of %d bytes", off+r.size, st.Size)
	}
	page := uint64(unix.Getpagesize())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err == nil && fs.Type == unix.HUGETLBFS_MAGIC && fs.Bsize > 0 {
		page = uint64(fs.Bsize)
	}
	n := (off + r.size + page - 1) / page * page
	b, err := unix.Mmap(fd, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	// A core dump of this process is not to have the memory of its guests.
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	r.mapped = b
	r.bytes = b[off:][:r.size:r.size]
	return nil
}

// size is how many bytes are mapped.
func (m *memory) size() (n int64) {
	for i := range m.regions {
		n += int64(len(m.regions[i].mapped))
	}
	return n
}

// count counts m among the memory of all guests of e, until it is unmapped.
func (m *memory) count(e *endpoint) error {
	if err := e.mapMemory(m.size()); err != nil {
		return err
	}
	m.counted = e
	return nil
}

// retain adds a reference.
func (m *memory) retain() { m.refs.Add(1) }

// release drops a reference. The last one unmaps the memory.
func (m *memory) release() {
	if m.refs.Add(-1) > 0 {
		return
	}
	if m.counted != nil {
		_ = m.counted.mapMemory(-m.size())
	}
	for i := range m.regions {
		_ = unix.Munmap(m.regions[i].mapped) // fails only for what is not a mapping
	}
	m.regions = nil
}

// piece returns the memory at a guest address: up to n bytes, as far as they lie in one
// region. It is empty where the address is not in the memory.
func (m *memory) piece(addr, n uint64) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if at := addr - r.guest; at < r.size { // wraps for an address before the region
			n = min(n, r.size-at)
			return r.bytes[at:][:n:n]
		}
	}
	return nil
}

// user returns the n bytes at a user address, nil unless all of them lie in one region.
func (m *memory) user(addr, n uint64) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if at := addr - r.user; at < r.size && n <= r.size-at {
			return r.bytes[at:][:n:n]
		}
	}
	return nil
}

// maps reports whether a fault is in m.
func (m *memory) maps(fault *faultError) bool {
	for i := range m.regions {
		if fault.within(m.regions[i].mapped) {
			return true
		}
	}
	return false
}

// errOutside: an address of a guest that is not in its memory.
var errOutside = errors.New("an address is outside the guest's memory")

// read copies the memory at a guest address to p.
func (m *memory) read(p []byte, addr uint64) error {
	for len(p) > 0 {
		b := m.piece(addr, uint64(len(p)))
		if len(b) == 0 {
			return errOutside
		}
		copy(p, b)
		p, addr = p[len(b):], addr+uint64(len(b))
	}
	return nil
}

// faultError is an access to memory that is not there.
type faultError struct{ addr uintptr }

func (e *faultError) Error() string {
	return fmt.Sprintf("cannot access the memory that the front end shares, at %#x: its file was truncated, or cannot be read", e.addr)
}

// access runs f, which accesses shared memory. A fault in it, which would end the
// process, becomes a faultError.
func access(f func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			err = asFault(r)
		}
	}()
	return f()
}

// asFault returns the faultError of what was recovered. It panics again where that is not a
// fault.
func asFault(r any) *faultError {
	fault, ok := r.(interface{ Addr() uintptr })
	if !ok {
		panic(r)
	}
	return &faultError{fault.Addr()}
}

// within reports whether the fault is in b.
func (e *faultError) within(b []byte) bool {
	first := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return e.addr >= first && e.addr-first < uintptr(len(b))
}
