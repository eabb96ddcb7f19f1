package blockmap

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// RemoveOverlay removes the overlay in dir, and dir. It fails with ErrLocked where a
// process has the overlay, and changes nothing if dir is not the directory of an overlay.
// Files that are none of an overlay stay, and so does dir then, which is an error.
func RemoveOverlay(fsys FS, dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("remove overlay %s: %w", dir, err)
		}
	}()
	if _, err := readOverlayHeader(fsys, dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it is not the directory of an overlay: %w", err)
	}
	// An overlay whose header is damaged can only be removed.
	lock, err := lockOverlay(fsys, filepath.Join(dir, lockName))
	if err != nil {
		return err
	}
	defer lock.Close()
	// The maps go first: without one there are no changes. The header tells to the last
	// what the directory is.
	var names []string
	for _, name := range []string{mapName, liveName, dataName} {
		names = append(names, name+upperSuffix, name+upperSuffix+newSuffix, name, name+newSuffix)
	}
	names = append(names, headerName+newSuffix, headerName, lockName)
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := fsys.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for _, e := range entries {
		if !slices.Contains(names, e.Name()) {
			return fmt.Errorf("its files are removed, but the directory has others, such as %s", e.Name())
		}
	}
	return fsys.RemoveAll(dir)
}
