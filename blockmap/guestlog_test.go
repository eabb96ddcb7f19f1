//go:build guest

package blockmap_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// writeLog is what a log-writes target of the device-mapper has logged: see the kernel's
// Documentation/admin-guide/device-mapper/log-writes.rst. Numbers are little-endian.
//
//	sector 0    8  magic
//	            8  version, 1
//	            8  entries
//	            4  size of a sector in bytes
//	then for each entry a sector, and what was written:
//	            8  first sector
//	            8  number of sectors
//	            8  flags
//	            8  length of the name of a mark
//	               name of the mark
//
// Writes are logged in the order in which they have ended, each before the flush that has
// made it durable. So after the entries up to a flush, the disk has lost any of the writes
// between that one and the next.
type writeLog struct {
	f       *os.File
	entries []logEntry
}

type logEntry struct {
	off, n int64 // in bytes, on the disk
	flags  uint64
	at     int64 // of the data, in the log
	mark   string
}

const (
	logMagic   = 0x6a736677736872
	logFlush   = 1 << 0
	logFUA     = 1 << 1
	logDiscard = 1 << 2
	logMark    = 1 << 3
)

// durable says whether what is logged up to e has reached the disk for good.
func (e *logEntry) durable() bool { return e.flags&(logFlush|logFUA) != 0 }

// openLog reads the log of a disk of size bytes.
func openLog(t testing.TB, path string, size int64) *writeLog {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	head := make([]byte, 512)
	_, err = f.ReadAt(head, 0)
	must(t, err)
	le := binary.LittleEndian
	if le.Uint64(head) != logMagic || le.Uint64(head[8:]) != 1 {
		t.Fatalf("the log begins with % x", head[:32])
	}
	count, sector := le.Uint64(head[16:]), int64(le.Uint32(head[24:]))
	l := &writeLog{f: f}
	at := sector
	for i := range count {
		if _, err := f.ReadAt(head, at); err != nil {
			t.Fatalf("read entry %d of %d: %v", i, count, err)
		}
		at += sector
		e := logEntry{off: int64(le.Uint64(head)) * sector, n: int64(le.Uint64(head[8:])) * sector, flags: le.Uint64(head[16:]), at: at}
		switch name := le.Uint64(head[24:]); {
		case e.flags&logMark != 0 && name <= uint64(len(head)-32):
			e.mark = string(head[32 : 32+name])
			e.n = 0
		case e.off < 0 || e.n < 0 || e.off > size || e.n > size-e.off || name != 0:
			t.Fatalf("entry %d of %d is %+v", i, count, e)
		case e.flags&logDiscard == 0:
			at += e.n
		}
		l.entries = append(l.entries, e)
	}
	return l
}

// apply does to the image of the disk what e says, where keep is true of a block of 4 KiB.
func (l *writeLog) apply(t testing.TB, image []byte, e *logEntry, keep func() bool) {
	t.Helper()
	const block = 4096
	p := make([]byte, e.n) // zeros, for a discard
	if e.flags&logDiscard == 0 && e.n > 0 {
		if _, err := l.f.ReadAt(p, e.at); err != nil {
			t.Fatalf("read the log: %v", err)
		}
	}
	for at := int64(0); at < e.n; {
		n := min(e.n-at, block-(e.off+at)%block)
		if keep() {
			copy(image[e.off+at:], p[at:at+n])
		}
		at += n
	}
}

// diskImage is memory for O_DIRECT.
func diskImage(t testing.TB, size int64) []byte {
	t.Helper()
	p, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	t.Cleanup(func() { _ = unix.Munmap(p) })
	return p
}

// readDisk reads a whole disk.
func readDisk(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	must(t, err)
	defer f.Close()
	size, err := f.Seek(0, 2)
	must(t, err)
	p := diskImage(t, size)
	must(t, eachPiece(p, func(p []byte, off int64) (int, error) { return f.ReadAt(p, off) }))
	return p
}

// writeDisk writes a whole disk.
func writeDisk(t testing.TB, path string, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	must(t, err)
	must(t, eachPiece(p, f.WriteAt))
	must(t, f.Close())
}

func eachPiece(p []byte, do func(p []byte, off int64) (int, error)) error {
	const piece = 1 << 20
	for at := 0; at < len(p); at += piece {
		if _, err := do(p[at:min(at+piece, len(p))], int64(at)); err != nil {
			return fmt.Errorf("at %d: %w", at, err)
		}
	}
	return nil
}
