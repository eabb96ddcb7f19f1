package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
	"thaw/blockmap"
	"thaw/nbd"
	"thaw/nbd/vhost"
)

// serveVerb is the argument that makes this program a backend.
const serveVerb = "serve"

// serveMain serves files until SIGTERM: NAME=FILE[,DELAY]... --dir DIR. The export of each name
// is served on the sockets DIR/NAME.sock (vhost-user-blk) and DIR/NAME.nbd (NBD). DELAY is
// what each read and write takes.
func serveMain(args []string) (err error) {
	var files []string
	for len(args) > 0 && strings.Contains(args[0], "=") && !strings.HasPrefix(args[0], "-") {
		files, args = append(files, args[0]), args[1:]
	}
	flags := flag.NewFlagSet(serveVerb, flag.ContinueOnError)
	dir := flags.String("dir", ".", "directory for the sockets")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if len(files) == 0 || flags.NArg() > 0 {
		return fmt.Errorf("usage: %s NAME=FILE[,DELAY]... [--dir DIR]", serveVerb)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var exports nbd.Static
	for _, f := range files {
		name, path, _ := strings.Cut(f, "=")
		path, delay, slow := strings.Cut(path, ",")
		file, err := bench.OpenFileDevice(path)
		if err != nil {
			return err
		}
		var dev blockmap.WritableDevice = file
		if slow {
			d, err := time.ParseDuration(delay)
			if err != nil {
				return err
			}
			dev = &slowDevice{file, d}
		}
		exports = append(exports, nbd.Export{Name: name, Device: dev})
	}
	vms := &vhost.Server{Exports: exports, Log: log}
	failed := make(chan error, 2*len(exports))
	left := 0
	var nbds []*nbd.Server
	defer func() {
		end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err = errors.Join(err, vms.Shutdown(end))
		for _, s := range nbds {
			err = errors.Join(err, s.Shutdown(end))
		}
		for range left {
			if e := <-failed; !errors.Is(e, vhost.ErrServerClosed) && !errors.Is(e, nbd.ErrServerClosed) {
				err = errors.Join(err, e)
			}
		}
	}()
	for _, e := range exports {
		sock, err := nbd.ListenPrivate(ctx, filepath.Join(*dir, e.Name+".sock"))
		if err != nil {
			return err
		}
		left++
		go func() { failed <- vms.Serve(sock, e.Name) }()
		l, err := nbd.ListenPrivate(ctx, filepath.Join(*dir, e.Name+".nbd"))
		if err != nil {
			return err
		}
		s := &nbd.Server{Exports: nbd.Static{e}, Log: log}
		nbds = append(nbds, s)
		left++
		go func() { failed <- s.Serve(l) }()
	}
	fmt.Println("ready")
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		left--
		return err
	}
}

// slowDevice is a file whose reads and writes take a while.
type slowDevice struct {
	*bench.FileDevice
	delay time.Duration
}

func (d *slowDevice) View(blockmap.Extent) (v blockmap.View, ok bool) { return v, false }

func (d *slowDevice) Load(ctx context.Context, e blockmap.Extent) (blockmap.View, bool) {
	time.Sleep(d.delay)
	return d.FileDevice.Load(ctx, e)
}

func (d *slowDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(d.delay)
	return d.FileDevice.WriteAt(ctx, p, off)
}
