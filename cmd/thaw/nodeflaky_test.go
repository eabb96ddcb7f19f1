//go:build guest

package main

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"thaw/blockmap/blocktest"
)

// flakyDisk is a disk of the virtual machine that scripts/guest-nodes boots.
var flakyDisk = flag.String("flaky", "", "disk with an ext4 filesystem, which is made to fail")

// The disk of an overlay begins to refuse writes, or to lose them without a word, under a
// mounted filesystem. When it works again, the filesystem is mounted again and has all that
// was durable before.
func TestNodeFlakyDisk(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 230))
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		for _, feature := range []string{"error_writes", "drop_writes"} {
			dir := t.TempDir()
			dm := blocktest.NewDM(t, "flaky-"+driver, "flakey", *flakyDisk, "0 3600 0")
			unmount := blocktest.MountDisk(t, dm.Path, dir)
			more := []string{"--driver", driver, "--overlay", filepath.Join(dir, driver+feature)}
			b.mount(more...)
			durable := make(map[string][]byte)
			after := 10 + rng.IntN(20) // files
			var err error
			for i := 0; i < after+60 && err == nil; i++ {
				if i == after {
					if err := dm.Become("flakey", *flakyDisk+" 0 0 3600 1 "+feature); err != nil {
						t.Fatal(err)
					}
				}
				p := random(rng.Uint64(), 1+rng.IntN(80<<10))
				name := fmt.Sprint(feature, i)
				var f *os.File
				if f, err = os.Create(filepath.Join(b.dir, name)); err == nil {
					_, err = f.Write(p)
					err = errors.Join(err, f.Sync(), f.Close())
				}
				if err == nil && i < after {
					durable[name] = p
				}
			}
			switch {
			case len(durable) != after:
				t.Errorf("the load ends before the disk fails: %v", err)
			case feature == "error_writes" && !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS):
				t.Errorf("on a disk that refuses writes, a writer sees %v", err)
			}
			b.giveUp()
			unmount() // which loses what the kernel has not written
			dm.Remove()

			unmount = blocktest.MountDisk(t, *flakyDisk, dir)
			began := time.Now()
			b.check(true, more...)
			b.mount(more...)
			b.has(durable)
			b.must("umount", b.dir)
			b.untilServerEnds()
			unmount()
			t.Logf("%s after %d files: %v; in order again within %v", feature, after, err, time.Since(began).Round(time.Millisecond))
			if t.Failed() {
				return
			}
		}
	})
}
