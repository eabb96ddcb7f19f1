package blocktest

import (
	"context"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"thaw/blockmap"
)

// model knows which values each byte of a writable device may have: one as a rule,
// more after a Discard, a write that has failed, or a loss of power.
//
// Its loops over bytes are go:norace: each byte has 32 of its own here, and with the
// race detector watching them a test takes ten times as long. The detector is to watch the
// devices.
type model struct {
	from  int64 // the byte that now begins with
	now   []set
	since []set  // at any time since the last flush
	ever  []set  // at any time, and zero: what a discarded byte may be
	loose []bool // discarded: it need not read as the same twice
}

// set is a set of byte values.
type set [4]uint64

func (s *set) add(b byte)      { s[b/64] |= 1 << (b % 64) }
func (s *set) has(b byte) bool { return s[b/64]>>(b%64)&1 != 0 }
func (s *set) join(o *set) {
	for i := range s {
		s[i] |= o[i]
	}
}

func (s *set) count() (n int) {
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

//go:norace
func newModel(content []byte) *model {
	m := &model{now: make([]set, len(content)), ever: make([]set, len(content)), loose: make([]bool, len(content))}
	for i, b := range content {
		m.now[i].add(b)
		m.ever[i].add(b)
		m.ever[i].add(0)
	}
	m.since = slices.Clone(m.now)
	return m
}

// snapshot is a model of what may be read now of e, and knows no other byte. It takes writes,
// and no discards. It is only of e because new memory costs the race detector more than
// all else that a test does: a model has 32 times the bytes of its device.
func (m *model) snapshot(e blockmap.Extent) *model {
	return &model{from: e.Start, now: slices.Clone(m.of(e))}
}

// of are the sets of the bytes of e.
func (m *model) of(e blockmap.Extent) []set { return m.now[e.Start-m.from : e.End-m.from] }

// write makes p the bytes at off.
//
//go:norace
func (m *model) write(p []byte, off int64) {
	for i := range p {
		m.now[off-m.from+int64(i)] = set{}
		if m.loose != nil {
			m.loose[off+int64(i)] = false
		}
	}
	m.may(p, off)
}

// may says that the bytes at off are p now, or what they were before.
//
//go:norace
func (m *model) may(p []byte, off int64) {
	for i, b := range p {
		at := off + int64(i)
		m.now[at-m.from].add(b)
		if m.since != nil {
			m.since[at].add(b)
			m.ever[at].add(b)
		}
	}
}

func (m *model) zero(e blockmap.Extent) { m.write(make([]byte, e.Len()), e.Start) }

//go:norace
func (m *model) discard(e blockmap.Extent) {
	for at := e.Start; at < e.End; at++ {
		m.now[at].join(&m.ever[at])
		m.since[at].join(&m.ever[at])
		m.loose[at] = true
	}
}

func (m *model) flush() { copy(m.since, m.now) }

// random does one write of e, of any kind.
func (m *model) random(t *testing.T, ctx context.Context, d blockmap.WritableDevice, e blockmap.Extent, rng *rand.Rand) {
	t.Helper()
	var call string
	var err error
	switch rng.IntN(6) {
	case 0:
		call, err = "zero", d.Zero(ctx, e, false)
		m.zero(e)
	case 1:
		call, err = "zero and discard", d.Zero(ctx, e, true)
		m.zero(e)
	case 2:
		call, err = "discard", d.Discard(ctx, e)
		m.discard(e)
	default:
		p := filled(rng, e.Len())
		call, err = "write", d.WriteAt(ctx, p, e.Start)
		m.write(p, e.Start)
	}
	if err != nil {
		t.Fatalf("%s %v: %v", call, e, err)
	}
}

// check reads e of d, and fails t unless the model allows every byte.
func (m *model) check(t *testing.T, d blockmap.Device, e blockmap.Extent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	got, err := Read(ctx, d, e)
	if err != nil {
		t.Errorf("read %v: %v", e, err)
		return
	}
	if int64(len(got)) != e.Len() {
		t.Errorf("read %v: %d bytes", e, len(got))
		return
	}
	if at := m.excludes(got, e.Start); at >= 0 {
		t.Errorf("read %v: byte %d is %#x, which is none of the %d values that it may have", e, at, got[at-e.Start], m.now[at-m.from].count())
	}
}

// excludes returns where the first byte is that the model does not allow if p is read at
// off, or -1.
//
//go:norace
func (m *model) excludes(p []byte, off int64) int64 {
	for i, b := range p {
		if at := off + int64(i); !m.now[at-m.from].has(b) {
			return at
		}
	}
	return -1
}

// crash makes m the model of d, which a loss of power has left. Bytes then keep the
// values that d shows, except discarded ones.
//
//go:norace
func (m *model) crash(t *testing.T, d blockmap.Device) {
	t.Helper()
	copy(m.now, m.since)
	all := blockmap.Range(0, d.Size())
	m.check(t, d, all)
	got, err := Read(aCtx(t), d, all)
	if err != nil {
		t.Errorf("read all after a loss of power: %v", err)
		return
	}
	for at, b := range got {
		if !m.loose[at] {
			m.now[at] = set{}
			m.now[at].add(b)
		}
	}
	copy(m.since, m.now)
}
