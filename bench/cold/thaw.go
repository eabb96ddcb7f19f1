package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"thaw/bench"
)

// starter is the way of a row from nothing to the answer.
type starter func(context.Context, *benchmark, *site, string, *clock) ([]bench.Measure, error)

// mounter mounts what a server serves below dir.
type mounter func(ctx context.Context, s *bench.Server, dir string, readAhead int) (*bench.Root, error)

// byNode mounts as a user does, by thaw mount. The driver fuse is the one that every
// kernel has.
func byNode(ctx context.Context, s *bench.Server, dir string, readAhead int) (*bench.Root, error) {
	return bench.MountNode(ctx, s, "fuse", dir, readAhead)
}

// byNBDFUSE mounts the export by nbdfuse and a loop device.
func byNBDFUSE(ctx context.Context, s *bench.Server, dir string, readAhead int) (*bench.Root, error) {
	return bench.Mount(ctx, s.Socket, dir, readAhead)
}

// startThaw serves one of the image's names on an empty cache.
func startThaw(mount mounter, name string, args ...string) starter {
	return func(ctx context.Context, b *benchmark, s *site, dir string, c *clock) ([]bench.Measure, error) {
		args := append(strings.Fields(b.thawArgs), args...)
		return b.serveAndRun(ctx, s.prepared, mount, s.at(s.wires.registry.Addr().String(), name), dir, s.load, c, args...)
	}
}

// startResident serves from a cache that has everything that the start reads, and
// whose files are in memory. It does not use the link.
func startResident(mount mounter) starter {
	return func(ctx context.Context, b *benchmark, s *site, _ string, c *clock) ([]bench.Measure, error) {
		if err := readData(s.resident); err != nil {
			return nil, err
		}
		return b.serveAndRun(ctx, s.prepared, mount, s.direct(traceName), s.resident, s.load, c, strings.Fields(b.thawArgs)...)
	}
}

// serveAndRun serves an image with its cache in dir, mounts it, and runs a load.
func (b *benchmark) serveAndRun(ctx context.Context, p *prepared, mount mounter, ref, dir string, l load, c *clock, args ...string) (ms []bench.Measure, err error) {
	c.start()
	server, err := bench.Serve(ctx, b.thaw, ref, dir, args...)
	if err != nil {
		return nil, err
	}
	defer func() {
		server.Kill()
		if err != nil {
			err = fmt.Errorf("%w%s", err, server.Said())
		}
	}()
	c.mark(ready)
	root, err := mount(ctx, server, dir, b.readAhead)
	if err != nil {
		return nil, err
	}
	c.mark(mounted)
	ms, err = p.answer(ctx, root, l, c)
	err = errors.Join(err, root.Close())
	for _, name := range []string{"root", "nbd"} { // where it was mounted; another round may use dir again
		if e := os.Remove(filepath.Join(dir, name)); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return nil, err
	}
	served, err := server.Stop()
	if err != nil {
		return nil, err
	}
	if served.WrongChunks+served.FailedChunks > 0 {
		return nil, fmt.Errorf("%d chunks arrived damaged, and %d could not be fetched", served.WrongChunks, served.FailedChunks)
	}
	return append(ms, bench.Measure{Value: float64(served.Usage.User + served.Usage.Sys), Unit: "serve-cpu-ns"}), nil
}

// readData reads the data of the files of a directory into the page cache, and
// skips their holes.
func readData(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for at := int64(0); ; {
			from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return nil // no more data
			}
			if err != nil {
				return err
			}
			if at, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil {
				return err
			}
			if _, err := io.Copy(io.Discard, io.NewSectionReader(f, from, at-from)); err != nil {
				return err
			}
		}
	})
}
