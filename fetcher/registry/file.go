package registry

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// errNotRegular says that a path is not a regular file.
var errNotRegular = errors.New("is not a regular file")

// openRegular opens a regular file for reading and returns its size. It opens nothing else:
// opening a FIFO waits for a writer, and opening a device can have any effect.
func openRegular(path string) (*os.File, int64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, 0, fileError(err)
	}
	if !fi.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s %w", path, errNotRegular)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fileError(err)
	}
	fi, err = f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s %w", path, errNotRegular)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// errTooLong says that a file is too long to be read.
var errTooLong = errors.New("is too long")

// readBounded reads a file of at most max bytes.
func readBounded(path string, max int64) ([]byte, error) {
	f, _, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > max {
		return nil, fmt.Errorf("%s %w: it has more than %d bytes", path, errTooLong, max)
	}
	return b, nil
}

// fileError makes the error of a missing file an ErrNotFound.
func fileError(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// writeTemp writes and syncs a new file in dir, and returns its path. If that fails, it
// removes the file.
func writeTemp(dir string, write func(*os.File) error) (string, error) {
	f, err := os.OpenFile(filepath.Join(dir, tempName()), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return "", err
	}
	err = write(f)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

func tempName() string { return ".tmp-" + rand.Text() }

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// sum computes a digest.
type sum struct{ hash.Hash }

func newSum() sum { return sum{sha256.New()} }

func (s sum) hash() v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s.Sum(nil))}
}

// hashFrom is a digest as registries have it.
func hashFrom(d blockmap.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.String()} }

func hashOf(b []byte) v1.Hash {
	s := newSum()
	s.Write(b)
	return s.hash()
}
