package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// disk is a separate file system that can fill up.
type disk struct{ at, device, filler string }

func newDisk(file, at string, size int64) (*disk, error) {
	ctx := context.Background()
	if err := errors.Join(os.Mkdir(at, 0o700), os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		return nil, err
	}
	if err := command(ctx, "mkfs.ext4", "-q", "-m", "0", file); err != nil {
		return nil, err
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		return nil, fmt.Errorf("losetup: %w", err)
	}
	d := &disk{at: at, device: strings.TrimSpace(string(out)), filler: filepath.Join(at, "filler")}
	if err := command(ctx, "mount", d.device, at); err != nil {
		return nil, errors.Join(err, command(ctx, "losetup", "--detach", d.device))
	}
	return d, nil
}

func (d *disk) close() error {
	ctx := context.Background()
	return errors.Join(command(ctx, "umount", d.at), command(ctx, "losetup", "--detach", d.device))
}

// crowd fills the disk with another file, and removes that again.
func (d *disk) crowd(ctx context.Context, rng *rand.Rand, t *tally) {
	wait := func(most int) {
		select {
		case <-time.After(time.Duration(1000+rng.IntN(most)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	for ctx.Err() == nil {
		wait(8000)
		if f, err := os.OpenFile(d.filler, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err == nil {
			b := make([]byte, 1<<20)
			for err == nil && ctx.Err() == nil {
				_, err = f.Write(b)
			}
			f.Close()
			t.fills.Add(1)
		}
		wait(5000)
		d.empty()
	}
}

func (d *disk) empty() { os.Remove(d.filler) }

// damage truncates files of the cache.
func (d *disk) damage(ctx context.Context, rng *rand.Rand, cache string, t *tally) {
	for {
		select {
		case <-time.After(time.Duration(500+rng.IntN(4000)) * time.Millisecond):
		case <-ctx.Done():
			return
		}
		files, _ := filepath.Glob(filepath.Join(cache, "streams/*/data"))
		if len(files) == 0 {
			continue
		}
		path := files[rng.IntN(len(files))]
		if fi, err := os.Stat(path); err == nil && fi.Size() > 0 && os.Truncate(path, rng.Int64N(fi.Size())) == nil {
			t.truncations.Add(1)
		}
	}
}

// used returns the disk space of a directory.
func (d *disk) used(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	return n, err
}
