package uring

import (
	"bytes"
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func openQueues(t *testing.T, s Setup) *Queues {
	t.Helper()
	q, err := Open(s)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("this machine forbids io_uring: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(q.Close)
	return q
}

// The structures are as large as the kernel's.
func TestSizes(t *testing.T) {
	if n := unsafe.Sizeof(Entry{}); n != 64 {
		t.Errorf("an entry has %d bytes", n)
	}
	if n := unsafe.Offsetof(Entry{}.Command); n != 48 {
		t.Errorf("the command of an entry is at byte %d", n)
	}
	if n := unsafe.Sizeof(Completion{}); n != 16 {
		t.Errorf("a completion has %d bytes", n)
	}
}

// Entries of both sizes do what they say, more often than the queue is long.
func TestQueues(t *testing.T) {
	f, want := content(t, 64<<10)
	for _, large := range []bool{false, true} {
		q := openQueues(t, Setup{Entries: 3, Large: large})
		buf, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		for round := range 10 {
			clear(buf)
			n := 0
			for e := q.Next(); e != nil; e = q.Next() {
				e.Op, e.FD, e.Off, e.UserData = OpRead, int32(f.Fd()), uint64(n)*4096, uint64(n)
				e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&buf[n*4096]))), 4096
				n++
			}
			if n != q.Entries() || n < 3 {
				t.Fatalf("%d entries fit in a queue of %d", n, q.Entries())
			}
			seen := make(map[uint64]bool)
			for len(seen) < n {
				if err := q.Enter(true); err != nil {
					t.Fatal(err)
				}
				for c, ok := q.Reap(); ok; c, ok = q.Reap() {
					if c.Result != 4096 || seen[c.UserData] {
						t.Fatalf("round %d: %+v", round, c)
					}
					seen[c.UserData] = true
				}
			}
			if !bytes.Equal(buf[:n*4096], want[:n*4096]) {
				t.Fatalf("round %d: wrong bytes", round)
			}
		}
		_ = unix.Munmap(buf)
	}
}

// A wait ends when its time is up, and the operation goes on.
func TestEnterFor(t *testing.T) {
	q := openQueues(t, Setup{Entries: 4})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := unix.SetNonblock(int(r.Fd()), false); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	e := q.Next()
	e.Op, e.FD, e.Off, e.UserData, e.Addr, e.Len = OpRead, int32(r.Fd()), ^uint64(0), 7, uint64(uintptr(unsafe.Pointer(&buf[0]))), 5
	if err := q.EnterFor(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if c, ok := q.Reap(); ok {
		t.Fatalf("finished without data: %+v", c)
	}
	if _, err := w.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; {
		if err := q.EnterFor(time.Second); err != nil {
			t.Fatal(err)
		}
		if c, ok := q.Reap(); ok {
			if c.UserData != 7 || c.Result != 5 || string(buf) != "hello" {
				t.Errorf("%+v, %q", c, buf)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatal("the read does not end")
		}
	}
}
