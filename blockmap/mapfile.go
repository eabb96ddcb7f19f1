package blockmap

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
)

// mapFile keeps two bitmaps about the blocks of a data file on disk: live and
// durable. It knows neither streams nor what the bits mean; residency does. It
// is written with pwrite and never mapped: on a full disk a write to a mapping is
// a signal, and a pwrite is an error. Its layout is that of mapFormat.
type mapFile struct {
	id            Digest
	blocks        uint32
	live, durable bitmap

	// mu is held across writes, so that of two writes of one word the later one
	// has both changes. A write is a few words, into the page cache.
	mu struct {
		sync.Mutex
		fsys  FS
		path  string
		f     File // nil: closed
		head  []byte
		stale bool // the file differs from memory and must be written whole
		gone  bool // there is no file, or one that must not be believed

		// data is the file that the blocks are in, once there is one.
		data  FileID
		known bool
	}
}

// BootID identifies one run of the machine's kernel. The zero BootID is not
// known.
type BootID [16]byte

// ParseBootID reads the form that Linux has in /proc/sys/kernel/random/boot_id.
func ParseBootID(s string) (id BootID, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q is not a boot ID", s)
	}
	return BootID(b), nil
}

// errCopied says that a map describes another file than the one beside it.
var errCopied = errors.New("the data is not in the file that it was written to: the cache was copied")

// load reads the file at path into live and durable, or fails and changes
// nothing. data is the data file as it is now.
func (m *mapFile) load(fsys FS, path string, boot BootID, data FileID) error {
	b, err := readFile(fsys, path, residencyMap.size(m.blocks))
	if err != nil {
		return err
	}
	h, copies, err := residencyMap.decode(b)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case h.id != m.id || h.blocks != m.blocks:
		return fmt.Errorf("%s: %w: the map of another stream", path, ErrCorrupt)
	case !h.data.sameFile(data):
		return fmt.Errorf("%s: %w", path, errCopied)
	}
	live, durable := copies[0], copies[1]
	if !h.liveHolds(boot, data) {
		live = durable // the kernel may have lost the rest
	}
	copy(m.live, live)
	copy(m.durable, durable)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.gone = false
	m.mu.data, m.mu.known = data, true
	return nil
}

// identity is the file that the blocks are in, if there is one.
func (m *mapFile) identity() (data FileID, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.data, m.mu.known
}

// forgetIdentity allows later blocks to be in another file.
func (m *mapFile) forgetIdentity() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.data, m.mu.known = FileID{}, false
}

// attach opens the file, or makes it, and from then on each change is written to
// it. The file already says what load has read, unless data, the boot or the
// superblock have changed since.
func (m *mapFile) attach(fsys FS, path string, boot BootID, data FileID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.f != nil {
		return nil
	}
	f, err := fsys.Open(path, true)
	if err != nil {
		return err
	}
	size, _, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	h := mapHead{id: m.id, blocks: m.blocks, boot: boot, data: data}
	m.mu.fsys, m.mu.path, m.mu.f = fsys, path, f
	m.mu.data, m.mu.known = data, true
	m.mu.head = residencyMap.head(&h)
	if size == 0 {
		f.InPlace()
	}
	if !m.mu.stale && !m.mu.gone && size == residencyMap.size(m.blocks) {
		head := make([]byte, mapHeadLen)
		if _, err := f.ReadAt(head, 0); err == nil && string(head) == string(m.mu.head) {
			return nil
		}
	}
	m.mu.stale, m.mu.gone = true, false
	// On a full disk the file goes on to say less than memory. That is safe, and
	// the next sync tries again.
	_ = m.writeAll()
	return nil
}

// detach closes the file.
func (m *mapFile) detach() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.f == nil {
		return nil
	}
	err := m.mu.f.Close()
	m.mu.f = nil
	return err
}

// writeAll writes the whole file. The header comes last: under an older header
// only durable bits are believed. m.mu is held.
func (m *mapFile) writeAll() error {
	if err := m.mu.f.Truncate(residencyMap.size(m.blocks)); err != nil {
		return err
	}
	err := m.writeWords(0, uint32(len(m.live)))
	if err == nil {
		head := make([]byte, mapHeader)
		copy(head, m.mu.head)
		_, err = m.mu.f.WriteAt(head, 0)
	}
	m.mu.stale = err != nil
	return err
}

// writeWords writes words first to end of both bitmaps. m.mu is held.
func (m *mapFile) writeWords(first, end uint32) error {
	if err := writeWords(m.mu.f, mapHeader, m.live, first, end); err != nil {
		return err
	}
	return writeWords(m.mu.f, mapHeader+residencyMap.half(m.blocks), m.durable, first, end)
}

// write brings the file up to date about n bits from b. A failure is made good
// by the next sync or flush.
func (m *mapFile) write(b, n uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.f == nil || m.mu.stale {
		m.mu.stale = true
		return // it is written whole when it is opened, synced or flushed
	}
	if m.writeWords(b/64, (b+n-1)/64+1) != nil {
		m.mu.stale = true
	}
}

// update writes words first to end, or the whole file where that is due.
func (m *mapFile) update(first, end uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.mu.f == nil:
		return nil
	case m.mu.stale:
		return m.writeAll()
	}
	err := m.writeWords(first, end)
	m.mu.stale = err != nil
	return err
}

// flush makes the file durable, so that after a power cut it says nothing of
// blocks that were cleared. Where the disk has no room for the file it is removed
// until a sync can make it again: no file says nothing either. The file is
// attached.
func (m *mapFile) flush() error {
	m.mu.Lock()
	f, err := m.mu.f, error(nil)
	if f != nil && m.mu.stale {
		if err = m.writeAll(); diskFull(err) {
			f, err = nil, m.remove()
		}
	}
	m.mu.Unlock()
	if f == nil || err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		// The kernel reports a failed write once, and takes the pages for written
		// then: the next sync means something only after all was written again.
		m.mu.Lock()
		m.mu.stale = true
		m.mu.Unlock()
		return err
	}
	return nil
}

// remove removes the file. m.mu is held.
func (m *mapFile) remove() error {
	err := errors.Join(m.mu.f.Close(), m.mu.fsys.RemoveAll(m.mu.path))
	if err == nil {
		err = m.mu.fsys.SyncDir(filepath.Dir(m.mu.path))
	}
	m.mu.f, m.mu.stale, m.mu.gone = nil, true, err == nil
	return err
}
