//go:build guest

package blocktest

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DM is a device of the kernel's device-mapper that consists of one target.
type DM struct {
	t       testing.TB
	name    string
	Path    string
	sectors int64
	gone    bool
}

// Calls and flags of linux/dm-ioctl.h.
const (
	dmCreate  = 3
	dmRemove  = 4
	dmSuspend = 6 // without dmSuspended it resumes
	dmLoad    = 9
	dmMessage = 14

	dmSector = 512

	dmSuspended  = 1 << 1
	dmSkipLockFS = 1 << 10 // or the file system would be synced first
	dmNoFlush    = 1 << 11
)

// NewDM makes a device with the target over all of disk, until Remove or the end of the
// test. params come after the name of the disk.
func NewDM(t testing.TB, name, target, disk, params string) *DM {
	t.Helper()
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	d := &DM{t: t, name: name, sectors: size / dmSector}
	dev, err := d.call(dmCreate, 0, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.Path = fmt.Sprintf("/dev/dm-%d", unix.Minor(dev))
	t.Cleanup(d.Remove)
	err = d.load(target, disk+" "+params)
	if err == nil {
		err = d.resume()
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// call makes a call about the device. payload follows the header.
func (d *DM) call(nr uintptr, flags, targets uint32, payload []byte) (dev uint64, err error) {
	const head = 312
	b := make([]byte, head, head+len(payload)+256)
	b = append(b, payload...)
	b = append(b, make([]byte, 256)...) // for an answer
	binary.NativeEndian.PutUint32(b[0:], 4)
	binary.NativeEndian.PutUint32(b[12:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[16:], head)
	binary.NativeEndian.PutUint32(b[20:], targets)
	binary.NativeEndian.PutUint32(b[28:], flags)
	copy(b[48:], d.name)
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer control.Close()
	request := uintptr(3<<30 | head<<16 | 0xfd<<8 | nr)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return 0, fmt.Errorf("call %d of the device-mapper for %s: %w", nr, d.name, errno)
	}
	return binary.NativeEndian.Uint64(b[40:]), nil
}

// load gives the device another target, from the next resume on.
func (d *DM) load(target, params string) error {
	spec := make([]byte, 40)
	binary.NativeEndian.PutUint64(spec[8:], uint64(d.sectors))
	copy(spec[24:], target)
	spec = append(spec, params...)
	spec = append(spec, make([]byte, 8-len(spec)%8)...)
	binary.NativeEndian.PutUint32(spec[20:], uint32(len(spec)))
	_, err := d.call(dmLoad, 0, 1, spec)
	return err
}

func (d *DM) resume() error {
	_, err := d.call(dmSuspend, 0, 0, nil)
	return err
}

// Become gives the device another target at once. Writes that are under way end first, and
// nothing is synced.
func (d *DM) Become(target, params string) error {
	if err := d.load(target, params); err != nil {
		return err
	}
	if _, err := d.call(dmSuspend, dmSuspended|dmSkipLockFS|dmNoFlush, 0, nil); err != nil {
		return err
	}
	return d.resume()
}

// Mark puts a mark into the log of a log-writes target.
func (d *DM) Mark(name string) error {
	_, err := d.call(dmMessage, 0, 0, append(make([]byte, 8), "mark "+name+"\x00"...))
	return err
}

// Remove removes the device. The kernel may have it open for a moment after an unmount.
func (d *DM) Remove() {
	if d.gone {
		return
	}
	d.gone = true
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := d.call(dmRemove, 0, 0, nil)
		if err == nil {
			return
		}
		if !strings.Contains(err.Error(), unix.EBUSY.Error()) || time.Now().After(end) {
			d.t.Error(err)
			return
		}
	}
}

// MountDisk mounts an ext4 file system until unmount is called, or the test ends.
func MountDisk(t testing.TB, disk, dir string) (unmount func()) {
	t.Helper()
	if err := unix.Mount(disk, dir, "ext4", 0, ""); err != nil {
		t.Fatalf("mount %s: %v", disk, err)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			err := unix.Unmount(dir, 0)
			if err == nil {
				return
			}
			if err != unix.EBUSY || time.Now().After(end) {
				_ = unix.Unmount(dir, unix.MNT_DETACH)
				t.Fatalf("unmount %s: %v", disk, err)
			}
		}
	}
	t.Cleanup(unmount)
	return unmount
}
