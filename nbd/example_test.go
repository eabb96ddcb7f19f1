package nbd_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"thaw/blockmap"
	"thaw/nbd"
)

// zeros is a minimal device.
type zeros int64

func (z zeros) Size() int64 { return int64(z) }

func (z zeros) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	v.AppendZeros(e.Len())
	return v, true
}

func (z zeros) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return z.View(e)
}

func (z zeros) Fault(context.Context, blockmap.Extent) error { return nil }
func (z zeros) Prefetch(blockmap.Extent)                     {}
func (z zeros) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Zero: true, Resident: true}
}

// A device under the name "empty" on a unix socket. A client would run:
//
//	nbdinfo 'nbd+unix:///empty?socket=DIR/sock'
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	l, err := nbd.Listen(ctx, "unix:"+filepath.Join(dir, "sock"))
	if err != nil {
		log.Fatal(err)
	}
	srv := &nbd.Server{Exports: nbd.Static{{Name: "empty", Device: zeros(1 << 30)}}}
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()

	// Later, in a signal handler: answer the requests in flight, for a few seconds at
	// most.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		log.Print(err)
	}
	fmt.Println(<-done)
	// Output: nbd: server closed
}
