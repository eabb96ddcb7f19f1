package attach

import (
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// fuseFile is the file system: a directory with one file, which is the device.
//
// Each reader of go-fuse takes a request from the kernel, does it, and answers it. A
// reader that waits is replaced by another one, so a miss holds up no other request.
type fuseFile struct {
	fuse.RawFileSystem // ENOSYS for all the rest
	s                  *serving
	name               string
	pool               sync.Pool // of *fuseView
}

const (
	fuseFileID = 2 // the root has 1

	// fuseForever is how long the kernel may believe what it was told of the file.
	fuseForever = 365 * 24 * time.Hour
)

// fuseFileName is the name of the file, which losetup shows of the loop device: it tells
// which process serves it.
func fuseFileName() string { return fmt.Sprint(fuseFilePrefix, os.Getpid()) }

const fuseFilePrefix = "thaw-"

func newFuseFile(s *serving) *fuseFile {
	f := &fuseFile{RawFileSystem: fuse.NewDefaultRawFileSystem(), s: s, name: fuseFileName()}
	f.pool.New = func() any { return &fuseView{f: f} }
	return f
}

func (f *fuseFile) String() string { return "thaw" }

func (f *fuseFile) attr(id uint64, a *fuse.Attr) {
	a.Ino, a.Nlink, a.Blksize = id, 1, blockmap.BlockSize
	if id == fuse.FUSE_ROOT_ID {
		a.Mode, a.Nlink = unix.S_IFDIR|0o500, 2
		return
	}
	a.Mode, a.Size, a.Blocks = unix.S_IFREG|0o600, uint64(f.s.size), uint64(f.s.size)>>9
}

// Lookup finds the file.
func (f *fuseFile) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != fuse.FUSE_ROOT_ID || name != f.name {
		return fuse.ENOENT
	}
	out.NodeId = fuseFileID
	f.attr(fuseFileID, &out.Attr)
	out.SetEntryTimeout(fuseForever)
	out.SetAttrTimeout(fuseForever)
	return fuse.OK
}

// GetAttr describes the file or the directory.
func (f *fuseFile) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId != fuse.FUSE_ROOT_ID && in.NodeId != fuseFileID {
		return fuse.ENOENT
	}
	f.attr(in.NodeId, &out.Attr)
	out.SetTimeout(fuseForever)
	return fuse.OK
}

// Open has the kernel pass requests on as they are: it keeps nothing in its page cache,
// and lets writes run side by side.
func (f *fuseFile) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != fuseFileID {
		return fuse.ENOENT
	}
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	return fuse.OK
}

// StatFs says in which pieces a loop device may discard.
func (f *fuseFile) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = blockmap.BlockSize, blockmap.BlockSize, 255
	out.Blocks = uint64(f.s.size) / blockmap.BlockSize
	return fuse.OK
}

// Read answers with the bytes where they lie.
func (f *fuseFile) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	e := blockmap.Range(int64(in.Offset), int64(min(in.Size, uint32(len(buf)))))
	if e.Start < 0 || e.Start >= f.s.size {
		return fuse.ReadResultData(nil), fuse.OK // at the end of the file
	}
	e.End = min(e.End, f.s.size)
	v := f.pool.Get().(*fuseView)
	var ok bool
	if v.view, ok = f.s.dev.View(e); ok {
		f.s.hits.Add(1)
	} else {
		f.s.misses.Add(1)
		var errno syscall.Errno
		if v.view, errno = f.s.read(e); errno != 0 {
			f.pool.Put(v)
			return nil, fuse.Status(errno)
		}
	}
	if !v.readable() {
		// The file of the cache was cut short, or has a bad sector. The bytes are
		// fetched again.
		v.view.Release()
		f.pool.Put(v)
		if errno := f.s.readAgain(e, buf[:e.Len()]); errno != 0 {
			return nil, fuse.Status(errno)
		}
		return fuse.ReadResultData(buf[:e.Len()]), fuse.OK
	}
	v.slices = v.slices[:0]
	for i := range v.view.Segments() {
		v.slices = append(v.slices, v.view.Segments()[i].Bytes)
	}
	return v, fuse.OK
}

// fuseView is a fuse.ReadResult: a view whose pieces go to the kernel by one writev.
type fuseView struct {
	f      *fuseFile
	view   blockmap.View
	slices [][]byte
}

// readable reports whether the bytes can be read: where they cannot, the kernel would
// answer with an error in our place.
func (v *fuseView) readable() bool {
	for i := range v.view.Segments() {
		s := &v.view.Segments()[i]
		if s.Pinned() == 0 {
			continue // memory of this process, or zeros
		}
		if touch(s.Bytes) != nil {
			s.Damaged()
			return false
		}
	}
	return true
}

// Slices is what go-fuse writes.
func (v *fuseView) Slices() ([][]byte, fuse.Status) { return v.slices, fuse.OK }

// Size implements fuse.ReadResult.
func (v *fuseView) Size() int { return int(v.view.Len()) }

// Bytes implements fuse.ReadResult, for who cannot write slices.
func (v *fuseView) Bytes(buf []byte) ([]byte, fuse.Status) {
	n := v.Size()
	if n > len(buf) || v.view.CopyTo(buf[:n]) != nil {
		return nil, fuse.EIO
	}
	return buf[:n], fuse.OK
}

// Done implements fuse.ReadResult: the bytes are sent.
func (v *fuseView) Done() {
	v.view.Release()
	clear(v.slices)
	if cap(v.slices) > 64 {
		v.slices = nil
	}
	v.f.pool.Put(v)
}

// within reports whether n bytes at off are bytes of the device.
func (f *fuseFile) within(off, n uint64) bool {
	return off <= uint64(f.s.size) && n <= uint64(f.s.size)-off
}

// Write writes to the device.
func (f *fuseFile) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if !f.within(in.Offset, uint64(len(data))) {
		return 0, fuse.Status(syscall.ENOSPC)
	}
	if errno := f.s.write(data, int64(in.Offset), false); errno != 0 {
		return 0, fuse.Status(errno)
	}
	return uint32(len(data)), fuse.OK
}

// Fsync is a flush of the loop device.
func (f *fuseFile) Fsync(_ <-chan struct{}, _ *fuse.FsyncIn) fuse.Status {
	return fuse.Status(f.s.flush())
}

// Flush comes when a descriptor is closed, and promises nothing.
func (f *fuseFile) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Fallocate is a discard of the loop device, or a request for zeros.
func (f *fuseFile) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if !f.within(in.Offset, in.Length) {
		return fuse.Status(syscall.ENOSPC)
	}
	e := blockmap.Range(int64(in.Offset), int64(in.Length))
	switch in.Mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE:
		// A loop device uses it for zeros as well, unless these are to take space.
		return fuse.Status(f.s.zero(e, true, false))
	case unix.FALLOC_FL_ZERO_RANGE:
		return fuse.Status(f.s.zero(e, false, false))
	}
	return fuse.Status(syscall.EOPNOTSUPP)
}

// SetAttr accepts what changes nothing that is kept.
func (f *fuseFile) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.Valid&fuse.FATTR_SIZE != 0 && in.Size != uint64(f.s.size) {
		return fuse.EPERM
	}
	return f.GetAttr(nil, &fuse.GetAttrIn{InHeader: in.InHeader}, out)
}
