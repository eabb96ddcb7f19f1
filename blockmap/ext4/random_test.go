package ext4

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"thaw/blockmap/blocktest"
)

// randomTree makes a tree of about n inodes with something of everything.
func randomTree(r *rand.Rand, n int) *Inode {
	var files []*Inode
	dirs := []*Inode{dir()}
	streams := make([]uint32, 1+r.IntN(6))
	chance := func(percent int) bool { return r.IntN(100) < percent }
	decorate := func(in *Inode) {
		in.Mode = in.Mode&modeType | r.Uint32N(0o10000)
		if in.is(modeDir) {
			in.Mode |= 0o700
		}
		if chance(30) {
			in.UID, in.GID = r.Uint32()&^1, r.Uint32()&^1 // all ones is no owner
		}
		in.Mtime = Time{r.Int64N(1 << 34), r.Uint32N(1e9)}
		in.Atime = Time{-r.Int64N(1 << 31), r.Uint32N(1e9)}
		if !chance(20) || !in.is(modeRegular) && !in.is(modeDir) {
			return // the kernel gives user.* to no others
		}
		for i := range 1 + r.IntN(5) {
			value := bytes.Repeat([]byte{byte(r.IntN(3))}, r.IntN(1<<r.IntN(9)))
			in.Xattrs = append(in.Xattrs, Xattr{fmt.Sprintf("%s%d%s", []string{"user.", "trusted.", "security."}[r.IntN(3)], i,
				strings.Repeat("x", r.IntN(20))), value})
		}
	}
	for i := range n {
		parent := dirs[r.IntN(len(dirs))]
		if chance(30) {
			parent = dirs[0]
		}
		name := fmt.Sprint(i, strings.Repeat(string([]byte{byte(200 + i%50)}), r.IntN(1<<r.IntN(8))))
		var in *Inode
		switch p := r.IntN(100); {
		case p < 10:
			in = dir()
			dirs = append(dirs, in)
		case p < 20:
			in = symlink(strings.Repeat("t", 1+r.IntN(1<<r.IntN(12))))
		case p < 25:
			in = &Inode{Mode: modeBlock, Major: r.Uint32N(4096), Minor: r.Uint32N(1 << r.IntN(21))}
		case p < 27:
			in = &Inode{Mode: []uint32{modeFifo, modeSocket}[p%2]}
		case p < 32 && len(files) > 0:
			parent.Entries = append(parent.Entries, Dirent{name, files[r.IntN(len(files))]})
			continue
		default:
			in = file(0)
			files = append(files, in)
			next := uint32(0)
			for range r.IntN(1 << r.IntN(6)) {
				s := r.IntN(len(streams))
				run := Run{next, uint32(s + 1), streams[s], 1 + r.Uint32N(1<<r.IntN(6))}
				streams[s] += run.Count
				next += run.Count
				if chance(10) {
					streams[s] += r.Uint32N(100)
				}
				if chance(10) {
					next += r.Uint32N(1 << 20)
				}
				in.Data = append(in.Data, run)
			}
			in.Size = int64(next)*blockSize + r.Int64N(100_000)
		}
		decorate(in)
		parent.Entries = append(parent.Entries, Dirent{name, in})
	}
	decorate(dirs[0])
	return dirs[0]
}

func TestRandomTrees(t *testing.T) {
	n := uint64(30)
	if testing.Short() {
		n = 5
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			o := testOptions
			o.Size = r.Int64N(1 << (20 + r.IntN(14)))
			if seed%2 == 1 {
				o.dxFan = 2 + r.IntN(20)
			}
			verify(t, randomTree(r, 1<<r.IntN(12)), o)
		})
	}
}

// Check is not only about what Layout writes: it takes what mke2fs and the
// kernel write with the same features, and what the kernel makes of it.
func TestCheckOthers(t *testing.T) {
	for _, seed := range []string{"metadata_csum_seed", "^metadata_csum_seed"} {
		t.Run(seed, func(t *testing.T) { checkOthers(t, seed) })
	}
}

func checkOthers(t *testing.T, feature string) {
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("mke2fs is not installed")
	}
	tree := t.TempDir()
	for i := range 500 {
		if err := os.WriteFile(fmt.Sprint(tree, "/\xe9 file of some length ", i), bytes.Repeat([]byte("mke2fs"), i*50), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	path := t.TempDir() + "/device"
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-d", tree,
		"-O", "^resize_inode,sparse_super2,^orphan_file,large_dir,"+feature, "-E", "num_backup_sb=0", path).CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	fsck(t, path)

	mounted, unmount := blocktest.Mount(t, path, "ext4", false)
	for _, script := range []string{
		"mkdir d && cd d && seq -f 'a file of the kernel, number %g' 30000 | xargs -d '\\n' touch",
		"cd d && seq -f 'a file of the kernel, number %g' 1 3 30000 | xargs -d '\\n' rm",
		"for i in $(seq 300); do mkdir -p p/$i/q; ln -s $(printf '%0'$i'd' 0) p/$i/link; ln p/1/link p/hard-$i; mkfifo p/$i/fifo; done",
		"for i in $(seq 2000); do dd if=/dev/zero of=holes bs=4096 count=1 seek=$((i*2)) conv=notrunc status=none; done",
		"touch reserved; fallocate -n -l 50M reserved; fallocate -l 50M unwritten",
		"touch x y; setfattr -n user.a -v $(printf '%03000d' 0) x; setfattr -n user.a -v $(printf '%03000d' 0) y; setfattr -n user.$(printf '\\300') -v b x",
		"touch acl; if command -v setfacl; then setfacl -m u:1000:rw acl; fi",
	} {
		cmd := exec.Command("sh", "-ec", script)
		cmd.Dir = mounted
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	unmount()
	fsck(t, path)
}

// Two may write the metadata at the same time.
func TestConcurrentWriteMeta(t *testing.T) {
	fs := layout(t, randomTree(rand.New(rand.NewPCG(7, 7)), 2000), testOptions)
	var out [4]bytes.Buffer
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() {
			if err := fs.WriteMeta(&out[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range out {
		if !bytes.Equal(out[0].Bytes(), out[i].Bytes()) {
			t.Errorf("writer %d wrote other bytes", i)
		}
	}
}

// The features are those of mke2fs, no more.
func TestFeatures(t *testing.T) {
	path := image(t, layout(t, dir(), testOptions))
	out, err := exec.Command("dumpe2fs", "-h", path).Output()
	if err != nil {
		t.Skip("dumpe2fs is not installed")
	}
	for _, want := range []string{
		"features:      has_journal ext_attr dir_index sparse_super2 filetype extent 64bit flex_bg metadata_csum_seed sparse_super large_file huge_file dir_nlink extra_isize metadata_csum\n",
		"volume name:   thaw-test\n",
		"UUID:          74686177-0102-4304-8506-0708090a0b0c\n",
		"Hash Seed:      01020304-0506-0708-090a-0b0c0d0e0f10\n",
		"Reserved block count:     0\n",
		"state:         clean\n",
		"Journal size:       32M\n", "Journal start:            0\n",
		"Checksum type:            crc32c\n",
	} {
		if !strings.Contains(strings.ReplaceAll(string(out), "Total journal size", "Journal size"), want) &&
			!strings.Contains(string(out), want) {
			t.Errorf("dumpe2fs is without %q:\n%s", want, out)
		}
	}
}

// A filesystem made at no time, and one made far in the future.
func TestTimeOfMaking(t *testing.T) {
	for _, sec := range []int64{0, -5, 1} {
		o := testOptions
		o.Time = Time{Sec: sec}
		fsck(t, image(t, layout(t, everything(), o)))
	}
	o := testOptions
	o.Time.Sec = 1 << 50
	if err := layout(t, everything(), o).WriteMeta(io.Discard); err != nil {
		t.Fatal(err)
	}
}
