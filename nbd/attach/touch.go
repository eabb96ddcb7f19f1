package attach

import (
	"runtime/debug"
	"unsafe"

	"thaw/blockmap"
)

// touch reads a byte of each page of p, which may be part of a mapped file, and fails with
// blockmap.ErrDamaged where one cannot be read. It is for system calls that cannot say
// so, and costs less than a copy.
func touch(p []byte) (err error) {
	if len(p) == 0 {
		return nil
	}
	first := uintptr(unsafe.Pointer(&p[0]))
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			fault, ok := r.(interface{ Addr() uintptr })
			if !ok || fault.Addr() < first || fault.Addr() >= first+uintptr(len(p)) {
				panic(r) // the fault is not in p
			}
			err = blockmap.ErrDamaged
		}
	}()
	var sum byte
	// The first page may begin before p; the next ones begin every BlockSize bytes.
	sum += p[0]
	for i := int(blockmap.BlockSize - first%blockmap.BlockSize); i < len(p); i += blockmap.BlockSize {
		sum += p[i]
	}
	touched(sum)
	return nil
}

// touched keeps the compiler from leaving the reads out.
//
//go:noinline
func touched(byte) {}
