package ext4

import (
	"strings"
	"testing"
)

// FuzzCheck breaks a filesystem in several places, with checksums and without.
// edits are 5 bytes each: which block, where in it (2), what (2).
func FuzzCheck(f *testing.F) {
	b := newBroken(f)
	order := make([]uint32, 0, len(b.blocks))
	for _, r := range b.fs.Runs() {
		for i := uint32(0); r.Stream == 0 && i < r.Count; i++ {
			order = append(order, r.Device+i)
		}
	}
	f.Add([]byte{})
	for i := range len(order) {
		for _, at := range []int{0, 2, 4, 6, 8, 12, 24, 32, 40, 1024, 1028, 4090} {
			f.Add([]byte{byte(i), byte(at >> 8), byte(at), byte(at), 0})
			f.Add([]byte{byte(i), byte(at >> 8), byte(at), 0xFF, 0xFF, 0, 4, 40, 1, 0})
		}
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		d := b.clone()
		for ; len(edits) >= 5; edits = edits[5:] {
			at := (int(edits[1])<<8 | int(edits[2])) % (blockSize - 1)
			copy(d.blocks[order[int(edits[0])%len(order)]][at:], edits[3:5])
		}
		reads := &counting{memory: d}
		c := &checker{r: reads, size: d.size, lax: true, xattrs: make(map[uint32]*sharedXattrs)}
		_ = c.check()
		if most := int64(4 * d.size); reads.bytes > most {
			t.Errorf("%d bytes read of a device of %d", reads.bytes, d.size)
		}
		_ = Check(d, d.size)
	})
}

// counting counts the bytes that are read.
type counting struct {
	*memory
	bytes int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.bytes += int64(len(p))
	return c.memory.ReadAt(p, off)
}

// FuzzCheckBytes takes any bytes for a device.
func FuzzCheckBytes(f *testing.F) {
	o := testOptions
	o.Size = 0
	fs := layout(f, dir(Dirent{"f", file(0)}, Dirent{"l", symlink("f")}), o)
	m := memoryImage(f, fs)
	b := make([]byte, m.size)
	if _, err := m.ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:2048])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := strings.NewReader(string(b))
		_ = Check(r, int64(len(b)))
		_ = Check(r, 1<<60) // the device is not what it was said to be
		c := &checker{r: r, size: int64(len(b)), lax: true, xattrs: make(map[uint32]*sharedXattrs)}
		_ = c.check()
	})
}
