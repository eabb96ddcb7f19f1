package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/edsrzf/mmap-go"

	"thaw/blockmap"
	"thaw/nbd"
	"thaw/nbd/attach"
)

// serveVerb is the argument that makes this program one of the servers: "attach DRIVER
// FILE", or "nbd SOCKET FILE".
const serveVerb = "serve"

// serveMain serves a file until SIGTERM. It prints the path of the node or socket.
func serveMain(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("usage: %s attach DRIVER FILE, or %s nbd SOCKET FILE", serveVerb, serveVerb)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	f, err := os.Open(args[2])
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := mmap.Map(f, mmap.RDONLY, 0)
	if err != nil {
		return err
	}
	dev := &device{m}
	if args[0] == "nbd" {
		l, err := nbd.Listen(ctx, "unix:"+args[1])
		if err != nil {
			return err
		}
		s := &nbd.Server{Exports: nbd.Static{{Device: dev, ReadOnly: true}}}
		context.AfterFunc(ctx, func() { s.Close() })
		fmt.Println(args[1])
		if err := s.Serve(l); ctx.Err() == nil {
			return err
		}
		return nil
	}
	n, err := attach.Attach(ctx, dev, attach.Options{Driver: attach.Driver(args[1])})
	if err != nil {
		return err
	}
	fmt.Println(n.Path)
	select {
	case <-ctx.Done():
	case <-n.Gone():
		return n.Wait()
	}
	return n.Detach(context.Background())
}

// device is the content of a mapped file, all of it in memory. Its views have a pin, as
// those of a cache have.
type device struct{ m mmap.MMap }

func (d *device) Size() int64 { return int64(len(d.m)) &^ (blockmap.BlockSize - 1) }

func (d *device) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil {
		return v, false
	}
	v.Append(d.m[e.Start:e.End], d, 0)
	return v, true
}

func (d *device) Unpin(uint64)        {}
func (d *device) Pinned(uint64) int64 { return 1 << 20 }
func (d *device) Damaged(uint64)      {}

func (d *device) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) { return d.View(e) }
func (d *device) Fault(_ context.Context, e blockmap.Extent) error                { return e.Check(d.Size()) }
func (d *device) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Resident: true}
}
func (d *device) Prefetch(blockmap.Extent) {}
