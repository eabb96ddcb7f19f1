package blockmap

import (
	"runtime/debug"
	"unsafe"
)

// CopyMapped copies src to dst as copy does. src may be part of a mapped file that
// can no longer be read, because it was truncated or its disk has a bad sector.
// The fault, which would end the process, becomes ErrDamaged; a part of dst may
// have been written then.
//
// All code of this process that reads the bytes of a view uses CopyMapped. A
// system call that is given such bytes fails with EFAULT by itself.
func CopyMapped(dst, src []byte) (err error) {
	if len(dst) == 0 || len(src) == 0 {
		return nil
	}
	first := uintptr(unsafe.Pointer(&src[0]))
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			fault, ok := r.(interface{ Addr() uintptr })
			if !ok || fault.Addr() < first || fault.Addr() >= first+uintptr(len(src)) {
				panic(r) // the fault is not in src
			}
			err = ErrDamaged
		}
	}()
	copy(dst, src)
	return nil
}
