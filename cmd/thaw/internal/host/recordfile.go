package host

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"thaw/tracefile"
)

// recordFile is the file that a recording is written to: a temporary file beside its
// target, ".NAME.tmp-RANDOM", which is renamed to the target when it is complete. An
// earlier recording stays until then. The process that records holds a lock on the file.
//
// A process that was killed leaves its temporary file. The next process that records to
// NAME, or uses the directory, renames it to NAME.interrupted if it is a readable trace,
// and removes it otherwise.
//
// A target that is not a regular file, such as a FIFO, is written to directly.
type recordFile struct {
	*os.File
	target string
	direct bool // File is the target
}

const recordTemp = ".tmp-"

// createRecord makes the file of a recording with that target.
func createRecord(target string, log *slog.Logger) (*recordFile, error) {
	target, mode, err := recordTarget(target)
	switch {
	case err != nil:
		return nil, fmt.Errorf("record: %w", err)
	case mode.IsDir():
		return nil, fmt.Errorf("record to %s: it is a directory; name a file", target)
	case mode != 0 && !mode.IsRegular():
		return openDirect(target)
	}
	dir, name := filepath.Split(target)
	if dir == "" {
		dir = "."
	}
	unlock := lockDir(dir)
	defer unlock()
	if err := recoverRecords(dir, name, log); err != nil {
		return nil, fmt.Errorf("record to %s: %w", target, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "."+name+recordTemp+rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, fmt.Errorf("record to %s: %w", target, err)
	}
	r := &recordFile{File: f, target: target}
	if mode != 0 {
		// Like a program that overwrites the target: it must be writable, and its permissions
		// stay.
		var was *os.File
		if was, err = os.OpenFile(target, os.O_WRONLY, 0); err == nil {
			err = errors.Join(was.Close(), f.Chmod(mode.Perm()))
		}
	}
	if lockErr := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil && errors.Is(lockErr, unix.EWOULDBLOCK) {
		err = lockErr
	}
	if err != nil {
		r.discard()
		return nil, fmt.Errorf("record to %s: %w", target, err)
	}
	return r, nil
}

// recordTarget follows symbolic links, so that the file is replaced and not the link.
// The mode is zero if there is no file yet.
func recordTarget(path string) (string, fs.FileMode, error) {
	for range 40 {
		fi, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return path, 0, nil
		}
		if err != nil {
			return path, 0, err
		}
		if clean := filepath.Clean(path); strings.HasPrefix(clean, "/dev/") || strings.HasPrefix(clean, "/proc/") {
			// /dev/stdout and the like are open already, and must not be replaced.
			return path, fs.ModeDevice, nil
		}
		if fi.Mode().Type() != fs.ModeSymlink {
			return path, fi.Mode(), nil
		}
		to, err := os.Readlink(path)
		if err != nil {
			return path, 0, err
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = to
	}
	return path, 0, fmt.Errorf("%s: %w", path, unix.ELOOP)
}

// openDirect opens a FIFO, a device or a pipe. It refuses a FIFO without a reader,
// because opening it would block.
func openDirect(path string) (*recordFile, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("record to %s: nothing reads the FIFO; start its reader first", path)
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return &recordFile{File: f, target: path, direct: true}, nil
}

// keep renames the recording to its target, durably.
func (r *recordFile) keep() error {
	if r.direct {
		return r.Close()
	}
	err := r.Sync()
	if err == nil {
		err = os.Rename(r.Name(), r.target)
	}
	if err != nil {
		return errors.Join(err, r.Close())
	}
	if dir, openErr := os.Open(filepath.Dir(r.target)); openErr == nil {
		err = dir.Sync()
		dir.Close()
	}
	return errors.Join(err, r.Close())
}

// exists reports whether there is an earlier recording.
func (r *recordFile) exists() bool {
	_, err := os.Lstat(r.target)
	return err == nil
}

// discard removes the recording; its target stays as it was.
func (r *recordFile) discard() {
	if !r.direct {
		os.Remove(r.Name())
	}
	r.Close()
}

// interrupted keeps the readable part of a failed recording beside the target, and
// returns its path. It returns "" if no part is readable.
func (r *recordFile) interrupted() string {
	defer r.Close()
	if r.direct {
		return ""
	}
	return keepInterrupted(r.Name(), r.target)
}

func keepInterrupted(temp, target string) string {
	f, err := os.Open(temp)
	if err != nil {
		return ""
	}
	defer f.Close()
	if t, err := tracefile.Read(f); err == nil && len(t.Touches) > 0 && os.Rename(temp, target+".interrupted") == nil {
		return target + ".interrupted"
	}
	os.Remove(temp)
	return ""
}

// recoverRecords cleans up after killed processes that recorded to the file of that name
// in dir, or to any file there if name is empty. It fails if a live process records to
// the file of that name.
func recoverRecords(dir, name string, log *slog.Logger) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		hidden, isHidden := strings.CutPrefix(e.Name(), ".")
		of, _, isTemp := strings.Cut(hidden, recordTemp)
		if !isHidden || !isTemp || name != "" && of != name || !e.Type().IsRegular() {
			continue
		}
		temp, target := filepath.Join(dir, e.Name()), filepath.Join(dir, of)
		f, err := os.Open(temp)
		if err != nil {
			continue
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			if name == "" {
				continue
			}
			return errors.New("another server is recording to it; give this one a file of its own")
		}
		if kept := keepInterrupted(temp, target); kept != "" {
			log.Warn("an earlier recording was interrupted; thaw keeps the part that is there", "file", kept)
		}
	}
	return nil
}

// lockDir keeps other processes from calling recoverRecords on dir while a recording is
// begun. It waits for a second at most: without the lock two processes that begin at once
// may both be refused.
func lockDir(dir string) (unlock func()) {
	d, err := os.Open(dir)
	if err != nil {
		return func() {}
	}
	for end := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return func() { d.Close() }
		}
	}
}

// keptRecords is how many recordings stay in the cache directory; the newest stay.
const keptRecords = 32

// recordDir is the directory of recordings for which the user has named no file.
type recordDir struct{ cache string }

func (d recordDir) path() string { return filepath.Join(d.cache, "traces") }

// create makes the file of a recording of b in the cache directory, or among the
// temporary files if that fails.
func (d recordDir) create(b *BlockImage, log *slog.Logger) (*recordFile, error) {
	name := fmt.Sprintf("%s-%.12s.trace", time.Now().UTC().Format("20060102T150405.000000"), b.Digest.Hex)
	err := os.MkdirAll(d.path(), 0o700)
	if err == nil {
		var f *recordFile
		if f, err = createRecord(filepath.Join(d.path(), name), log); err == nil {
			return f, nil
		}
	}
	f, tempErr := createRecord(filepath.Join(os.TempDir(), name), log)
	if tempErr != nil {
		return nil, errors.Join(err, tempErr)
	}
	return f, nil
}

// recover cleans up after a process that was killed.
func (d recordDir) recover(log *slog.Logger) {
	if err := recoverRecords(d.path(), "", log); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("cannot clean up the recordings in the cache directory", "err", err)
	}
	d.prune()
}

// prune removes the oldest recordings.
func (d recordDir) prune() {
	entries, err := os.ReadDir(d.path()) // by name, which begins with the time
	if err != nil {
		return
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
		return strings.HasPrefix(e.Name(), ".") || !strings.Contains(e.Name(), ".trace")
	})
	for _, e := range entries[:max(0, len(entries)-keptRecords)] {
		os.Remove(filepath.Join(d.path(), e.Name()))
	}
}
