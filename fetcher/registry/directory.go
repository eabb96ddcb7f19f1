package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// directory is where the files of a layout are.
type directory string

func (d directory) path(name string) string { return filepath.Join(string(d), name) }

func (d directory) read(_ context.Context, name string, max int64) ([]byte, error) {
	return readBounded(d.path(name), max)
}

func (d directory) open(_ context.Context, name string, off, n int64, whole bool) (*Body, error) {
	f, size, err := openRegular(d.path(name))
	if err != nil {
		return nil, err
	}
	if err := within(f.Name(), size, off, n, whole); err != nil {
		f.Close()
		return nil, err
	}
	return &Body{rc: fileSection{io.NewSectionReader(f, off, n), f}, left: n}, nil
}

// within fails if a file does not have the range that is asked for.
func within(name string, size, off, n int64, whole bool) error {
	switch {
	case whole && size != n:
		return fmt.Errorf("%s has %d bytes, its descriptor says %d", name, size, n)
	case off < 0 || n < 0 || off > size || n > size-off:
		return fmt.Errorf("%s has %d bytes; asked for %d from byte %d", name, size, n, off)
	}
	return nil
}

type fileSection struct {
	io.Reader
	io.Closer
}

func (d directory) size(_ context.Context, name string) (int64, error) {
	fi, err := os.Stat(d.path(name))
	if err != nil {
		return 0, fileError(err)
	}
	if !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("%s %w", d.path(name), errNotRegular)
	}
	return fi.Size(), nil
}

func (d directory) absent(name string) error {
	switch fi, err := os.Stat(string(d)); {
	case err != nil:
		return fmt.Errorf("%w: there is no directory %s", ErrNotFound, string(d))
	case !fi.IsDir():
		return fmt.Errorf("%w: %s is not a directory; an archive is named oci-archive:FILE or docker-archive:FILE", ErrNotFound, string(d))
	}
	return fmt.Errorf("%w: %s is not an OCI layout: it has no file %s", ErrNotFound, string(d), name)
}

// create writes a file if there is none; it is no error if another process was quicker.
func create(path string, data []byte) error {
	tmp, err := writeTemp(filepath.Dir(path), func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, os.ErrExist) {
		// Not all filesystems support links.
		if err := os.Rename(tmp, path); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(path))
}
