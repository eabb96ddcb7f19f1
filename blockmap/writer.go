package blockmap

import (
	"errors"
	"sync"
)

// fileWriter writes whole files, and makes them durable later: the start of a
// device does not wait for the disk.
type fileWriter struct {
	fs FS

	// writing is held across the writing of a file: two exports of an image keep
	// the same index, and a file has a temporary name until it is whole.
	writing sync.Mutex

	mu struct {
		sync.Mutex
		unsynced map[string]struct{} // paths
	}
}

// put puts b at path, in place of what was there. The next sync makes that
// durable.
func (w *fileWriter) put(path string, b []byte) error {
	w.writing.Lock()
	err := writeFile(w.fs, path, b)
	w.writing.Unlock()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.unsynced == nil {
		w.mu.unsynced = make(map[string]struct{})
	}
	w.mu.unsynced[path] = struct{}{}
	return nil
}

// sync makes durable what was put before it was called.
func (w *fileWriter) sync() (err error) {
	w.mu.Lock()
	unsynced := w.mu.unsynced
	w.mu.unsynced = nil
	w.mu.Unlock()
	for path := range unsynced {
		err = errors.Join(err, syncFile(w.fs, path))
	}
	return err
}
