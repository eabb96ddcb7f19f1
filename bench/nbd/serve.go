package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/edsrzf/mmap-go"
	"github.com/pojntfx/go-nbd/pkg/backend"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
)

// serveVerb is the argument that makes this program one of the servers.
const serveVerb = "serve"

const (
	delay = 5 * time.Millisecond

	// The device "mixed" answers reads below mixedHits at once. The mixedMisses
	// bytes after them take the delay.
	mixedHits   = 64 << 20
	mixedMisses = 8 << 20
)

// serveMain runs a server until SIGTERM. Its arguments are KIND LISTEN FILE.
func serveMain(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("usage: %s KIND LISTEN FILE", serveVerb)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	l, err := nbd.Listen(ctx, args[1])
	if err != nil {
		return err
	}
	f, err := os.Open(args[2])
	if err != nil {
		return err
	}
	defer f.Close()
	switch args[0] {
	case "go-nbd":
		return serveGoNBD(ctx, l, backend.NewFileBackend(f))
	case "go-nbd-delayed":
		return serveGoNBD(ctx, l, slowBackend{backend.NewFileBackend(f)})
	case "delayed", "mixed":
		d := &slowDevice{}
		if args[0] == "mixed" {
			d.fast = mixedHits
		}
		if d.m, err = mmap.Map(f, mmap.RDONLY, 0); err != nil {
			return err
		}
		d.came = make([]atomic.Int32, d.Size()/blockmap.BlockSize)
		s := &nbd.Server{Exports: nbd.Static{{Device: d, ReadOnly: true}}}
		context.AfterFunc(ctx, func() { s.Close() })
		if err := s.Serve(l); ctx.Err() == nil {
			return err
		}
		return nil
	}
	return fmt.Errorf("unknown kind of server: %q", args[0])
}

func serveGoNBD(ctx context.Context, l net.Listener, b backend.Backend) error {
	context.AfterFunc(ctx, func() { l.Close() })
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			// An error means that the client has disconnected.
			_ = gonbd.Handle(c, []*gonbd.Export{{Backend: b}}, &gonbd.Options{ReadOnly: true, SupportsMultiConn: true})
		}()
	}
}

// slowBackend takes 5 ms per read.
type slowBackend struct{ backend.Backend }

func (b slowBackend) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(delay)
	return b.Backend.ReadAt(p, off)
}

// slowDevice has nothing resident from fast on: each read of that waits 5 ms,
// whatever was read before.
type slowDevice struct {
	m    mmap.MMap
	fast int64
	came []atomic.Int32 // by first block: faults that no View has taken up yet
}

func (d *slowDevice) Size() int64 { return int64(len(d.m)) &^ (blockmap.BlockSize - 1) }

func (d *slowDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil {
		return v, false
	}
	if e.End > d.fast && !d.take(e) {
		return v, false
	}
	v.Append(d.m[e.Start:e.End], nil, 0)
	return v, true
}

func (d *slowDevice) take(e blockmap.Extent) bool {
	c := &d.came[e.Start/blockmap.BlockSize]
	for n := c.Load(); n > 0; n = c.Load() {
		if c.CompareAndSwap(n, n-1) {
			return true
		}
	}
	return false
}

func (d *slowDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}

func (d *slowDevice) Fault(ctx context.Context, e blockmap.Extent) error {
	// Not a timer: those of the Go runtime are late by up to a millisecond,
	// which would be a fifth of what is measured.
	for left := unix.NsecToTimespec(int64(delay)); unix.Nanosleep(&left, &left) == unix.EINTR; {
	}
	d.came[e.Start/blockmap.BlockSize].Add(1)
	return ctx.Err()
}

// Status says nothing of what has come: all is data to be fetched, but for the fast part.
func (d *slowDevice) Status(e blockmap.Extent) blockmap.Status {
	resident := e.Start < d.fast
	if resident {
		e.End = min(e.End, d.fast)
	}
	return blockmap.Status{Extent: e, Resident: resident}
}

// Prefetch does nothing: each read is to wait.
func (d *slowDevice) Prefetch(blockmap.Extent) {}
