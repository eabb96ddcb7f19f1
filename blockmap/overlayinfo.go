package blockmap

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// OverlayInfo is what an overlay directory says without its base.
type OverlayInfo struct {
	Image  string // the reference of the base by digest
	Digest Digest // of the base's manifest
	Size   int64  // of the device, in bytes
	Data   int64  // bytes of blocks that the overlay has data for
	Zero   int64  // bytes of blocks that it has made zeros
	Space  int64  // bytes that it takes on disk
	Levels int    // 2 from a Freeze until its merge, or 1
	InUse  bool   // a process has it open
}

// ReadOverlay reads what an overlay directory says without its base and without its lock.
// Of an overlay that is in use it counts the changes at this moment, and otherwise those
// that a loss of power has left or would leave.
func ReadOverlay(fsys FS, dir string) (info OverlayInfo, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read overlay %s: %w", dir, err)
		}
	}()
	h, err := readOverlayHeader(fsys, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return info, fmt.Errorf("it is not the directory of an overlay: %w", err)
	}
	if err != nil {
		return info, err
	}
	info = OverlayInfo{Image: h.image, Digest: h.digest, Size: h.size}
	l, err := fsys.Lock(filepath.Join(dir, lockName))
	if info.InUse = errors.Is(err, ErrLocked); !info.InUse {
		if err != nil {
			return info, err
		}
		if err := l.Close(); err != nil {
			return info, err
		}
	}
	s := &layers{size: h.size}
	for i, suffix := range []string{"", upperSuffix} {
		lv, space, err := readLevel(fsys, dir, suffix, &h, info.InUse)
		if i > 0 && errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return info, err
		}
		s.top, s.low = lv, s.top
		info.Levels++
		info.Space += space
	}
	info.Data, info.Zero = s.count()
	return info, nil
}

// readLevel reads the map of a level, and the space that the level takes.
func readLevel(fsys FS, dir, suffix string, h *overlayHeader, live bool) (lv *level, space int64, err error) {
	blocks := uint32(h.size / BlockSize)
	for _, name := range []string{mapName, liveName, dataName} {
		f, err := fsys.Open(filepath.Join(dir, name+suffix), false)
		if name == liveName && errors.Is(err, fs.ErrNotExist) {
			continue // a copy need not have it
		}
		if err != nil {
			return nil, 0, err
		}
		_, n, err := f.Stat()
		if err := cmp.Or(err, f.Close()); err != nil {
			return nil, 0, err
		}
		space += n
	}
	name := mapName
	if live {
		name = liveName
	}
	// Only now: a level that is being made has no map yet, and a live copy without a header.
	_, changes, err := loadMap(fsys, filepath.Join(dir, name+suffix), h.digest, blocks)
	if err != nil {
		return nil, 0, err
	}
	return &level{m: &changeMap{blocks: blocks, live: changes}}, space, nil
}

// count counts the changed blocks, in bytes.
func (s *layers) count() (data, zero int64) {
	for p := range s.parts(Range(0, s.size)) {
		switch p.st {
		case stateData, stateLost:
			data += p.Len()
		case stateZero:
			zero += p.Len()
		}
	}
	return data, zero
}
