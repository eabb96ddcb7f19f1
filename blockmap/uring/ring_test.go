package uring

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newRing(t testing.TB, depth int) *Ring {
	t.Helper()
	r, err := New(depth)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("this machine forbids io_uring: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// content makes a file of n random bytes.
func content(t testing.TB, n int) (f *os.File, p []byte) {
	t.Helper()
	p = make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(p)
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err == nil {
		t.Cleanup(func() { f.Close() })
		_, err = f.Write(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f, p
}

// read reads and waits.
func read(t testing.TB, r *Ring, fd int, buf []byte, off int64) (n int, err error) {
	t.Helper()
	done := make(chan struct{})
	x := &Read{FD: fd, Buf: buf, Off: off, Done: func(*Read) { close(done) }}
	r.Submit(x)
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("a read has not ended")
	}
	return x.N, x.Err
}

func TestReads(t *testing.T) {
	f, want := content(t, 1<<20+1000)
	for _, depth := range []int{1, 3, 64} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			r := newRing(t, depth)
			var wg sync.WaitGroup
			for i := range 16 { // more than the ring has room for, but for the last
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(i), 1))
					for range 200 {
						off := rng.IntN(len(want) - 1)
						buf := make([]byte, 1+rng.IntN(20000))
						n, err := read(t, r, int(f.Fd()), buf, int64(off))
						end := min(off+len(buf), len(want))
						if err != nil || !bytes.Equal(buf[:n], want[off:end]) {
							t.Errorf("read %d bytes at %d: %d wrong bytes, or %v", len(buf), off, n, err)
							return
						}
					}
				})
			}
			wg.Wait()
			r.Close()
		})
	}
}

func TestReadFails(t *testing.T) {
	f, want := content(t, 5000)
	r := newRing(t, 4)
	defer r.Close()
	buf := make([]byte, 100)
	if n, err := read(t, r, int(f.Fd()), buf, 5000); n != 0 || err != nil {
		t.Errorf("at the end of the file: %d bytes, %v", n, err)
	}
	if n, err := read(t, r, int(f.Fd()), buf, 4950); n != 50 || err != nil || !bytes.Equal(buf[:50], want[4950:]) {
		t.Errorf("across the end of the file: %d bytes, %v", n, err)
	}
	if _, err := read(t, r, -1, buf, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("of no file: %v", err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if _, err := read(t, r, int(dir.Fd()), buf, 0); !errors.Is(err, unix.EISDIR) {
		t.Errorf("of a directory: %v", err)
	}
	// It goes on to work.
	if n, err := read(t, r, int(f.Fd()), buf, 0); n != 100 || err != nil || !bytes.Equal(buf, want[:100]) {
		t.Errorf("after failures: %d bytes, %v", n, err)
	}
}

// A read that takes long holds up no other, and Close waits for it. A pipe is a file
// whose read takes as long as the test likes.
func TestSlowRead(t *testing.T) {
	f, _ := content(t, 5000)
	r := newRing(t, 8)
	slow, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	defer w.Close()
	if err := unix.SetNonblock(int(slow.Fd()), false); err != nil {
		t.Fatal(err)
	}
	ended := make(chan int, 1)
	r.Submit(&Read{FD: int(slow.Fd()), Buf: make([]byte, 5), Off: -1, Done: func(x *Read) { ended <- x.N }})
	for range 100 {
		if n, err := read(t, r, int(f.Fd()), make([]byte, 100), 0); n != 100 || err != nil {
			t.Fatalf("beside a slow read: %d bytes, %v", n, err)
		}
	}
	closed := make(chan struct{})
	go func() { r.Close(); close(closed) }()
	for !r.isClosed() {
		runtime.Gosched()
	}
	select {
	case <-closed:
		t.Fatal("Close did not wait for a read")
	case <-ended:
		t.Fatal("the read ended without data")
	default:
	}
	if _, err := w.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	<-closed
	if n := <-ended; n != 5 {
		t.Errorf("the slow read read %d bytes", n)
	}
	done := make(chan error, 1)
	r.Submit(&Read{FD: int(f.Fd()), Buf: make([]byte, 5), Done: func(x *Read) { done <- x.Err }})
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("a read after Close: %v", err)
	}
}

func (r *Ring) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.closed
}

// Each way to make a ring works on a kernel that has it.
func TestSetups(t *testing.T) {
	f, want := content(t, 8192)
	all := setups
	defer func() { setups = all }()
	for _, flags := range all {
		setups = []uint32{flags}
		if flags != setupClamp {
			setups = append(setups, setupClamp) // on an older kernel
		}
		r := newRing(t, 4)
		buf := make([]byte, 4096)
		if n, err := read(t, r, int(f.Fd()), buf, 4096); n != 4096 || err != nil || !bytes.Equal(buf, want[4096:]) {
			t.Errorf("setup %#x: %d bytes, %v", flags, n, err)
		}
		r.Close()
	}
}

// Where a seccomp filter forbids io_uring, as container runtimes do, or the kernel lacks
// it, New says so.
func TestForbidden(t *testing.T) {
	const env = "URING_TEST_ERRNO"
	for _, e := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
		if os.Getenv(env) == e.Error() {
			forbid(t, e)
			if _, err := New(4); !errors.Is(err, errors.ErrUnsupported) || !errors.Is(err, e) {
				t.Errorf("New where io_uring_setup fails with %v: %v", e, err)
			}
			return
		}
	}
	for _, e := range []unix.Errno{unix.EPERM, unix.ENOSYS} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestForbidden$", "-test.v")
		cmd.Env = append(os.Environ(), env+"="+e.Error())
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
			t.Errorf("%v: %v\n%s", e, err, out)
		}
	}
}

// forbid makes io_uring_setup fail for all threads of this process.
func forbid(t *testing.T, e unix.Errno) {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IO_URING_SETUP, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(e)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	const setModeFilter, tsync = 1, 1
	if n, _, errno := unix.Syscall(unix.SYS_SECCOMP, setModeFilter, tsync, uintptr(unsafe.Pointer(&prog))); errno != 0 || n != 0 {
		t.Fatalf("seccomp: %v, thread %d", errno, n)
	}
}

func BenchmarkRead(b *testing.B) {
	f, want := content(b, 64<<20)
	r := newRing(b, 64)
	defer r.Close()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
		done := make(chan struct{}, 1)
		x := &Read{FD: int(f.Fd()), Buf: make([]byte, 4096), Done: func(*Read) { done <- struct{}{} }}
		for pb.Next() {
			x.Off = rng.Int64N(int64(len(want))/4096) * 4096
			r.Submit(x)
			<-done
		}
	})
}

// Whoever wakes the thread holds the ring's lock meanwhile. Otherwise the thread could do
// the read, Close could end, and the number of the eventfd could be that of another file
// when the wake is written.
func TestWakeBeforeClose(t *testing.T) {
	f, _ := content(t, 5000)
	r := newRing(t, 4)
	for end := time.Now().Add(time.Minute); !r.sleeping.Load(); {
		if time.Now().After(end) {
			t.Fatal("the thread does not sleep")
		}
		runtime.Gosched()
	}
	// The wake goes to a pipe that takes no more until it is read from.
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	unix.SetNonblock(pipe[1], true)
	full := make([]byte, 4096)
	for {
		if _, err := unix.Write(pipe[1], full); err != nil {
			break
		}
	}
	unix.SetNonblock(pipe[1], false)
	wake, err := unix.FcntlInt(uintptr(r.wake), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.Dup3(pipe[1], r.wake, unix.O_CLOEXEC)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(wake)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it cannot stop a thread in a raw system call
	// Nor can the scheduler take its processor, so there must be another one for this goroutine.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0))))
	done := make(chan struct{})
	x := &Read{FD: int(f.Fd()), Buf: make([]byte, 100), Done: func(*Read) { close(done) }}
	submitted := make(chan struct{})
	go func() {
		defer close(submitted)
		r.Submit(x)
	}()
	for end := time.Now().Add(time.Minute); r.sleeping.Load() && time.Now().Before(end); {
		runtime.Gosched()
	}
	if r.mu.TryLock() {
		r.mu.Unlock()
		t.Error("the ring could be closed while a read is about to wake its thread")
	}
	for range 16 {
		unix.Read(pipe[0], full)
	}
	<-submitted
	if err := unix.Dup3(wake, r.wake, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("the read has not ended")
	}
	r.Close()
}
