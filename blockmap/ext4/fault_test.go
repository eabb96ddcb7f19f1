package ext4

import (
	"errors"
	"io"
	"strings"
	"testing"
)

// What cannot be laid out is said in a sentence with the path in it.
func TestLayoutErrors(t *testing.T) {
	loop := dir()
	loop.Entries = []Dirent{{"a", dir(Dirent{"again", loop})}}
	twice := dir()
	many := dir()
	shared := file(0)
	for _, name := range names("l", maxLinks+1) {
		many.Entries = append(many.Entries, Dirent{name, shared})
	}
	deep := dir(Dirent{".", file(0)})
	for range 100_000 {
		deep = dir(Dirent{"d", deep})
	}
	in := func(in *Inode) *Inode { return dir(Dirent{"etc", dir(Dirent{"bad", in})}) }
	entry := func(name string) *Inode { return dir(Dirent{"etc", dir(Dirent{name, file(0)})}) }
	run := func(size int64, r ...Run) *Inode { return in(file(size, r...)) }
	xattr := func(l ...Xattr) *Inode { return in(withXattrs(file(0), l...)) }
	const full = 4096 - 32 - 4 - 20

	for _, test := range []struct {
		name string
		root *Inode
		want []string
	}{
		{"no root", nil, []string{"root"}},
		{"root is a file", file(0), []string{"root", "not a directory"}},
		{"root has a target", &Inode{Mode: modeDir, Target: "x"}, []string{`"/"`, "target"}},
		{"empty name", entry(""), []string{`"/etc"`, "empty name"}},
		{"dot", entry("."), []string{`"/etc"`, `"."`}},
		{"dot dot", entry(".."), []string{`"/etc"`, `".."`}},
		{"slash", entry("a/b"), []string{`"/etc"`, `"a/b"`}},
		{"NUL", entry("a\x00b"), []string{`"/etc"`, `"a\x00b"`}},
		{"long name", entry(strings.Repeat("n", 256)), []string{`"/etc"`, "256", "nnn"}},
		{"two entries", dir(Dirent{"etc", dir(Dirent{"x", file(0)}, Dirent{"y", file(0)}, Dirent{"x", file(1)})}), []string{`"/etc"`, `"x"`}},
		{"no inode", dir(Dirent{"etc", dir(Dirent{"x", nil})}), []string{`"/etc"`, `"x"`}},
		{"hard-linked directory", dir(Dirent{"a", twice}, Dirent{"b", dir(Dirent{"c", twice})}), []string{`"/b"`, `"c"`, `"/a"`}},
		{"cycle", loop, []string{`"/a"`, `"again"`, `"/"`}},
		{"links", many, []string{`"/l0"`, "65000"}},
		{"deep", deep, []string{`: "...`, `/d/d" has an entry "."`}},

		{"mode", in(&Inode{Mode: 0o644}), []string{`"/etc/bad"`, "mode"}},
		{"type", in(&Inode{Mode: 0o050644}), []string{`"/etc/bad"`, "mode"}},
		{"mode bits", in(&Inode{Mode: 1<<16 | modeRegular}), []string{`"/etc/bad"`, "mode"}},
		{"size of a fifo", in(&Inode{Mode: modeFifo, Size: 1}), []string{`"/etc/bad"`, "size"}},
		{"data of a directory", in(&Inode{Mode: modeDir, Data: []Run{{0, 1, 0, 1}}}), []string{`"/etc/bad"`, "data"}},
		{"entries of a file", in(&Inode{Mode: modeRegular, Entries: []Dirent{{"x", file(0)}}}), []string{`"/etc/bad"`, "entries"}},
		{"target of a file", in(&Inode{Mode: modeRegular, Target: "x"}), []string{`"/etc/bad"`, "target"}},
		{"number of a file", in(&Inode{Mode: modeRegular, Minor: 1}), []string{`"/etc/bad"`, "device"}},
		{"major", in(&Inode{Mode: modeChar, Major: 4096}), []string{`"/etc/bad"`, "4096:0"}},
		{"minor", in(&Inode{Mode: modeBlock, Minor: 1 << 20}), []string{`"/etc/bad"`, "0:1048576"}},
		{"empty symlink", in(symlink("")), []string{`"/etc/bad"`, "without a target"}},
		{"long symlink", in(symlink(strings.Repeat("s", 4096))), []string{`"/etc/bad"`, "4096", "4095"}},
		{"symlink with NUL", in(symlink("a\x00b")), []string{`"/etc/bad"`, "NUL"}},
		{"negative size", in(file(-1)), []string{`"/etc/bad"`, "-1"}},
		{"size", in(file(maxFileSize + 1)), []string{`"/etc/bad"`, "bytes"}},

		{"empty run", run(4096, Run{0, 1, 0, 0}), []string{`"/etc/bad"`, "no blocks"}},
		{"stream 0", run(4096, Run{0, 0, 0, 1}), []string{`"/etc/bad"`, "stream 0"}},
		{"order", run(3*4096, Run{1, 1, 0, 1}, Run{0, 1, 1, 1}), []string{`"/etc/bad"`, "file block 0"}},
		{"overlap in the file", run(3*4096, Run{0, 1, 0, 2}, Run{1, 1, 7, 1}), []string{`"/etc/bad"`, "file block 1"}},
		{"beyond the size", run(4096, Run{0, 1, 0, 2}), []string{`"/etc/bad"`, "4096"}},
		{"beyond the size by far", run(4096, Run{1<<32 - 1, 1, 0, 1<<32 - 1}), []string{`"/etc/bad"`, "4096"}},
		{"beyond the stream", run(3*4096, Run{0, 1, 1<<32 - 2, 3}), []string{`"/etc/bad"`, "stream 1"}},
		{"overlap in the stream", dir(Dirent{"a", file(4*4096, Run{0, 5, 10, 4})}, Dirent{"b", file(4096, Run{0, 5, 13, 1})}),
			[]string{`"/a"`, `"/b"`, "block 13 of stream 5"}},
		{"too much", dir(Dirent{"a", file(maxFileSize, Run{0, 5, 0, 1<<32 - 1})}, Dirent{"b", file(4096, Run{0, 6, 0, 1})}), []string{"4294967296"}},
		{"too much with metadata", dir(Dirent{"a", file(maxFileSize, Run{0, 5, 0, 1<<32 - 1})}), []string{"at most 4294967295"}},

		{"xattr namespace", xattr(Xattr{"system.nfs4_acl", nil}), []string{`"/etc/bad"`, "system.nfs4_acl"}},
		{"xattr without namespace", xattr(Xattr{"mime_type", nil}), []string{`"/etc/bad"`, "mime_type"}},
		{"xattr without name", xattr(Xattr{"user.", nil}), []string{`"/etc/bad"`, `"user."`}},
		{"xattr with NUL", xattr(Xattr{"user.a\x00b", nil}), []string{`"/etc/bad"`, "user.a"}},
		{"xattr with a long name", xattr(Xattr{"user." + strings.Repeat("n", 256), nil}), []string{`"/etc/bad"`, "user.nnn"}},
		{"xattr twice", xattr(Xattr{"user.a", nil}, Xattr{"user.b", nil}, Xattr{"user.a", []byte("x")}), []string{`"/etc/bad"`, `"user.a"`}},
		{"xattr too large", xattr(Xattr{"user.small", nil}, Xattr{"user.abcd", make([]byte, full+1)}), []string{`"/etc/bad"`, "user.abcd", "4041"}},
		{"xattrs too large", xattr(Xattr{"user.abcd", make([]byte, full)}, Xattr{"user.efgh", make([]byte, 69)}), []string{`"/etc/bad"`, "user.efgh", "69"}},
		{"ACL of odd size", xattr(Xattr{"system.posix_acl_access", accessACL[:13]}), []string{`"/etc/bad"`, "posix_acl_access", "13"}},
		{"ACL of no size", xattr(Xattr{"system.posix_acl_access", nil}), []string{`"/etc/bad"`, "posix_acl_access"}},
		{"ACL version", xattr(Xattr{"system.posix_acl_default", []byte{1, 0, 0, 0}}), []string{`"/etc/bad"`, "posix_acl_default", "version"}},
		{"ACL tag", xattr(Xattr{"system.posix_acl_default", acl([3]uint32{3, 0, 0})}), []string{`"/etc/bad"`, "posix_acl_default", "0x3"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Layout(test.root, testOptions)
			if err == nil {
				t.Fatal("Layout succeeded")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error is without %s: %.300v", want, err)
				}
			}
		})
	}
}

func TestOptionErrors(t *testing.T) {
	for want, change := range map[string]func(o *Options){
		"UUID":   func(o *Options) { o.UUID = [16]byte{} },
		"label":  func(o *Options) { o.Label = "seventeen letters" },
		"-1":     func(o *Options) { o.Size = -1 },
		"blocks": func(o *Options) { o.Size = 16 << 40 },
		"4 KiB":  func(o *Options) { o.Size = 1<<63 - 1 },
	} {
		o := testOptions
		change(&o)
		if _, err := Layout(dir(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// The most hard links that a file can have.
func TestManyLinks(t *testing.T) {
	root := dir()
	shared := file(5, Run{0, 1, 0, 1})
	for _, name := range names("l", maxLinks) {
		root.Entries = append(root.Entries, Dirent{name, shared})
	}
	fsck(t, image(t, layout(t, root, testOptions)))
}

var errFull = errors.New("full")

// fullWriter takes left bytes and then fails.
type fullWriter struct{ left int }

func (w *fullWriter) Write(p []byte) (int, error) {
	n := min(w.left, len(p))
	w.left -= n
	if n < len(p) {
		return n, errFull
	}
	return n, nil
}

func TestWriteErrors(t *testing.T) {
	root := everything()
	root.Entries = append(root.Entries, Dirent{"fragments", fragmented(3000, 9)})
	for _, name := range names("f", 20_000) {
		root.Entries = append(root.Entries, Dirent{name, file(0)})
	}
	o := testOptions
	o.Size = 200 << 30 // for a journal with an extent tree
	fs := layout(t, root, o)
	size := int(fs.metaBlocks()) * blockSize
	for n := 0; n < size; n += 40_000 {
		if err := fs.WriteMeta(&fullWriter{n}); !errors.Is(err, errFull) {
			t.Fatalf("after %d of %d bytes: %v", n, size, err)
		}
	}
	if err := fs.WriteMeta(&fullWriter{size}); err != nil {
		t.Fatal(err)
	}
	if err := fs.WriteMeta(io.Discard); err != nil {
		t.Fatal(err)
	}
}
