package blockmap

import (
	"runtime/debug"
	"unsafe"
)

// CopyMapped copies src to dst as copy does. src may be of a mapped file that
// can no longer be read, since it was truncated or its disk has a bad sector: the
// processor's fault becomes ErrDamaged then, where it would end the process, and
// some of dst may have been written to.
//
// Whatever in this process looks at the bytes of a view goes through here. System
// calls that are given such bytes fail with EFAULT by themselves.
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
				panic(r) // not of src
			}
			err = ErrDamaged
		}
	}()
	copy(dst, src)
	return nil
}
