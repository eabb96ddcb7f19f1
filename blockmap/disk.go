package blockmap

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// disk is the directory of a cache: where it lies, how many bytes it may take, and
// how many it takes. It has no lock. Streams, small files and the evictor each know
// the disk that they are on.
type disk struct {
	dir   string
	fs    FS
	boot  BootID
	quota int64 // 0: only the disk itself bounds the cache
	// direct says that the content of streams is read and written without the page
	// cache.
	direct bool
	log    *slog.Logger

	// used counts the space that the directory takes, in bytes: of a stream its
	// data as allocated, its table, its map and its directory; small files,
	// names and roots in whole blocks; and what is just being written.
	used atomic.Int64

	dropped atomic.Int64 // damaged streams and small files that were removed
	damaged atomic.Int64 // chunks that could not be read
}

// over is how many bytes the directory takes beyond its quota, 0 if none.
func (d *disk) over() int64 {
	return d.lacks(0)
}

// lacks is how many bytes the quota has too few for n more, 0 if none.
func (d *disk) lacks(n int64) int64 {
	if d.quota == 0 {
		return 0
	}
	return max(0, d.used.Load()+n-d.quota)
}

// take counts n more bytes as used, if the quota has room for them.
func (d *disk) take(n int64) bool {
	for {
		used := d.used.Load()
		if d.quota != 0 && used+n > d.quota {
			return false
		}
		if d.used.CompareAndSwap(used, used+n) {
			return true
		}
	}
}

// drop reports that a part of the cache was damaged, and is removed. kind is
// "stream", "blob" or "root".
func (d *disk) drop(kind, id string, err error) {
	d.log.Warn("removed a damaged part of the cache; it will be fetched again", kind, id, "err", err)
	d.dropped.Add(1)
}

func (d *disk) path(names ...string) string {
	return filepath.Join(append([]string{d.dir}, names...)...)
}

// makeDirs makes the directory and those within it. It refuses a directory that
// another user could write to.
func (d *disk) makeDirs(within ...string) error {
	if err := d.makeDir(d.dir); err != nil {
		return err
	}
	if err := d.fs.Private(d.dir); err != nil {
		return err
	}
	for _, name := range within {
		if err := d.makeDir(d.path(name)); err != nil {
			return err
		}
	}
	return nil
}

func (d *disk) makeDir(path string) error {
	err := d.fs.MkdirAll(path)
	var at *fs.PathError
	if errors.As(err, &at) && (errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EEXIST)) {
		return fmt.Errorf("%s is not a directory: remove it, or choose another cache directory: %w", at.Path, err)
	}
	return err
}

// allocated is the space that a file of n bytes takes: whole blocks.
func allocated(n int64) int64 { return (n + BlockSize - 1) &^ (BlockSize - 1) }

func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
