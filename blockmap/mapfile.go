package blockmap

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"strings"
	"sync"
)

// mapFile keeps two bitmaps about the blocks of a data file on disk: live and
// durable. It knows neither streams nor what the bits mean; residency does. It
// is written with pwrite and never mapped: on a full disk a write to a mapping is
// a signal, and a pwrite is an error.
//
//	   0    8  magic "thawresi"
//	   8    4  version, 2
//	  12    4  CRC-32C of bytes 0 to 103, this field taken as zero
//	  16   32  ID of the stream
//	  48    4  blocks
//	  52    4  zero
//	  56   16  boot ID of the machine when live was last begun
//	  72    8  mount ID then, 0 if not known (statx, STATX_MNT_ID_UNIQUE)
//	  80    8  device of the data's file then
//	  88    8  inode of the data's file
//	  96    8  when that inode was made, ns since 1970, 0 if not known
//	 104       zeros
//	4096    L  live: L = bytes of the bitmap, rounded up to 4096
//	4096+L  L  durable
//
// Numbers and words of 64 bits are little-endian.
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

const (
	mapMagic   = "thawresi"
	mapVersion = 2
	mapHeader  = 4096
	mapHeadLen = 104 // bytes of the header that are in use
)

// bitmapLen is the length of a bitmap in its file, in bytes.
func bitmapLen(blocks uint32) int64 { return allocated((int64(blocks) + 63) / 64 * 8) }

// mapSize is the length of the file, in bytes.
func mapSize(blocks uint32) int64 { return mapHeader + 2*bitmapLen(blocks) }

// mapHead is the header of a mapFile.
type mapHead struct {
	id     Digest
	blocks uint32
	boot   BootID
	data   FileID
}

func (h *mapHead) encode() []byte {
	b := make([]byte, mapHeadLen)
	copy(b, mapMagic)
	binary.LittleEndian.PutUint32(b[8:], mapVersion)
	copy(b[16:], h.id[:])
	binary.LittleEndian.PutUint32(b[48:], h.blocks)
	copy(b[56:], h.boot[:])
	binary.LittleEndian.PutUint64(b[72:], h.data.Mount)
	binary.LittleEndian.PutUint64(b[80:], h.data.Device)
	binary.LittleEndian.PutUint64(b[88:], h.data.Inode)
	binary.LittleEndian.PutUint64(b[96:], uint64(h.data.Born))
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// decodeMap reads the content of a mapFile. It fails with ErrCorrupt.
func decodeMap(b []byte) (h mapHead, live, durable bitmap, err error) {
	if len(b) < mapHeader || string(b[:8]) != mapMagic {
		return h, nil, nil, fmt.Errorf("%w: not a residency map", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != mapVersion {
		return h, nil, nil, fmt.Errorf("%w: residency map version %d, this program reads %d", ErrCorrupt, v, mapVersion)
	}
	copy(h.id[:], b[16:])
	h.blocks = binary.LittleEndian.Uint32(b[48:])
	copy(h.boot[:], b[56:])
	h.data = FileID{
		Mount: binary.LittleEndian.Uint64(b[72:]), Device: binary.LittleEndian.Uint64(b[80:]),
		Inode: binary.LittleEndian.Uint64(b[88:]), Born: int64(binary.LittleEndian.Uint64(b[96:])),
	}
	if string(b[:mapHeadLen]) != string(h.encode()) {
		return h, nil, nil, fmt.Errorf("%w: the header of the residency map is damaged", ErrCorrupt)
	}
	if int64(len(b)) != mapSize(h.blocks) {
		return h, nil, nil, fmt.Errorf("%w: the residency map has %d bytes instead of %d", ErrCorrupt, len(b), mapSize(h.blocks))
	}
	words := func(b []byte) bitmap {
		m := newBitmap(h.blocks)
		for i := range m {
			m[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		m.trim(h.blocks)
		return m
	}
	return h, words(b[mapHeader:]), words(b[mapHeader+bitmapLen(h.blocks):]), nil
}

// errCopied says that a map describes another file than the one beside it.
var errCopied = errors.New("the data is not in the file that it was written to: the cache was copied")

// load reads the file at path into live and durable, or fails and changes
// nothing. data is the data file as it is now.
func (m *mapFile) load(fsys FS, path string, boot BootID, data FileID) error {
	b, err := readFile(fsys, path, mapSize(m.blocks))
	if err != nil {
		return err
	}
	h, live, durable, err := decodeMap(b)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case h.id != m.id || h.blocks != m.blocks:
		return fmt.Errorf("%s: %w: the map of another stream", path, ErrCorrupt)
	case !h.data.sameFile(data):
		return fmt.Errorf("%s: %w", path, errCopied)
	}
	if boot == (BootID{}) || boot != h.boot || data.Mount == 0 || h.data != data {
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
// mount have changed since.
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
	m.mu.head = h.encode()
	if size == 0 {
		f.InPlace()
	}
	if !m.mu.stale && !m.mu.gone && size == mapSize(m.blocks) {
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
	if err := m.mu.f.Truncate(mapSize(m.blocks)); err != nil {
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
	for at, words := range []bitmap{m.live, m.durable} {
		base := mapHeader + int64(at)*bitmapLen(m.blocks)
		for i := first; i < end; {
			n := min(end-i, 1<<15)
			b := make([]byte, 0, 8*n)
			for k := range n {
				b = binary.LittleEndian.AppendUint64(b, words.word(i+k))
			}
			if _, err := m.mu.f.WriteAt(b, base+8*int64(i)); err != nil {
				return err
			}
			i += n
		}
	}
	return nil
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
