package blockmap

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"time"
)

// overlayHeader is the file that says what an overlay is of. It is written once, after all
// else of a new overlay is durable. Numbers are little-endian.
//
//	 0   8  magic "thawovly"
//	 8   4  version, 1
//	12   4  CRC-32C of the file, this field taken as zero
//	16   8  size of the device in bytes
//	24  32  digest of the manifest of the image
//	56   4  length of the reference
//	60      reference of the image
type overlayHeader struct {
	size   int64
	digest Digest
	image  string
}

const (
	overlayMagic   = "thawovly"
	overlayVersion = 1
	overlayHeadLen = 60
	maxImageName   = 4096
)

func (h *overlayHeader) encode() []byte {
	b := make([]byte, overlayHeadLen, overlayHeadLen+len(h.image))
	copy(b, overlayMagic)
	binary.LittleEndian.PutUint32(b[8:], overlayVersion)
	binary.LittleEndian.PutUint64(b[16:], uint64(h.size))
	copy(b[24:], h.digest[:])
	binary.LittleEndian.PutUint32(b[56:], uint32(len(h.image)))
	b = append(b, h.image...)
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// decodeOverlayHeader reads a header without trusting it. It fails with ErrCorrupt.
func decodeOverlayHeader(b []byte) (h overlayHeader, err error) {
	if len(b) < overlayHeadLen || string(b[:8]) != overlayMagic {
		return h, fmt.Errorf("%w: not the header of an overlay", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != overlayVersion {
		return h, fmt.Errorf("%w: overlay version %d, this program reads %d", ErrCorrupt, v, overlayVersion)
	}
	h.size = int64(binary.LittleEndian.Uint64(b[16:]))
	copy(h.digest[:], b[24:])
	h.image = string(b[overlayHeadLen:])
	if string(h.encode()) != string(b) {
		return h, fmt.Errorf("%w: the header of the overlay is damaged", ErrCorrupt)
	}
	if h.size < 0 || h.size%BlockSize != 0 || h.size/BlockSize > maxOverlayBlocks || len(h.image) > maxImageName {
		return h, fmt.Errorf("%w: an overlay of a device of %d bytes", ErrCorrupt, h.size)
	}
	return h, nil
}

// OpenOverlay opens the overlay in dir, or makes it where dir is missing or empty, unless
// Existing says not to. It fails with ErrLocked where another process has it.
func OpenOverlay(dir string, base Device, opt OverlayOptions) (*Overlay, error) {
	o, err := newOverlay(dir, base, opt)
	if err != nil {
		return nil, fmt.Errorf("open overlay %s: %w", dir, err)
	}
	if err := o.open(); err != nil {
		if s := o.layers.Load(); s != nil {
			for _, lv := range s.levels() {
				err = errors.Join(err, lv.close())
			}
		}
		if o.lock != nil {
			err = errors.Join(err, o.lock.Close())
		}
		return nil, fmt.Errorf("open overlay %s: %w", dir, err)
	}
	o.start()
	if o.layers.Load().merging {
		o.freezing.Lock()
		defer o.freezing.Unlock()
		if _, err := o.startMerge(); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func (o *Overlay) path(name string) string { return filepath.Join(o.dir, name) }

func (o *Overlay) open() (err error) {
	if len(o.header.image) > maxImageName {
		return fmt.Errorf("the reference of the image has %d bytes; at most %d are allowed", len(o.header.image), maxImageName)
	}
	entries, err := o.fs.ReadDir(o.dir)
	if errors.Is(err, fs.ErrNotExist) && !o.existing {
		err = cmp.Or(o.fs.MkdirAll(o.dir), o.fs.SyncDir(filepath.Dir(o.dir)))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNoOverlay, err)
	}
	if err == nil {
		err = o.fs.Private(o.dir)
	}
	if err != nil {
		return err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	has := func(name string) bool { return slices.Contains(names, name) }
	if o.existing && !has(headerName) {
		return ErrNoOverlay
	}
	if !has(headerName) && !has(headerName+newSuffix) {
		for _, name := range names {
			if name != lockName {
				return fmt.Errorf("the directory has other files, such as %s, and no overlay: use an empty directory", name)
			}
		}
	}
	if o.lock, err = lockOverlay(o.fs, o.path(lockName)); err != nil {
		return err
	}
	h, err := readOverlayHeader(o.fs, o.dir)
	if errors.Is(err, fs.ErrNotExist) && !o.existing {
		return o.create()
	}
	if err != nil {
		return err
	}
	switch {
	case h.digest != o.header.digest:
		return fmt.Errorf("it belongs to the image %s (%.12s), not to %.12s: use another directory, or the image that it belongs to", h.image, h.digest, o.header.digest)
	case h.size != o.size:
		return fmt.Errorf("it belongs to a device of %d bytes, and the image has %d: use another directory", h.size, o.size)
	}
	return o.openLevels()
}

// lockTries is how often a lock is tried. Whoever lists overlays holds it for a moment.
const lockTries = 5

func lockOverlay(fsys FS, path string) (io.Closer, error) {
	for try := 1; ; try++ {
		l, err := fsys.Lock(path)
		if !errors.Is(err, ErrLocked) || try == lockTries {
			return l, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func readOverlayHeader(fsys FS, dir string) (h overlayHeader, err error) {
	path := filepath.Join(dir, headerName)
	b, err := readFile(fsys, path, overlayHeadLen+maxImageName)
	if err != nil {
		return h, err
	}
	if h, err = decodeOverlayHeader(b); err != nil {
		return h, fmt.Errorf("%s: %w: restore it from a copy, or remove the overlay", path, err)
	}
	return h, nil
}

// create makes a new overlay. A header of another name comes first: it tells an overlay
// that was never finished from the files of somebody else.
func (o *Overlay) create() error {
	unfinished := o.path(headerName + newSuffix)
	f, err := o.fs.Open(unfinished, true)
	if err != nil {
		return err
	}
	// One that is there already may be longer.
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(o.header.encode(), 0)
	}
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = o.fs.SyncDir(o.dir)
	}
	if err != nil {
		return err
	}
	lv, err := o.newLevel("")
	if err != nil {
		return err
	}
	o.layers.Store(&layers{base: o.base, size: o.size, top: lv})
	return cmp.Or(o.fs.Rename(unfinished, o.path(headerName)), o.fs.SyncDir(o.dir))
}

// newLevel makes an empty level, durably. Its map gets its name last, so a level with a
// map is whole.
func (o *Overlay) newLevel(suffix string) (*level, error) {
	m := newChangeMap(o.header.digest, o.blocks())
	lv := newLevel(o.memory, &o.reads, o.path(dataName+suffix), m)
	if o.temp {
		f, err := tempData(o.fs, o.dir, o.size)
		lv.file.Store(f)
		return lv, err
	}
	if err := o.removeLevel(suffix); err != nil {
		return nil, err
	}
	f, err := o.makeData(lv)
	if err != nil {
		return nil, errors.Join(err, o.removeLevel(suffix))
	}
	lv.file.Store(f)
	unfinished, path := o.path(mapName+suffix+newSuffix), o.path(mapName+suffix)
	if err = m.create(o.fs, unfinished); err == nil {
		err = m.attach(o.fs, o.path(liveName+suffix), o.boot, f)
	}
	if err == nil {
		err = o.fs.Rename(unfinished, path)
	}
	if err == nil {
		err = o.fs.SyncDir(o.dir)
	}
	if err != nil {
		return nil, errors.Join(err, lv.close(), o.removeLevel(suffix))
	}
	return lv, nil
}

// openLevels opens what an earlier process left.
func (o *Overlay) openLevels() error {
	low, err := o.openLevel("")
	if err != nil {
		return err
	}
	s := &layers{base: o.base, size: o.size, top: low}
	o.layers.Store(s)
	switch upper, err := o.openLevel(upperSuffix); {
	case err == nil:
		s = &layers{base: o.base, size: o.size, top: upper, low: low, merging: true}
		o.layers.Store(s)
	case !errors.Is(err, errNoLevel):
		return err
	default: // what was left of one is in the way
		if err := o.removeLevel(upperSuffix); err != nil {
			return err
		}
	}
	data, zero := s.count()
	o.dataBlocks.Store(data / BlockSize)
	o.zeroBlocks.Store(zero / BlockSize)
	return nil
}

// errNoLevel says that there is no such level.
var errNoLevel = errors.New("the map is missing")

// openLevel opens the level with the suffix.
func (o *Overlay) openLevel(suffix string) (_ *level, err error) {
	m := newChangeMap(o.header.digest, o.blocks())
	lv := newLevel(o.memory, &o.reads, o.path(dataName+suffix), m)
	path := o.path(mapName + suffix)
	err = m.load(o.fs, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: restore it from a copy, or remove the overlay", path, errNoLevel)
	}
	if err != nil {
		return nil, err
	}
	id, space, err := statData(o.fs, lv.name, o.size)
	var f *dataFile
	switch {
	case err == nil:
		f, err = openData(o.fs, lv.name, o.size, id, true, nil)
	case notOurs(err) && m.durable.count(stateData) == 0 && !o.liveNeedsData(suffix):
		// A crash came before a file that was cut short had got another one in its place.
		f, err = o.makeData(lv)
	}
	if notOurs(err) {
		err = fmt.Errorf("%s is missing, or was cut short: restore it from a copy, or remove the overlay: %w", lv.name, err)
	}
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	lv.file.Store(f)
	live := o.path(liveName + suffix)
	if h, _, err := loadMap(o.fs, live, o.header.digest, o.blocks()); o.volatile && (err != nil || !h.liveHolds(o.boot, f.id)) {
		return nil, errors.Join(fmt.Errorf("%w: the machine has rebooted, or its filesystem has been unmounted and mounted again: remove %s", ErrVolatile, o.dir), lv.close())
	}
	if err := m.attach(o.fs, live, o.boot, f); err != nil {
		return nil, errors.Join(err, lv.close())
	}
	lv.wrote() // the process before may have written, and synced nothing
	lv.punchLeftovers(space)
	return lv, nil
}

// liveNeedsData says whether a level has data that no flush has covered, and that the
// kernel should have.
func (o *Overlay) liveNeedsData(suffix string) bool {
	h, live, err := loadMap(o.fs, o.path(liveName+suffix), o.header.digest, o.blocks())
	return err == nil && h.liveHolds(o.boot, h.data) && live.count(stateData) > 0
}

// punchLeftovers has the next flush give back the space of all blocks that need none, if
// the file takes much more than its blocks: a process was killed between writing and
// marking, or between a flush and punching.
func (lv *level) punchLeftovers(space int64) {
	data := lv.m.live.count(stateData) * BlockSize
	if space <= data+data/8+1<<20 {
		return
	}
	for b, n := uint32(0), lv.m.blocks; n > 0; {
		k, st := lv.m.live.run(b, n)
		if st != stateData {
			for first, end := wordsOf(b, k); first < end; first++ {
				lv.punchLater(first, wordMask(first, b, k)&everyOther)
			}
		}
		b, n = b+k, n-k
	}
}
