package blockmap_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// sectors is a model of a writable device by sectors of 512 bytes. Each write fills its
// sectors with a stamp of its own, so a sector tells which write it has, and that it is
// not torn. A sector may have one of several stamps after a write that has failed, or
// after a crash.
type sectors struct {
	from  int        // the first one, if others of the device belong to another model
	now   [][]uint32 // that a read may show
	since [][]uint32 // that there were since the last flush
}

const sectorSize = 512

var stamps atomic.Uint32

// newSectors is the model of a new device over base.
func newSectors(base []uint32) *sectors {
	m := &sectors{now: make([][]uint32, len(base)), since: make([][]uint32, len(base))}
	for i, s := range base {
		m.now[i], m.since[i] = []uint32{s}, []uint32{s}
	}
	return m
}

// stampedBase makes a cold base whose sectors have stamps. Every fourth block is a hole,
// which has the stamp 0.
func stampedBase(blocks int) (*blocktest.Memory, []uint32) {
	d := blocktest.NewMemory(int64(blocks) * blockmap.BlockSize)
	var all []uint32
	for b := range blocks {
		p := make([]byte, 0, blockmap.BlockSize)
		for range blockmap.BlockSize / sectorSize {
			s := uint32(0)
			if b%4 != 3 {
				s = stamps.Add(1)
			}
			p, all = append(p, stamped(s, 1)...), append(all, s)
		}
		if b%4 != 3 {
			d.Fill(p, int64(b)*blockmap.BlockSize)
		}
	}
	d.Evict(blockmap.Range(0, d.Size()))
	return d, all
}

// stamped is n sectors with the stamp s.
func stamped(s uint32, n int) []byte {
	p := make([]byte, n*sectorSize)
	for i := 0; i < len(p); i += 4 {
		binary.LittleEndian.PutUint32(p[i:], s)
	}
	return p
}

// stampOf is the stamp of a sector. ok is false for a sector of several writes.
func stampOf(p []byte) (s uint32, ok bool) {
	s = binary.LittleEndian.Uint32(p)
	for i := 4; i < sectorSize; i += 4 {
		if binary.LittleEndian.Uint32(p[i:]) != s {
			return 0, false
		}
	}
	return s, true
}

// extent is where n sectors from at lie on the device.
func (m *sectors) extent(at, n int) blockmap.Extent {
	return blockmap.Range(int64(m.from+at)*sectorSize, int64(n)*sectorSize)
}

// write says that n sectors from at have the stamp s; or, if the write has failed, may have.
func (m *sectors) write(at, n int, s uint32, failed bool) {
	for i := at; i < at+n; i++ {
		if m.since[i] = append(m.since[i], s); failed {
			m.now[i] = append(slices.Clip(m.now[i]), s)
		} else {
			m.now[i] = []uint32{s}
		}
	}
}

func (m *sectors) flush() {
	for i := range m.now {
		m.since[i] = slices.Clone(m.now[i])
	}
}

// check fails t unless the sectors of e are as the model says. It returns the stamps.
func (m *sectors) check(t testing.TB, d blockmap.Device, at, n int, what string) []uint32 {
	t.Helper()
	e := m.extent(at, n)
	p, err := blocktest.Read(t.Context(), d, e)
	if err != nil {
		t.Fatalf("%s: read %v: %v", what, e, err)
	}
	got := make([]uint32, n)
	for i := range got {
		s, ok := stampOf(p[i*sectorSize:][:sectorSize])
		if !ok || !slices.Contains(m.now[at+i], s) {
			t.Fatalf("%s: sector %d of block %d has the stamp %d (torn: %v), not one of %v", what, (m.from+at+i)%8, (m.from+at+i)/8, s, !ok, m.now[at+i])
		}
		got[i] = s
	}
	return got
}

// crash makes m the model of d, which a crash has left: with power, or without it. Each
// sector keeps the stamp that d shows now.
func (m *sectors) crash(t testing.TB, d blockmap.Device, powerLost bool, what string) {
	t.Helper()
	if powerLost {
		for i := range m.now {
			m.now[i] = m.since[i]
		}
	}
	for i, s := range m.check(t, d, 0, len(m.now), what) {
		m.now[i] = []uint32{s}
		if powerLost {
			m.since[i] = []uint32{s}
		} else {
			m.since[i] = append(m.since[i], s)
		}
	}
}

// writer does random writes, of any kind, to a device with a model.
type writer struct {
	t   testing.TB
	d   *blockmap.Overlay
	m   *sectors
	rng *rand.Rand

	holes bool // all that is zeroed may become a hole
}

// extent is a random part of the device, mostly of whole blocks.
func (w *writer) extent() (at, n int) {
	total := len(w.m.now)
	at = w.rng.IntN(total)
	switch w.rng.IntN(4) {
	case 0:
		n = 1 + w.rng.IntN(12)
	case 1:
		n = 1 + w.rng.IntN(80)
		at, n = at&^7, (n+7)&^7
	default:
		at, n = at&^7, 8
	}
	return at, min(n, total-at)
}

// write does one write, and says how it ended.
func (w *writer) write() error {
	at, n := w.extent()
	e := w.m.extent(at, n)
	ctx := w.t.Context()
	var s uint32
	var err error
	switch w.rng.IntN(8) {
	case 0:
		err = w.d.Zero(ctx, e, w.holes)
	case 1:
		err = w.d.Zero(ctx, e, true)
	case 2:
		err = w.d.Discard(ctx, e)
	default:
		s = stamps.Add(1)
		err = w.d.WriteAt(ctx, stamped(s, n), e.Start)
	}
	w.m.write(at, n, s, err != nil)
	return err
}

func (w *writer) flush() error {
	err := w.d.Flush(w.t.Context())
	if err == nil {
		w.m.flush()
	}
	return err
}

func (w *writer) check(what string) {
	w.t.Helper()
	w.m.check(w.t, w.d, 0, len(w.m.now), what)
	// What the statistics count is what the map says.
	var data, zero int64
	for c := range w.d.Changes() {
		if c.Zero {
			zero += c.Len()
		} else {
			data += c.Len()
		}
	}
	if st := w.d.Stats(); st.Data != data || st.Zero != zero {
		w.t.Fatalf("%s: %d bytes of data and %d of zeros are counted; there are %d and %d", what, st.Data, st.Zero, data, zero)
	}
}

func (w *writer) String() string { return fmt.Sprintf("%d sectors", len(w.m.now)) }
