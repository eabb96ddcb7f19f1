package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// diskFile is a device in a file.
type diskFile struct{ *os.File }

func (d diskFile) Flush() error { return d.Sync() }

func (d diskFile) size(t testing.TB) int64 {
	t.Helper()
	st, err := d.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

func openDisk(t testing.TB, path string) diskFile {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return diskFile{f}
}

// copySparse copies a file with its holes.
func copySparse(t testing.TB, to, from string) string {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	return to
}

// must0 fails unless err is nil.
func must0(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// churn writes, deletes, renames and cuts files below dir, and syncs in between, so that
// the log has several transactions with revoked blocks.
func churn(t testing.TB, dir string) {
	t.Helper()
	sync := func() {
		f, err := os.Open(dir)
		must0(t, err)
		defer f.Close()
		must0(t, unix.Syncfs(int(f.Fd())))
	}
	for round := range 4 {
		for i := range 40 {
			d := fmt.Sprintf("%s/dir-%d-%d", dir, round, i)
			must0(t, os.Mkdir(d, 0o755))
			must0(t, os.WriteFile(d+"/file", bytes.Repeat([]byte{byte(i), byte(round)}, 100*i+1), 0o644))
		}
		sync()
		for i := range 20 {
			must0(t, os.RemoveAll(fmt.Sprintf("%s/dir-%d-%d", dir, round, i)))
		}
		// In the place of directories, whose blocks are revoked, and with blocks that begin
		// as those of a journal do.
		magic := []byte{0xC0, 0x3B, 0x39, 0x98}
		must0(t, os.WriteFile(fmt.Sprintf("%s/large-%d", dir, round), bytes.Repeat(magic, 200_000), 0o600))
		sync()
	}
	// What else a kernel writes, and Check has to accept.
	must0(t, os.Mkdir(dir+"/names", 0o755))
	for i := range 600 { // a hash tree
		must0(t, os.WriteFile(fmt.Sprintf("%s/names/%s-%d", dir, strings.Repeat("long", 20), i), nil, 0o644))
	}
	must0(t, os.Link(dir+"/large-0", dir+"/names/link"))
	must0(t, os.Symlink(strings.Repeat("s", 200), dir+"/names/symlink"))
	must0(t, unix.Mknod(dir+"/names/device", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must0(t, unix.Setxattr(dir+"/names", "trusted.large", bytes.Repeat([]byte("x"), 2000), 0))
	f, err := os.Create(dir + "/sparse")
	must0(t, err)
	defer f.Close()
	for i := range int64(500) { // more extents than fit in the inode
		_, err := f.WriteAt([]byte("piece"), i*3*blockSize)
		must0(t, err)
	}
	must0(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 2000*blockSize, 50*blockSize))
	must0(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 30*blockSize, 600*blockSize))
	must0(t, unix.Fallocate(int(f.Fd()), 0, 5000*blockSize, 100*blockSize))
	must0(t, f.Sync())
	must0(t, os.Rename(dir+"/large-1", dir+"/renamed"))
	must0(t, os.Truncate(dir+"/large-2", 5000))
	sync()
}

// dirty makes a filesystem in a file as a machine leaves it that loses its power, and
// makes copies of the file. While it is mounted, use may change it.
func dirty(t testing.TB, path string, use func(dir string) (end func()), copies ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a mount requires root")
	}
	dir, unmount := blocktest.Mount(t, path, "ext4", false)
	end := use(dir)
	for _, c := range copies {
		copySparse(t, c, path)
	}
	end()
	unmount()
}

// Replay does what e2fsck does: the same filesystem is recovered by both, and is equal
// but for a few fields of the superblock that e2fsck sets to the time, or counts.
func TestReplayIsThatOfE2fsck(t *testing.T) {
	if _, err := exec.LookPath("e2fsck"); err != nil {
		t.Skip("e2fsck is not installed")
	}
	root, _ := small()
	o := testOptions
	o.Size = 64 << 20
	for _, c := range []struct {
		name    string
		make    func(path string)
		orphans bool
	}{
		{"of thaw", func(path string) { must0(t, os.Rename(image(t, layout(t, root, o)), path)) }, false},
		{"with orphans", func(path string) { must0(t, os.Rename(image(t, layout(t, root, o)), path)) }, true},
		{"of mke2fs", func(path string) {
			must0(t, os.WriteFile(path, nil, 0o600))
			must0(t, os.Truncate(path, 64<<20))
			out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^resize_inode,sparse_super2,^orphan_file", "-E", "num_backup_sb=0", path).CombinedOutput()
			if err != nil {
				t.Fatalf("mke2fs: %v\n%s", err, out)
			}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path, theirs, ours := dir+"/device", dir+"/theirs", dir+"/ours"
			c.make(path)
			dirty(t, path, func(mounted string) (end func()) {
				end = func() {}
				if c.orphans {
					open, err := os.Create(mounted + "/deleted")
					must0(t, err)
					end = func() { open.Close() }
					_, err = open.Write(make([]byte, 100_000))
					must0(t, err)
					must0(t, os.Remove(mounted+"/deleted"))
				}
				churn(t, mounted)
				return end
			}, theirs, ours)
			d := openDisk(t, ours)
			size := d.size(t)
			st, err := ReadState(d)
			if err != nil || !st.Recover || !st.Dirty() || st.Orphans != c.orphans {
				t.Fatalf("the state is %+v, %v", st, err)
			}
			if err := Check(d, size); err == nil {
				t.Fatal("Check accepts a filesystem that needs recovery")
			}
			if err := CheckWritten(d, size); err != nil {
				t.Errorf("before the replay: %v", err)
			}
			done, err := Replay(d, size)
			if err != nil || !done.Needed || done.Transactions < 3 || done.Blocks == 0 || done.Revoked == 0 {
				t.Fatalf("replayed %+v, %v", done, err)
			}
			journalOnly(t, theirs)
			if c.orphans { // e2fsck removes them as well
				recovered := copySparse(t, dir+"/recovered", ours)
				journalOnly(t, recovered)
				sameDevices(t, theirs, recovered)
			} else {
				sameDevices(t, theirs, ours)
			}
			if st, err := ReadState(d); err != nil || st.Dirty() {
				t.Errorf("the state is %+v, %v", st, err)
			}
			if err := CheckWritten(d, size); err != nil {
				t.Errorf("after the replay: %v", err)
			}
			if again, err := Replay(d, size); err != nil || again != (Replayed{}) {
				t.Errorf("replayed again: %+v, %v", again, err)
			}
			if !c.orphans {
				fsck(t, ours)
			}
			mounted, unmount := blocktest.Mount(t, ours, "ext4", false)
			want := strings.Repeat("\xC0\x3B\x39\x98", 200_000)
			for name, n := range map[string]int{"large-0": len(want), "renamed": len(want), "large-2": 5000, "large-3": len(want)} {
				if got, err := os.ReadFile(filepath.Join(mounted, name)); err != nil || string(got) != want[:n] {
					t.Errorf("%s has %d bytes, %v", name, len(got), err)
				}
			}
			unmount()
			fsck(t, ours) // the kernel has removed the orphans
		})
	}
}

func journalOnly(t testing.TB, path string) {
	t.Helper()
	out, err := exec.Command("e2fsck", "-y", "-E", "journal_only", path).CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && (!errors.As(err, &exit) || exit.ExitCode() > 1) {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// The fields of the superblock that e2fsck changes and Replay does not, or the reverse.
var superFields = []struct {
	name     string
	from, to int
}{
	{"free blocks", sbFreeBlocks, sbFreeBlocks + 4}, // e2fsck leaves the sums to its next passes
	{"free inodes", sbFreeInodes, sbFreeInodes + 4},
	{"time of the last write", sbWriteTime, sbWriteTime + 4},
	{"kilobytes written", 0x178, 0x180},
	{"time of the last write, high half", sbWriteTimeHigh, sbWriteTimeHigh + 1},
	{"checksum", sbChecksum, sbChecksum + 4},
}

func sameDevices(t *testing.T, theirs, ours string) {
	t.Helper()
	a, b := openDisk(t, theirs), openDisk(t, ours)
	size := a.size(t)
	x, y := make([]byte, blockSize), make([]byte, blockSize)
	for at := int64(0); at < size; at += blockSize {
		for _, f := range []struct {
			d diskFile
			p []byte
		}{{a, x}, {b, y}} {
			if _, err := f.d.ReadAt(f.p, at); err != nil {
				t.Fatal(err)
			}
		}
		if at == 0 {
			for _, f := range superFields {
				clear(x[superblockOffset+f.from : superblockOffset+f.to])
				clear(y[superblockOffset+f.from : superblockOffset+f.to])
			}
		}
		if !bytes.Equal(x, y) {
			var where []string
			for i := range x {
				if x[i] != y[i] {
					where = append(where, fmt.Sprintf("%#x: %#x, %#x", i, x[i], y[i]))
				}
			}
			t.Errorf("block %d of e2fsck's and of thaw's recovery differs: %.300s", at/blockSize, strings.Join(where, "; "))
		}
	}
}

// dirtyImage is a device that a kernel left dirty, small and in memory.
func dirtyImage(t testing.TB) *memory {
	t.Helper()
	root, _ := small()
	o := testOptions
	o.Size = 9 << 20
	path := image(t, layout(t, root, o))
	after := t.TempDir() + "/dirty"
	dirty(t, path, func(dir string) func() {
		f, err := os.Open(dir)
		must0(t, err)
		defer f.Close()
		for i := range 3 {
			must0(t, os.Mkdir(fmt.Sprintf("%s/d%d", dir, i), 0o755))
			must0(t, unix.Syncfs(int(f.Fd())))
			must0(t, os.Remove(fmt.Sprintf("%s/d%d", dir, i)))
		}
		must0(t, unix.Syncfs(int(f.Fd())))
		return func() {}
	}, after)
	return readMemory(t, after)
}

func readMemory(t testing.TB, path string) *memory {
	t.Helper()
	b, err := os.ReadFile(path)
	must0(t, err)
	m := &memory{blocks: make(map[uint32][]byte), size: int64(len(b))}
	for i := 0; i < len(b); i += blockSize {
		if p := b[i : i+blockSize]; !bytes.Equal(p, make([]byte, blockSize)) {
			m.blocks[uint32(i/blockSize)] = p
		}
	}
	return m
}

func (m *memory) Flush() error { return nil }

// cutOff is a device that fails after some writes.
type cutOff struct {
	*memory
	left int
}

func (f *cutOff) WriteAt(p []byte, off int64) (int, error) {
	if f.left == 0 {
		return 0, unix.EIO
	}
	f.left--
	return f.memory.WriteAt(p, off)
}

// A replay that is cut off at any write is finished by another one.
func TestReplayIsRepeated(t *testing.T) {
	m := dirtyImage(t)
	want := m.clone()
	done, err := Replay(want, want.size)
	must0(t, err)
	if done.Blocks == 0 {
		t.Fatal("nothing to replay")
	}
	// The recovered view is what a replay makes.
	view, err := Recover(m, m.size)
	must0(t, err)
	a, b := make([]byte, m.size), make([]byte, m.size)
	for at := 0; at < len(a); { // pieces that are no blocks
		n := min(len(a)-at, 5000)
		if _, err := view.ReadAt(a[at:at+n], int64(at)); err != nil {
			t.Fatal(err)
		}
		at += n
	}
	if _, err := want.ReadAt(b, 0); err != nil || !bytes.Equal(a, b) {
		t.Errorf("the recovered view differs from the replay: %v", err)
	}
	for n := range done.Blocks + 2 {
		d := &cutOff{m.clone(), n}
		if _, err := Replay(d, d.size); !errors.Is(err, unix.EIO) {
			t.Fatalf("after %d writes: %v", n, err)
		}
		if _, err := Replay(d.memory, d.size); err != nil {
			t.Fatalf("again after %d writes: %v", n, err)
		}
		if err := CheckWritten(d.memory, d.size); err != nil {
			t.Fatalf("again after %d writes: %v", n, err)
		}
		if _, err := d.ReadAt(a, 0); err != nil {
			t.Fatal(err)
		}
		// The number of the next transaction counts the replays.
		js := int(journalStart(t, m)) * blockSize
		copy(a[js+jsSequence:js+jsSequence+4], b[js+jsSequence:])
		copy(a[js+jsChecksum:js+jsChecksum+4], b[js+jsChecksum:])
		if !bytes.Equal(a, b) {
			t.Fatalf("after %d writes and another replay, the device differs", n)
		}
	}
}

func journalStart(t testing.TB, m *memory) uint32 {
	t.Helper()
	c := &checker{r: m, size: m.size, used: true}
	must0(t, c.checkSuperblock())
	j, err := c.openJournal()
	must0(t, err)
	return j.extents[0].device
}

// A journal that is damaged, or that has what thaw does not replay, is refused with a
// sentence, and nothing is written.
func TestReplayRefuses(t *testing.T) {
	m := dirtyImage(t)
	start := journalStart(t, m)
	super := func(f func(b []byte)) func(*memory) {
		return func(m *memory) {
			b := m.blocks[start]
			f(b)
			be.PutUint32(b[jsChecksum:], 0)
			be.PutUint32(b[jsChecksum:], crc32c(^uint32(0), b[:1024]))
		}
	}
	first := be.Uint32(m.blocks[start][jsStart:])
	log := func(kind uint32) uint32 { // the first block of that kind in the log
		for i := start + first; i < start+1024; i++ {
			if b := m.blocks[i]; b != nil && be.Uint32(b) == journalMagic && be.Uint32(b[jhType:]) == kind {
				return i
			}
		}
		t.Fatalf("the log has no block of kind %d", kind)
		return 0
	}
	for name, c := range map[string]struct {
		plant func(m *memory)
		want  string
	}{
		"fast commits":         {super(func(b []byte) { b[jsIncompat+3] |= jsFastCommit }), "fast commits"},
		"asynchronous commits": {super(func(b []byte) { b[jsIncompat+3] |= jsAsyncCommit }), "asynchronous commits"},
		"checksums 1":          {super(func(b []byte) { b[jsCompat+3] |= 1 }), "checksums of version 1"},
		"checksums 2 and 3":    {super(func(b []byte) { b[jsIncompat+3] |= jsChecksumV2 }), "versions 2 and 3"},
		"an unknown feature":   {super(func(b []byte) { b[jsIncompat] = 0x80 }), "unknown features"},
		"another length":       {super(func(b []byte) { be.PutUint32(b[jsMaxLen:], 1<<30) }), "blocks"},
		"a start beyond":       {super(func(b []byte) { be.PutUint32(b[jsStart:], 1<<30) }), "start at block"},
		"a log from block 0":   {super(func(b []byte) { be.PutUint32(b[jsFirst:], 0) }), "log from block 0"},
		"a wrong checksum":     {func(m *memory) { m.blocks[start][jsSequence] ^= 1 }, "checksum"},
		"no superblock":        {func(m *memory) { m.blocks[start][0] = 0 }, "no superblock"},
		"a damaged commit":     {func(m *memory) { m.blocks[log(jhCommit)][100] ^= 1 }, "damaged"},
		"a damaged descriptor": {func(m *memory) { m.blocks[log(jhDescriptor)][2000] ^= 1 }, "damaged"},
		"a damaged block":      {func(m *memory) { m.blocks[log(jhDescriptor)+1][2000] ^= 1 }, "is damaged"},
	} {
		d := m.clone()
		c.plant(d)
		before := d.clone()
		if _, err := Replay(d, d.size); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		for i, b := range before.blocks {
			if !bytes.Equal(b, d.blocks[i]) {
				t.Fatalf("%s: block %d was written", name, i)
			}
		}
	}
	// A journal that writes to itself, or beyond the device.
	for _, block := range []uint32{start + 5, uint32(m.size / blockSize)} {
		d := m.clone()
		at := log(jhDescriptor)
		b := d.blocks[at]
		be.PutUint32(b[jhSize:], block)
		sealLog(d, start, b)
		if _, err := Replay(d, d.size); err == nil || !strings.Contains(err.Error(), "beyond the device or in the journal") {
			t.Errorf("block %d: %v", block, err)
		}
	}
	// A device without a filesystem, and one that is too short.
	for _, r := range []io.ReaderAt{strings.NewReader(""), bytes.NewReader(make([]byte, 1<<20))} {
		if _, err := ReadState(r); !errors.Is(err, ErrNotExt4) {
			t.Error(err)
		}
	}
}

// sealLog sets the checksum of a descriptor block.
func sealLog(m *memory, start uint32, b []byte) {
	seed := crc32c(^uint32(0), m.blocks[start][jsUUID:jsUUID+16])
	be.PutUint32(b[jtChecksum:], 0)
	be.PutUint32(b[jtChecksum:], crc32c(seed, b))
}

// The orphan list of a hostile filesystem ends.
func TestOrphanList(t *testing.T) {
	b := newBroken(t)
	number := func(name string) uint32 { return b.fs.nodes[b.set[name].index].number }
	link := func(list ...uint32) *memory {
		m := b.clone()
		s := m.blocks[0][superblockOffset:]
		le.PutUint32(s[sbLastOrphan:], list[0])
		le.PutUint32(s[sbChecksum:], crc32c(^uint32(0), s[:sbChecksum]))
		d := broken{m, b.fs, b.set}
		for i, n := range list[:len(list)-1] {
			in := d.inodeNumber(n)
			le.PutUint32(in[inDtime:], list[i+1])
			b.fs.sealInode(in, n)
		}
		return m
	}
	x, y := number("file"), number("xattrs")
	for _, c := range []struct {
		list []uint32
		want string
	}{
		{[]uint32{x, y, 0}, ""}, // both still have names: they were being cut short
		{[]uint32{x, y, x}, "orphan list"},
		{[]uint32{x, x}, "orphan list"},
		{[]uint32{1 << 30}, "orphan list"},
		{[]uint32{rootInode}, "orphan list"},
	} {
		m := link(c.list...)
		if err := Check(m, m.size); err == nil || !strings.Contains(err.Error(), "orphan list") {
			t.Errorf("%v: Check: %v", c.list, err)
		}
		err := CheckWritten(m, m.size)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%v: %v", c.list, err)
		}
	}
}

// FuzzReplay breaks the log, with checksums and without. edits are 5 bytes each: which
// block of the journal, where in it (2), what (2).
func FuzzReplay(f *testing.F) {
	m := madeUpLog(f)
	f.Add([]byte{})
	start := journalStart(f, m)
	for i := range byte(12) {
		for _, at := range []int{0, 4, 8, 12, 16, 18, 20, 24, 28, 40, 48, 4092} {
			f.Add([]byte{i, byte(at >> 8), byte(at), 0, 1})
			f.Add([]byte{i, byte(at >> 8), byte(at), 0xFF, 0xFF, i + 1, 0, 14, 0, 8})
		}
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		d := m.clone()
		for ; len(edits) >= 5; edits = edits[5:] {
			at := (int(edits[1])<<8 | int(edits[2])) % (blockSize - 1)
			block := start + uint32(edits[0])%64
			if d.blocks[block] == nil {
				d.blocks[block] = make([]byte, blockSize)
			}
			copy(d.blocks[block][at:], edits[3:5])
		}
		for _, lax := range []bool{false, true} {
			reads := &counting{memory: d.clone()}
			c := &checker{r: reads, size: d.size, used: true, lax: lax}
			if c.checkSuperblock() != nil {
				t.Fatal("the superblock was not edited")
			}
			v := &Recovered{r: reads, logged: make(map[uint32]logged)}
			err := v.read(c)
			if most := 8 * d.size; reads.bytes > most {
				t.Errorf("%d bytes read of a device of %d", reads.bytes, d.size)
			}
			if len(v.logged) > int(d.size/blockSize) {
				t.Errorf("%d blocks", len(v.logged))
			}
			if err == nil {
				v.needed = true
				if _, err := v.ReadAt(make([]byte, d.size), 0); err != nil {
					t.Error(err)
				}
			}
		}
		_, _ = Replay(d.clone(), d.size)
		_ = CheckWritten(d, d.size)
		_, _ = Diff(m, d, d.size, func(uint32, uint32) uint32 { return 1 })
		_, _ = Owners(d, d.size, []blockmap.Extent{{Start: 0, End: d.size}})
	})
}

// madeUpLog is a small filesystem with a log of two transactions, made without a kernel.
func madeUpLog(t testing.TB) *memory {
	t.Helper()
	b := newBroken(t)
	m := b.memory
	start := b.fs.geo.journal
	js := m.blocks[start]
	be.PutUint32(js[jsIncompat:], jsRevokes|js64bit|jsChecksumV3)
	be.PutUint32(js[jsStart:], 1)
	be.PutUint32(js[jsSequence:], 7)
	js[0x50] = 4 // crc32c
	be.PutUint32(js[jsChecksum:], crc32c(^uint32(0), js[:1024]))
	seed := crc32c(^uint32(0), js[jsUUID:jsUUID+16])
	at := start + 1
	next := func(kind, sequence uint32) []byte {
		p := make([]byte, blockSize)
		m.blocks[at] = p
		at++
		be.PutUint32(p, journalMagic)
		be.PutUint32(p[jhType:], kind)
		be.PutUint32(p[jhSequence:], sequence)
		return p
	}
	descriptor := func(sequence uint32, blocks ...uint32) {
		d := next(jhDescriptor, sequence)
		for i, n := range blocks {
			copyOf := make([]byte, blockSize)
			copy(copyOf, m.blocks[n])
			m.blocks[at] = copyOf
			at++
			tag := d[jhSize+16*i:]
			if i > 0 {
				tag = d[jhSize+16*i+16:]
			}
			be.PutUint32(tag, n)
			var flags uint32
			if i > 0 {
				flags |= tagSameUUID
			}
			if i == len(blocks)-1 {
				flags |= tagLast
			}
			be.PutUint32(tag[4:], flags)
			var s [4]byte
			be.PutUint32(s[:], sequence)
			be.PutUint32(tag[12:], crc32c(crc32c(seed, s[:]), copyOf))
		}
		be.PutUint32(d[jtChecksum:], crc32c(seed, d))
	}
	commit := func(sequence uint32) {
		c := next(jhCommit, sequence)
		be.PutUint64(c[cmSeconds:], uint64(1_700_000_000+sequence))
		be.PutUint32(c[cmChecksum:], crc32c(seed, c))
	}
	content := b.fs.geo.content
	descriptor(7, 0, b.fs.geo.inodeTables, content, content+1)
	commit(7)
	r := next(jhRevoke, 8)
	be.PutUint32(r[rvCount:], rvFirst+8)
	be.PutUint64(r[rvFirst:], uint64(content+1))
	be.PutUint32(r[jtChecksum:], crc32c(seed, r))
	descriptor(8, content)
	commit(8)
	s := m.blocks[0][superblockOffset:]
	le.PutUint32(s[sbFeatureIncompat:], le.Uint32(s[sbFeatureIncompat:])|incompatRecover)
	le.PutUint32(s[sbChecksum:], crc32c(^uint32(0), s[:sbChecksum]))
	return m
}

// A log is replayed as the kernel does: the last copy of a block wins, unless it was
// revoked.
func TestReplayOfMadeUpLog(t *testing.T) {
	m := madeUpLog(t)
	done, err := Replay(m, m.size)
	if want := (Replayed{Needed: true, Transactions: 2, Blocks: 3, Revoked: 1}); err != nil || done != want {
		t.Fatalf("%+v, %v", done, err)
	}
	if err := CheckWritten(m, m.size); err != nil {
		t.Error(err)
	}
}

// A journal of revoke blocks takes no more memory than the blocks that it has.
func TestReplayOfRevokesOnly(t *testing.T) {
	m := madeUpLog(t)
	c := &checker{r: m, size: m.size, used: true}
	must0(t, c.checkSuperblock())
	j, err := c.openJournal()
	must0(t, err)
	var revokes []logBlock
	for i := uint32(1); i < 200; i++ {
		p := make([]byte, blockSize)
		m.blocks[j.device(i)] = p
		be.PutUint32(p[rvCount:], jtChecksum)
		for at := rvFirst; at+8 <= jtChecksum; at += 8 {
			be.PutUint64(p[at:], uint64(i)<<20|uint64(at))
		}
		revokes = append(revokes, logBlock{i, 7})
	}
	revoked, err := j.revoked(nil, revokes, 8)
	if err != nil || len(revoked) != 0 {
		t.Errorf("%d blocks that the log does not have are kept as revoked, %v", len(revoked), err)
	}
}
