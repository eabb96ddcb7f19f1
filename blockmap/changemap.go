package blockmap

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// changeMap says which blocks a level of an overlay has, and keeps that in a file of the
// layout of mapFormat. A block has two bits: 0 absent, 1 data, 2 zeros, 3 lost. The bits of
// the first block are the lowest of the first word.
//
// There are two copies, as a cache has of its bits. A change is written to live before the
// write that makes it returns, so it outlives the process: the client, perhaps a kernel,
// goes on and believes in its write. It reaches durable by a flush, after the data. On
// open, live is believed if the kernel has had the file ever since; or else durable is.
// Durable is believed also of a copy of the file.
//
// Any mix of an older and a newer durable copy is right, block by block: a newer state is
// written only once its data are durable. So a map needs no checksum and no journal.
type changeMap struct {
	id            Digest
	blocks        uint32
	live, durable states

	f    File // nil: the map goes with the process
	data FileID

	// dirty are the words that may be newer in live than in durable, as bits and as a
	// list.
	dirty bitmap
	mu    struct {
		sync.Mutex
		dirty []uint32
	}
}

func newChangeMap(id Digest, blocks uint32) *changeMap {
	m := &changeMap{id: id, blocks: blocks, live: newStates(blocks), durable: newStates(blocks)}
	m.dirty = newBitmap(uint32(len(m.live)))
	return m
}

// maxWritten is up to which size a new map is written in full. The blocks of a larger one
// are reserved, and the first flush to each takes longer.
const maxWritten = 64 << 20

// create makes the file at path, and makes it durable. Its space is reserved: neither a
// write nor a flush then fails because the map has no room.
func (m *changeMap) create(fsys FS, path string, boot BootID, data FileID) (err error) {
	m.data = data
	if m.f, err = fsys.Open(path, true); err != nil {
		return err
	}
	m.f.InPlace()
	if err := m.f.Truncate(0); err != nil {
		return err
	}
	size := overlayMap.size(m.blocks)
	if size > maxWritten {
		d := &dataFile{f: m.f}
		if err := d.zero(0, size); err != nil {
			return err
		}
	} else {
		for off := int64(0); off < size; off += int64(len(zeros)) {
			if _, err := m.f.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off); err != nil {
				return err
			}
		}
	}
	return cmp.Or(m.writeHead(boot), m.f.Sync())
}

// load reads the file at path, and returns its header.
func (m *changeMap) load(fsys FS, path string) (h mapHead, err error) {
	b, err := readFile(fsys, path, overlayMap.size(m.blocks))
	if err != nil {
		return h, err
	}
	h, live, durable, err := overlayMap.decode(b)
	switch {
	case err != nil:
		return h, fmt.Errorf("%s: %w: restore it from a copy, or remove the overlay", path, err)
	case h.id != m.id || h.blocks != m.blocks:
		return h, fmt.Errorf("%s: %w: it is the map of another overlay: restore it from a copy, or remove the overlay", path, ErrCorrupt)
	}
	m.live, m.durable = live, durable
	return h, nil
}

// attach opens the file that load has read, and goes on with what can be believed of it.
func (m *changeMap) attach(fsys FS, path string, h mapHead, boot BootID, data *dataFile) (err error) {
	if m.f, err = fsys.Open(path, false); err != nil {
		return err
	}
	m.data = data.id
	if h.liveHolds(boot, data.id) {
		for i := range m.live {
			if m.live[i] != m.durable[i] {
				m.mark(uint32(i), uint32(i)+1)
			}
		}
		return nil
	}
	m.live = slices.Clone(m.durable)
	// After a sync that has failed, memory shows what the disk has not.
	data.f.Forget()
	// The header comes last: under the older one nobody believes live.
	if err := writeWords(m.f, mapHeader, bitmap(m.live), 0, uint32(len(m.live))); err != nil {
		return err
	}
	return m.writeHead(boot)
}

// loseData makes lost what is data, in both copies and durably, and returns how many bytes
// that were in live. All stripes are held.
func (m *changeMap) loseData() (bytes int64, err error) {
	bytes = m.live.count(stateData) * BlockSize
	for _, s := range []states{m.live, m.durable} {
		for i := range uint32(len(s)) {
			w := s.word(i)
			s.put(i, w|blocksIn(w, stateData)<<1)
		}
	}
	if m.f == nil {
		return bytes, nil
	}
	end := uint32(len(m.live))
	if err := writeWords(m.f, mapHeader, bitmap(m.live), 0, end); err != nil {
		return bytes, err
	}
	if err := writeWords(m.f, mapHeader+overlayMap.half(m.blocks), bitmap(m.durable), 0, end); err != nil {
		return bytes, err
	}
	return bytes, m.f.Sync()
}

func (m *changeMap) writeHead(boot BootID) error {
	_, err := m.f.WriteAt(overlayMap.head(&mapHead{m.id, m.blocks, boot, m.data}), 0)
	return err
}

// set makes words the live ones from first on. Their stripes are held. buf has room for
// the words.
func (m *changeMap) set(first uint32, words []uint64, buf []byte) error {
	if m.f != nil {
		buf = buf[:0]
		for _, w := range words {
			buf = binary.LittleEndian.AppendUint64(buf, w)
		}
		if _, err := m.f.WriteAt(buf, mapHeader+8*int64(first)); err != nil {
			return err
		}
	}
	for i, w := range words {
		m.live.put(first+uint32(i), w)
	}
	if m.f != nil {
		m.mark(first, first+uint32(len(words)))
	}
	return nil
}

// mark notes that words first to end have changed.
func (m *changeMap) mark(first, end uint32) {
	if m.dirty.has(first, end-first) {
		return // since before the sync that is to come: it reads the words after it has cleared the bits
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := first; i < end; i++ {
		if m.dirty.set(i, 1) == 1 {
			m.mu.dirty = append(m.mu.dirty, i)
		}
	}
}

// clean says whether durable is as new as live.
func (m *changeMap) clean() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.mu.dirty) == 0
}

// wordChange is a word on its way to durable.
type wordChange struct {
	i        uint32
	old, new uint64
}

// snapshot takes the words that are newer in live, in order.
func (m *changeMap) snapshot() []wordChange {
	m.mu.Lock()
	list := m.mu.dirty
	m.mu.dirty = nil
	for _, i := range list {
		m.dirty.clear(i, 1)
	}
	m.mu.Unlock()
	slices.Sort(list)
	changes := make([]wordChange, 0, len(list))
	for _, i := range list {
		if c := (wordChange{i, m.durable.word(i), m.live.word(i)}); c.old != c.new {
			changes = append(changes, c)
		}
	}
	return changes
}

// restore undoes snapshot.
func (m *changeMap) restore(changes []wordChange) {
	for _, c := range changes {
		m.mark(c.i, c.i+1)
	}
}

// sync makes a snapshot durable, whose data are durable already. Where it fails, durable
// is what it was, as far as the disk can be asked. It fails with ErrNoSpace where the disk
// has no room for the words: that can be tried again.
func (m *changeMap) sync(changes []wordChange) error {
	for _, c := range changes {
		m.durable.put(c.i, c.new)
	}
	err := m.writeDurable(changes)
	if diskFull(err) {
		err = fmt.Errorf("%w (%w)", ErrNoSpace, err)
	} else if err == nil {
		err = m.f.Sync()
	}
	if err == nil {
		return nil
	}
	for _, c := range changes {
		m.durable.put(c.i, c.old)
	}
	if e := m.writeDurable(changes); e != nil && !errors.Is(err, ErrNoSpace) {
		err = errors.Join(err, e)
	}
	return err
}

// writeDurable writes words of durable to the file, those of a page together.
func (m *changeMap) writeDurable(changes []wordChange) error {
	const page = BlockSize / 8
	for len(changes) > 0 {
		n := 1
		for n < len(changes) && changes[n].i/page == changes[0].i/page {
			n++
		}
		if err := writeWords(m.f, mapHeader+overlayMap.half(m.blocks), bitmap(m.durable), changes[0].i, changes[n-1].i+1); err != nil {
			return err
		}
		changes = changes[n:]
	}
	return nil
}

// distrust has the next open believe durable only.
func (m *changeMap) distrust() error {
	if m.f == nil {
		return nil
	}
	return m.writeHead(BootID{})
}

func (m *changeMap) close() error {
	if m.f == nil {
		return nil
	}
	return m.f.Close()
}
