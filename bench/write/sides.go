package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"thaw/bench"
)

type benchmark struct {
	options
	rec *bench.Recorder

	image  string // the block image
	device string // file with the same bytes, below the peers' copies
	plain  string // a copy of it that is written to
	offset int64  // of the content on the device
}

// prepare builds an image with one large file of random bytes, fills thaw's cache with it,
// and copies its device to two files.
func (b *benchmark) prepare(ctx context.Context) error {
	src := filepath.Join(b.dir, "src")
	b.image = "oci:" + filepath.Join(b.dir, "dst") + ":bench"
	b.device, b.plain = filepath.Join(b.dir, "device"), filepath.Join(b.dir, "plain")
	size := int64(b.sizeMiB) << 20
	if _, err := os.Stat(b.device); err != nil {
		if err := bench.RandomImage(src, size); err != nil {
			return err
		}
		if _, err := bench.Run(exec.CommandContext(ctx, b.thaw, "build", "--level", "1", "--size", strconv.FormatInt(size+size/4+64<<20, 10), "oci:"+src+":src", b.image)); err != nil {
			return err
		}
		s, err := bench.LaunchThaw("thaw", "unix", nil, b.thaw, b.image, b.cache())
		if err != nil {
			return err
		}
		_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", s.URI, b.device+".new"))
		if err := errors.Join(err, s.Stop(), os.RemoveAll(src)); err != nil {
			return err
		}
		if err := os.Rename(b.device+".new", b.device); err != nil {
			return err
		}
	}
	if _, err := bench.Run(exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=never", b.device, b.plain)); err != nil {
		return err
	}
	// The content is the last part of the device that is not a hole.
	f, err := os.Open(b.device)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := bench.LastData(f)
	if err != nil {
		return err
	}
	b.offset = end - size
	// Read it into the page cache, for all servers.
	_, err = io.Copy(io.Discard, f)
	return err
}

func (b *benchmark) cache() string { return filepath.Join(b.dir, "cache") }

// side is what is measured.
type side struct {
	name  string
	title string
	// start starts the server; nil where fio writes to the plain file. scratch is an
	// empty directory for what is written.
	start func(ctx context.Context, b *benchmark, scratch string) (*bench.NBDServer, error)
}

var sides = []side{
	{"thaw", "thaw", startOverlay},
	{"thaw-ephemeral", "thaw --ephemeral", startEphemeral},
	{"nbdkit-cow", "nbdkit cow", startCow},
	{"qemu-nbd-qcow2", "qemu-nbd qcow2", startQcow2},
	{"nbdkit-file", "nbdkit file", startFile},
	{"file", "fio on the file", nil},
}

// firstSides are those whose first and second writes are compared: thaw, and the file.
var firstSides = []side{sides[0], sides[1], sides[len(sides)-1]}

func startOverlay(ctx context.Context, b *benchmark, scratch string) (*bench.NBDServer, error) {
	return b.startThaw(ctx, "--overlay", filepath.Join(scratch, "overlay"))
}

func startEphemeral(ctx context.Context, b *benchmark, _ string) (*bench.NBDServer, error) {
	return b.startThaw(ctx, "--ephemeral")
}

// startThaw starts thaw on a cache that has everything, and reads that into memory.
func (b *benchmark) startThaw(ctx context.Context, args ...string) (*bench.NBDServer, error) {
	s, err := bench.LaunchThaw("thaw", "unix", nil, b.thaw, b.image, b.cache(), args...)
	if err != nil {
		return nil, err
	}
	_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", s.URI, "null:"))
	if err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return s, nil
}

func startCow(_ context.Context, b *benchmark, scratch string) (*bench.NBDServer, error) {
	return bench.LaunchNBD("nbdkit-cow", "unix", []string{"TMPDIR=" + scratch}, func(p bench.Place) []string {
		return []string{"nbdkit", "-f", "--unix", p.Sock, "--filter=cow", "file", b.device}
	})
}

func startQcow2(ctx context.Context, b *benchmark, scratch string) (*bench.NBDServer, error) {
	over := filepath.Join(scratch, "over.qcow2")
	if _, err := bench.Run(exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", b.device, "-F", "raw", over)); err != nil {
		return nil, err
	}
	return bench.LaunchNBD("qemu-nbd-qcow2", "unix", nil, func(p bench.Place) []string {
		return []string{"qemu-nbd", "-f", "qcow2", "--cache=writeback", "--aio=io_uring", "--discard=unmap", "-t", "-e", "16", "-k", p.Sock, over}
	})
}

func startFile(_ context.Context, b *benchmark, _ string) (*bench.NBDServer, error) {
	return bench.LaunchNBD("nbdkit-file", "unix", nil, func(p bench.Place) []string {
		return []string{"nbdkit", "-f", "--unix", p.Sock, "file", b.plain}
	})
}

// instance is a side that has been started.
type instance struct {
	server  *bench.NBDServer // nil: the plain file
	plain   string
	scratch string
}

func (b *benchmark) start(ctx context.Context, s side) (*instance, error) {
	scratch, err := os.MkdirTemp(b.dir, "scratch")
	if err != nil {
		return nil, err
	}
	x := &instance{plain: b.plain, scratch: scratch}
	if s.start != nil {
		if x.server, err = s.start(ctx, b, scratch); err != nil {
			return nil, errors.Join(err, os.RemoveAll(scratch))
		}
	}
	return x, nil
}

func (x *instance) stop() error {
	var err error
	if x.server != nil {
		err = x.server.Stop()
	}
	return errors.Join(err, os.RemoveAll(x.scratch))
}

// fio runs a job. On the plain file it writes by pwrite, at depth 1: an ordinary program.
func (x *instance) fio(ctx context.Context, j bench.FioJob) (*bench.FioResult, error) {
	if x.server != nil {
		return x.server.Fio(ctx, j)
	}
	return bench.Fio(ctx, append(j.Args(), "--ioengine=psync", "--filename="+x.plain)...)
}
