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

// recordFile is what a recording is written to: a temporary file beside the one
// that it is to become, ".NAME.tmp-RANDOM", so that an earlier recording is there
// until the new one is whole. The process that records holds a lock on it.
//
// A process that was killed leaves its temporary file. The next one to record to
// NAME, or to use the directory, makes it NAME.interrupted if it is a trace that
// can be read, and else removes it.
//
// A target that is not a regular file, such as a FIFO, is written to as it comes.
type recordFile struct {
	*os.File
	target string
	direct bool // File is the target
}

const recordTemp = ".tmp-"

// createRecord makes the file of a recording that is to become target.
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
		// As if it was written over: the same permissions, and ours to write.
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

// recordTarget follows symbolic links, so that the file is replaced and not a link
// to it. The mode is zero where there is no file yet.
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
			// Whatever /dev/stdout is, it is open already, and not ours to replace.
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

// openDirect opens a FIFO, a device, a pipe. Nothing waits for whoever reads it:
// a FIFO that nobody has open is refused, and writes have deadlines.
func openDirect(path string) (*recordFile, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("record to %s: nothing reads it; start its reader first", path)
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return &recordFile{File: f, target: path, direct: true}, nil
}

// keep makes the recording its target, durably.
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

// exists says whether there is an earlier recording.
func (r *recordFile) exists() bool {
	_, err := os.Lstat(r.target)
	return err == nil
}

// discard leaves everything as it was.
func (r *recordFile) discard() {
	if !r.direct {
		os.Remove(r.Name())
	}
	r.Close()
}

// interrupted keeps what there is of a recording that failed, beside the target,
// and says where: "" if it is of no use.
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

// recoverRecords cleans up behind processes that recorded to files in dir, or to
// the one of that name, and were killed. It fails where one of them lives.
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
			log.Warn("an earlier recording was interrupted; what there is of it is kept", "file", kept)
		}
	}
	return nil
}

// lockDir keeps others, for a moment, from looking for recordings in dir while one
// is begun. Without the lock the worst is that both are refused.
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

// keptRecords is how many recordings stay in the cache directory, the last ones.
const keptRecords = 32

// recordDir is where recordings go that have no file of their own.
type recordDir struct{ cache string }

func (d recordDir) path() string { return filepath.Join(d.cache, "traces") }

// create makes the file of a recording of an image: in the cache, or else where
// temporary files go.
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

// recover cleans up behind a process that was killed.
func (d recordDir) recover(log *slog.Logger) {
	if err := recoverRecords(d.path(), "", log); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("recordings in the cache cannot be looked at", "err", err)
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
