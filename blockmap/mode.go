package blockmap

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/ncw/directio"
	"golang.org/x/sys/unix"
)

// Mode is how a Cache reads and writes the content of its streams.
type Mode string

const (
	// Buffered: through the kernel's page cache, which keeps in memory what is read
	// often. It is the default.
	Buffered Mode = "buffered"
	// Direct: by direct I/O, so that the cache takes no memory of the host. Each read
	// waits for the disk.
	Direct Mode = "direct"
)

// ParseMode reads a Mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Buffered, Direct:
		return m, nil
	}
	return "", fmt.Errorf("%q is not a cache mode: it must be %s or %s", s, Buffered, Direct)
}

// ErrNoDirect means that the file system of a cache cannot do direct I/O.
var ErrNoDirect = errors.New("the filesystem does not support direct I/O of 4 KiB blocks: use a cache directory on another filesystem, or the cache mode buffered")

// checkDirect writes and reads a block by direct I/O. A cache that were read through the
// page cache after all would take the memory that this mode is to leave to others, so
// there is no fallback.
func (d *disk) checkDirect() (err error) {
	path := d.path("direct-io-test")
	f, err := d.fs.Open(path, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), d.fs.RemoveAll(path)) }()
	x, err := d.fs.OpenDirect(path)
	if err == nil {
		defer func() { err = errors.Join(err, x.Close()) }()
		want, got := directio.AlignedBlock(BlockSize), directio.AlignedBlock(BlockSize)
		copy(want, guard())
		if _, err = x.WriteAt(want, BlockSize); err == nil {
			_, err = x.ReadAt(got, BlockSize)
		}
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("a block was not read as it was written")
		}
	}
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%w (%w)", ErrNoDirect, err)
	case diskFull(err):
		return nil // opening the streams will tell
	}
	return err
}
