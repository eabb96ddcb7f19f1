package attach

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// load is readers and writers, and what has happened to them.
type load struct {
	files   []*node
	wg      sync.WaitGroup
	stop    chan struct{}
	ops     atomic.Int64
	mu      sync.Mutex
	errs    []error
	longest time.Duration
	calm    time.Duration // the longest before an outage
}

// run calls op over and over until the load ends. op fails the test itself where bytes
// are wrong.
func (l *load) run(op func() error) {
	l.wg.Go(func() {
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			begin := time.Now()
			err := op()
			took := time.Since(begin)
			l.ops.Add(1)
			l.mu.Lock()
			l.longest = max(l.longest, took)
			if err != nil {
				l.errs = append(l.errs, err)
			}
			l.mu.Unlock()
			if err != nil {
				time.Sleep(time.Millisecond) // fails fast
			}
		}
	})
}

// alone notes how long operations take while nothing happens to the server.
func (l *load) alone() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calm, l.longest = l.longest, 0
}

// more waits until the load has done that much more.
func (l *load) more(t testing.TB, n int64) {
	t.Helper()
	before := l.ops.Load()
	eventually(t, fmt.Sprint(n, " more operations are done"), func() bool { return l.ops.Load() >= before+n })
}

func (l *load) end(t testing.TB) {
	t.Helper()
	close(l.stop)
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	within(t, "the last operation", done)
	for _, f := range l.files {
		f.close()
	}
}

// rawLoad reads the first half of a node, which has the pattern, and writes to the rest.
func rawLoad(t testing.TB, path string, writers int) *load {
	l := &load{stop: make(chan struct{})}
	for i := range 3 {
		f := open(t, path, unix.O_RDONLY|unix.O_DIRECT)
		l.files = append(l.files, f)
		rng := rand.New(rand.NewPCG(uint64(i), 5))
		l.run(func() error {
			e := blockmap.Range(rng.Int64N(testSize/2/4096-4)*4096, 4096*(1+rng.Int64N(4)))
			got, err := f.read(e)
			if err == nil && !bytes.Equal(got, pattern(e.Start, e.Len())) {
				t.Errorf("read %v: wrong bytes", e)
			}
			return err
		})
	}
	for i := range int64(writers) {
		f := open(t, path, unix.O_RDWR|unix.O_DIRECT)
		l.files = append(l.files, f)
		rng := rand.New(rand.NewPCG(uint64(i), 6))
		mine := blockmap.Range(testSize/2+i<<20, 1<<20)
		written := make(map[int64]uint64)
		var n uint64
		l.run(func() error {
			off := mine.Start + rng.Int64N(mine.Len()/4096)*4096
			p := make([]byte, 4096)
			if want, ok := written[off]; ok {
				got, err := f.read(blockmap.Range(off, 4096))
				if err != nil {
					return err
				}
				if have := binary.LittleEndian.Uint64(got); have != want {
					t.Errorf("a write at %d is lost: %d, want %d", off, have, want)
				}
			}
			n++
			binary.LittleEndian.PutUint64(p, n)
			delete(written, off) // until it has succeeded, either may be there
			if err := f.write(p, off); err != nil {
				return err
			}
			written[off] = n
			return nil
		})
	}
	return l
}

// checkLoad fails the test if an operation has failed, or has taken much longer than the
// outage, the kernel's timeouts and operations as they are on this machine.
func checkLoad(t *testing.T, d Driver, l *load, outage time.Duration) {
	t.Helper()
	t.Logf("%d operations, %d errors, the longest took %v; without a server for %v", l.ops.Load(), len(l.errs), l.longest.Round(time.Millisecond), outage.Round(time.Millisecond))
	limit := outage + 10*l.calm + 2*time.Second
	if d == NBD {
		limit += serverTimeout + nbdGrace
	}
	if len(l.errs) > 0 {
		t.Errorf("%d operations failed, the first one with: %v", len(l.errs), l.errs[0])
	}
	if l.longest > limit {
		t.Errorf("an operation took %v, of at most %v", l.longest, limit)
	}
}

// A server that is killed under readers and writers comes back: by ublk and nbd nobody
// sees an error.
func TestRecover(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d == FUSE || d == nbdByIoctl {
			return // see TestRecoverFUSE and TestRecoverIoctl
		}
		file := newFile(t)
		first, err := startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		l := rawLoad(t, first.state.Path, 2)
		l.more(t, 200)
		l.alone()
		begin := time.Now()
		first.kill()
		second, err := startServer(t, d, file, "rw", string(first.state.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		outage := time.Since(begin)
		if second.state.PID != second.cmd.Process.Pid || second.state.Path != first.state.Path || second.state.Token != first.state.Token {
			t.Errorf("state %+v after %+v", second.state, first.state)
		}
		l.more(t, 200)
		l.end(t)
		checkLoad(t, d, l, outage)
		// A second time, and then a clean end.
		second.kill()
		third, err := startServer(t, d, file, "rw", string(second.state.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, third.state.Path, unix.O_RDONLY|unix.O_DIRECT)
		f.mustRead(blockmap.Range(0, 1<<20), pattern(0, 1<<20))
		f.close()
		third.stop()
		if _, err := Recover(aCtx(t), third.state, newDevice(testSize), Options{}); !errors.Is(err, ErrGone) {
			t.Errorf("recover a node that was detached: %v", err)
		}
	})
}

// The same under a filesystem.
func TestRecoverExt4(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d == FUSE || d == nbdByIoctl {
			return // see TestRecoverFUSE and TestRecoverIoctl
		}
		file := filepath.Join(t.TempDir(), "device")
		if err := os.WriteFile(file, mkfs(t), 0o600); err != nil {
			t.Fatal(err)
		}
		first, err := startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		dir, unmount := mountNode(t, first.state.Path, 0, "")
		files := useFiles(t, dir)
		l := &load{stop: make(chan struct{})}
		for i := range 2 {
			name := filepath.Join(dir, fmt.Sprint("busy", i))
			n := 0
			l.run(func() error {
				n++
				p := bytes.Repeat([]byte{byte(n)}, 20_000)
				f, err := os.Create(name)
				if err != nil {
					return err
				}
				defer f.Close()
				if _, err := f.Write(p); err != nil {
					return err
				}
				return f.Sync()
			})
			l.run(func() error {
				fd, err := unix.Open(filepath.Join(dir, "file5"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				_, err = unix.Pread(fd, aligned(8192), 0)
				return err
			})
		}
		l.more(t, 60)
		l.alone()
		begin := time.Now()
		first.kill()
		second, err := startServer(t, d, file, "rw", string(first.state.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		outage := time.Since(begin)
		l.more(t, 60)
		l.end(t)
		checkLoad(t, d, l, outage)
		files.check(dir)
		unmount()
		second.stop()
	})
}

// FUSE fails requests while there is no server. A read-only node goes on after Recover,
// and can be mounted again; a writable one has to be made anew.
func TestRecoverFUSE(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != FUSE {
			return // see TestRecover
		}
		dev := newDevice(testSize)
		dev.Fill(mkfs(t), 0)
		file := filepath.Join(t.TempDir(), "device")
		n := attachTo(t, d, dev, Options{})
		dir, unmount := mountNode(t, n.Path, 0, "")
		files := useFiles(t, dir)
		unmount()
		detach(t, n)
		if err := os.WriteFile(file, dev.Content(blockmap.Range(0, testSize)), 0o600); err != nil {
			t.Fatal(err)
		}

		first, err := startServer(t, d, file, "ro")
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, first.state.Path, unix.O_RDONLY|unix.O_DIRECT)
		_, unmount = mountNode(t, first.state.Path, unix.MS_RDONLY, "noload")
		first.kill()
		if _, err := f.read(blockmap.Range(8192, 4096)); err != unix.EIO {
			t.Errorf("read without a server: %v", err)
		}
		second, err := startServer(t, d, file, "ro", string(first.state.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		f.mustRead(blockmap.Range(8192, 4096), dev.Content(blockmap.Range(8192, 4096)))
		unmount()
		dir, unmount = mountNode(t, second.state.Path, unix.MS_RDONLY, "noload")
		files.check(dir)
		if _, err := Recover(aCtx(t), first.state, readOnly{dev}, Options{}); !errors.Is(err, ErrGone) {
			t.Errorf("recover a node that another process has recovered: %v", err)
		}
		f.close()
		unmount()
		second.stop()

		first, err = startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		first.kill()
		if _, err := startServer(t, d, file, "rw", string(first.state.Encode())); err == nil || !strings.Contains(err.Error(), "attach again") {
			t.Errorf("recover a writable node: %v", err)
		}
		if err := Remove(aCtx(t), first.state); err != nil {
			t.Error(err)
		}
	})
}

// A recovery of a node of fuse that fails leaves it to the next one, and to Remove. One that
// succeeds gives it the token of its options.
func TestRecoverFUSEFails(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != FUSE {
			return // they keep their tokens
		}
		s, err := startServer(t, d, newFile(t), "ro")
		if err != nil {
			t.Fatal(err)
		}
		s.kill()
		wrong := s.state
		wrong.Size *= 2 // the kernel takes no file of another size
		if _, err := Recover(aCtx(t), wrong, readOnly{blocktest.NewMemory(2 * testSize)}, Options{}); err == nil || errors.Is(err, ErrGone) {
			t.Fatalf("a device of another size: %v", err)
		}
		token := NewToken()
		n, err := Recover(aCtx(t), s.state, readOnly{newDevice(testSize)}, Options{Token: token})
		if err != nil {
			t.Fatalf("after one that has failed: %v", err)
		}
		if n.State().Token != token {
			t.Errorf("it has the token %s, want %s", n.State().Token, token)
		}
		detach(t, n)
	})
}

// What a dead server has left can be removed, but not while it is mounted or served, and
// not twice.
func TestRemove(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		file := newFile(t)
		s, err := startServer(t, d, file, "ro")
		if err != nil {
			t.Fatal(err)
		}
		if err := Remove(aCtx(t), s.state); !errors.Is(err, ErrBusy) {
			t.Errorf("remove a node that is served: %v", err)
		}
		s.kill()
		if err := Remove(aCtx(t), s.state); err != nil && d != nbdByIoctl { // which nobody has open, so it ends with its server
			t.Fatal(err)
		}
		eventually(t, "it is gone", func() bool { return errors.Is(Remove(aCtx(t), s.state), ErrGone) })
		if _, err := Recover(aCtx(t), s.state, readOnly{newDevice(testSize)}, Options{}); !errors.Is(err, ErrGone) {
			t.Errorf("recover it: %v", err)
		}
	})
}

// A state of another boot, or of another device, is not taken for one of here.
func TestStateOfOthers(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		n := attachTo(t, d, readOnly{dev}, Options{})
		for what, change := range map[string]func(*State){
			"another boot":   func(s *State) { s.Boot = "another" },
			"another device": func(s *State) { s.Token = strings.Repeat("X", 26); s.PID = 1 << 22; s.Size *= 2 },
		} {
			s := n.State()
			change(&s)
			if err := Remove(aCtx(t), s); !errors.Is(err, ErrGone) {
				t.Errorf("remove a node of %s: %v", what, err)
			}
		}
		f := open(t, n.Path, unix.O_RDONLY|unix.O_DIRECT)
		f.mustRead(blockmap.Range(0, 4096), dev.Content(blockmap.Range(0, 4096)))
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := Recover(ctx, n.State(), readOnly{dev}, Options{}); err == nil || !strings.Contains(err.Error(), "still serves it") {
			t.Errorf("recover a node that is served: %v", err)
		}
		f.close()
	})
}
