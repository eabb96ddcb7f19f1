package attach

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// BenchmarkRead reads 4 KiB from anywhere of a node past the page cache, one after the
// other and 32 at a time, and 1 MiB. All is in memory. Beside the drivers stands what they
// are measured against: a loop device on the file that has the bytes.
func BenchmarkRead(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("nodes require root")
	}
	path := newFile(b)
	for _, name := range strings.Split(*driversFlag, ",") {
		b.Run(name, func(b *testing.B) {
			dev, err := openFile(path)
			if err != nil {
				b.Fatal(err)
			}
			n, err := Attach(aCtx(b), readOnly{dev}, by(Driver(name), Options{}))
			if err != nil {
				b.Fatal(err)
			}
			benchReads(b, n.Path)
			detach(b, n)
		})
	}
	b.Run("loop", func(b *testing.B) {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		number, err := makeLoop(aCtx(b), f, strings.Repeat("B", 26), true)
		if err != nil {
			b.Fatal(err)
		}
		s := State{Path: nodePath(FUSE, number), Token: strings.Repeat("B", 26)}
		benchReads(b, s.Path)
		if err := removeFUSE(aCtx(b), s); err != nil {
			b.Error(err)
		}
	})
}

func benchReads(b *testing.B, path string) {
	f := open(b, path, unix.O_RDONLY|unix.O_DIRECT)
	f.mustRead(blockmap.Range(0, testSize), pattern(0, testSize)) // maps what is not mapped yet
	f.close()
	for _, c := range []struct {
		bytes int64
		depth int
	}{{4096, 1}, {4096, 32}, {1 << 20, 1}} {
		b.Run(fmt.Sprintf("%dk/QD%d", c.bytes>>10, c.depth), func(b *testing.B) {
			f := open(b, path, unix.O_RDONLY|unix.O_DIRECT)
			defer f.close()
			b.SetBytes(c.bytes)
			var wg sync.WaitGroup
			b.ResetTimer()
			for i := range c.depth {
				wg.Go(func() {
					p := aligned(int(c.bytes))
					rng := rand.New(rand.NewPCG(uint64(i), 1))
					for n := i; n < b.N; n += c.depth {
						off := rng.Int64N((testSize-c.bytes)/4096) * blockmap.BlockSize
						if _, err := unix.Pread(f.fd, p, off); err != nil {
							b.Errorf("read: %v", err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
