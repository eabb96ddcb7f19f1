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
	device string // file with the same bytes, for the peers
	offset int64  // of the content on the device

	group *bench.Cgroup // of the thaw that is being started; nil for none
}

// prepare builds an image with one large file of random bytes, copies its device
// to a file, and fills thaw's cache with it.
func (b *benchmark) prepare(ctx context.Context) error {
	src := filepath.Join(b.dir, "src")
	b.image = "oci:" + filepath.Join(b.dir, "dst") + ":bench"
	b.device = filepath.Join(b.dir, "device")
	size := int64(b.sizeMiB) << 20
	if _, err := os.Stat(b.device); err != nil {
		if err := bench.RandomImage(src, size); err != nil {
			return err
		}
		if _, err := bench.Run(exec.CommandContext(ctx, b.thaw, "build", "--level", "1", "--size", strconv.FormatInt(size+size/4+64<<20, 10), "oci:"+src+":src", b.image)); err != nil {
			return err
		}
		s, err := b.startThaw("thaw", "unix", b.cache())
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

func stopAll(servers []*bench.NBDServer) error {
	var errs []error
	for _, s := range servers {
		errs = append(errs, s.Stop())
	}
	return errors.Join(errs...)
}

// start starts all servers of a row.
func (b *benchmark) start(ctx context.Context, transport string, delayed bool) (servers []*bench.NBDServer, err error) {
	add := func(name string, command func(p bench.Place) []string) {
		if err != nil {
			return
		}
		var s *bench.NBDServer
		if s, err = bench.LaunchNBD(name, transport, nil, command); err == nil {
			servers = append(servers, s)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	nbdkit := func(plugin ...string) func(p bench.Place) []string {
		return func(p bench.Place) []string {
			at := []string{"nbdkit", "-f", "-r", "--unix", p.Sock}
			if transport == "tcp" {
				at = []string{"nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", p.Port}
			}
			return append(at, plugin...)
		}
	}
	if delayed {
		add("thaw", func(p bench.Place) []string {
			return []string{self, serveVerb, "delayed", p.Listen(transport), b.device}
		})
		add("nbdkit-file", nbdkit("--filter=delay", "file", b.device, "rdelay=5ms"))
		add("go-nbd", func(p bench.Place) []string {
			return []string{self, serveVerb, "go-nbd-delayed", p.Listen(transport), b.device}
		})
		return servers, err
	}
	s, err := b.startThaw("thaw", transport, b.cache())
	if err != nil {
		return nil, err
	}
	servers = append(servers, s)
	// Its cache may not be in memory any more.
	if _, err := bench.Run(exec.CommandContext(ctx, "nbdcopy", s.URI, "null:")); err != nil {
		return nil, errors.Join(err, stopAll(servers))
	}
	if b.record {
		if s, err = b.startRecording(ctx, transport); err != nil {
			return nil, errors.Join(err, stopAll(servers))
		}
		servers = append(servers, s)
	}
	add("nbdkit-file", nbdkit("file", b.device))
	add("nbdkit-memory", func(p bench.Place) []string {
		// Not -r: the plugin starts empty, and is filled below.
		at := []string{"nbdkit", "-f", "--unix", p.Sock}
		if transport == "tcp" {
			at = []string{"nbdkit", "-f", "-i", "127.0.0.1", "-p", p.Port}
		}
		fi, err := os.Stat(b.device)
		if err != nil {
			return nil
		}
		return append(at, "memory", strconv.FormatInt(fi.Size(), 10))
	})
	if err == nil {
		_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", b.device, servers[len(servers)-1].URI))
	}
	add("qemu-nbd", func(p bench.Place) []string {
		at := []string{"qemu-nbd", "-r", "-f", "raw", "--aio=io_uring", "-t", "-e", "16", "-k", p.Sock}
		if transport == "tcp" {
			at = []string{"qemu-nbd", "-r", "-f", "raw", "--aio=io_uring", "-t", "-e", "16", "-b", "127.0.0.1", "-p", p.Port}
		}
		return append(at, b.device)
	})
	add("go-nbd", func(p bench.Place) []string {
		return []string{self, serveVerb, "go-nbd", p.Listen(transport), b.device}
	})
	return servers, err
}

func (b *benchmark) cache() string { return filepath.Join(b.dir, "cache") }

// recording is the name of a thaw that records a start throughout.
const recording = "thaw-recording"

// startRecording starts a thaw that records, on a copy of the cache, because a
// cache belongs to one process.
func (b *benchmark) startRecording(ctx context.Context, transport string) (*bench.NBDServer, error) {
	cache := b.cache() + "-recording"
	if _, err := os.Stat(cache); errors.Is(err, os.ErrNotExist) {
		if _, err := bench.Run(exec.CommandContext(ctx, "cp", "-a", "--sparse=always", b.cache(), cache)); err != nil {
			return nil, err
		}
	}
	return b.startThaw(recording, transport, cache, "--record", filepath.Join(b.dir, "trace"), "--record-for", "1h", "--record-quiet", "1h")
}

// startThaw starts thaw on a cache that has everything.
func (b *benchmark) startThaw(name, transport, cache string, args ...string) (*bench.NBDServer, error) {
	return bench.LaunchThaw(name, transport, b.group, b.thaw, b.image, cache, args...)
}

// startMixed starts a server with a part that takes 5 ms per read.
func (b *benchmark) startMixed(context.Context) (*bench.NBDServer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return bench.LaunchNBD("thaw", "unix", nil, func(p bench.Place) []string {
		return []string{self, serveVerb, "mixed", p.Listen("unix"), b.device}
	})
}
