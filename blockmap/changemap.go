package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// changeMap says which blocks a level of an overlay has, and keeps that in two files of the
// layout of mapFormat. A block has two bits: 0 absent, 1 data, 2 zeros, 3 lost. The bits of
// the first block are the lowest of the first word.
//
// The files are two copies, as a cache has of its bits. A change is written to live before
// the write that makes it returns, so it outlives the process: the client, perhaps a kernel,
// goes on and believes in its write. Nobody syncs live. A change reaches durable, the file
// map, by a flush, after the data. On open, live is believed if the kernel has had the file
// ever since; or else durable is. Durable is believed also of a copy of the directory.
//
// Any mix of an older and a newer durable copy is right, block by block: a newer state is
// written only once its data are durable. So the words need no checksum and no journal.
type changeMap struct {
	id            Digest
	blocks        uint32
	live, durable states

	// The files of the copies. nil: the map goes with the process.
	liveFile, durableFile File
	data                  FileID // in the header of live

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
	m.dirty = newBitmap(m.live.words)
	return m
}

// maxWritten is up to which size a new map is written in full. The blocks of a larger one
// are reserved, and the first flush to each takes longer.
const maxWritten = 64 << 20

// create makes the durable file at path, and makes it durable. Its space is reserved: no
// flush fails because the map has no room.
func (m *changeMap) create(fsys FS, path string) (err error) {
	if m.durableFile, err = fsys.Open(path, true); err != nil {
		return err
	}
	m.durableFile.InPlace()
	size := overlayMap.size(m.blocks)
	if size > maxWritten {
		d := &dataFile{f: m.durableFile}
		err = d.zero(0, size)
	} else {
		for off := int64(0); off < size && err == nil; off += int64(len(zeros)) {
			_, err = m.durableFile.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off)
		}
	}
	if err == nil {
		_, err = m.durableFile.WriteAt(overlayMap.head(&mapHead{id: m.id, blocks: m.blocks}), 0)
	}
	if err == nil {
		err = m.durableFile.Sync()
	}
	return err
}

// loadMap reads the map of an overlay at path.
func loadMap(fsys FS, path string, id Digest, blocks uint32) (h mapHead, s states, err error) {
	b, err := readFile(fsys, path, overlayMap.size(blocks))
	if err != nil {
		return h, s, err
	}
	h, copies, err := overlayMap.decode(b)
	switch {
	case err != nil:
		return h, s, fmt.Errorf("%s: %w: restore it from a copy, or remove the overlay", path, err)
	case h.id != id || h.blocks != blocks:
		return h, s, fmt.Errorf("%s: %w: it is the map of another overlay: restore it from a copy, or remove the overlay", path, ErrCorrupt)
	}
	return h, statesOf(copies[0]), nil
}

// load reads the durable file at path.
func (m *changeMap) load(fsys FS, path string) (err error) {
	if _, m.durable, err = loadMap(fsys, path, m.id, m.blocks); err != nil {
		return err
	}
	m.durableFile, err = fsys.Open(path, false)
	return err
}

// attach takes over the live file at path if it can be believed, or makes it anew.
func (m *changeMap) attach(fsys FS, path string, boot BootID, data *dataFile) (err error) {
	m.data = data.id
	h, live, err := loadMap(fsys, path, m.id, m.blocks)
	if holds := err == nil && h.liveHolds(boot, data.id); holds {
		m.live = live
		for i := range m.live.words {
			if m.live.word(i) != m.durable.word(i) {
				m.mark(i, i+1)
			}
		}
		m.liveFile, err = fsys.Open(path, false)
		return err
	}
	m.live = m.durable.clone()
	// After a sync that has failed, memory shows what the disk has not.
	data.f.Forget()
	if err := fsys.RemoveAll(path); err != nil {
		return err
	}
	if m.liveFile, err = fsys.Open(path, true); err != nil {
		return err
	}
	m.liveFile.InPlace()
	if err := m.liveFile.Truncate(overlayMap.size(m.blocks)); err != nil {
		return err
	}
	// All words, so that all have space. The header comes last: without it nobody believes
	// them.
	if err := writeWords(m.liveFile, mapHeader, m.live, 0, m.live.words); err != nil {
		return err
	}
	return m.writeHead(boot)
}

// loseData makes lost what is data, in both copies and durably, and returns how many bytes
// that were in live. All stripes are held.
func (m *changeMap) loseData() (bytes int64, err error) {
	bytes = m.live.count(stateData) * BlockSize
	for _, s := range []states{m.live, m.durable} {
		for i := range s.words {
			w := s.word(i)
			s.put(i, w|blocksIn(w, stateData)<<1)
		}
	}
	if m.durableFile == nil {
		return bytes, nil
	}
	end := m.live.words
	if err := writeWords(m.liveFile, mapHeader, m.live, 0, end); err != nil {
		return bytes, err
	}
	if err := writeWords(m.durableFile, mapHeader, m.durable, 0, end); err != nil {
		return bytes, err
	}
	return bytes, m.durableFile.Sync()
}

// writeHead writes the header of live.
func (m *changeMap) writeHead(boot BootID) error {
	_, err := m.liveFile.WriteAt(overlayMap.head(&mapHead{m.id, m.blocks, boot, m.data}), 0)
	return err
}

// set makes words the live ones from first on. Their stripes are held. buf has room for
// the words.
func (m *changeMap) set(first uint32, words []uint64, buf []byte) error {
	if m.liveFile != nil {
		buf = buf[:0]
		for _, w := range words {
			buf = binary.LittleEndian.AppendUint64(buf, w)
		}
		if _, err := m.liveFile.WriteAt(buf, mapHeader+8*int64(first)); err != nil {
			return err
		}
	}
	for i, w := range words {
		m.live.put(first+uint32(i), w)
	}
	if m.liveFile != nil {
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
		err = m.durableFile.Sync()
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
		if err := writeWords(m.durableFile, mapHeader, m.durable, changes[0].i, changes[n-1].i+1); err != nil {
			return err
		}
		changes = changes[n:]
	}
	return nil
}

// distrust has the next open believe durable only.
func (m *changeMap) distrust() error {
	if m.liveFile == nil {
		return nil
	}
	return m.writeHead(BootID{})
}

// space is how many bytes the files take on disk.
func (m *changeMap) space() (n int64, err error) {
	for _, f := range m.files() {
		_, space, e := f.Stat()
		n, err = n+space, errors.Join(err, e)
	}
	return n, err
}

func (m *changeMap) files() (open []File) {
	for _, f := range []File{m.liveFile, m.durableFile} {
		if f != nil {
			open = append(open, f)
		}
	}
	return open
}

func (m *changeMap) close() (err error) {
	for _, f := range m.files() {
		err = errors.Join(err, f.Close())
	}
	return err
}
