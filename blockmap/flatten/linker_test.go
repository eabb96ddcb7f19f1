package flatten

import (
	"debug/elf"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

func lib(name string, m madeELF) line { return reg(name, m.bytes()) }

func prog(m madeELF) line {
	if m.interp == "" {
		m.interp = "/lib/ld.so"
	}
	return exe("opt/bin/prog", m.bytes())
}

var linkCases = []struct {
	name  string
	env   []string
	lines []line
	want  string // without the program and /lib/ld.so
}{
	{"static", nil, []line{exe("opt/bin/prog", madeELF{needed: []string{"liba.so"}}.bytes()), lib("lib/liba.so", madeELF{})}, ""},
	{"no linker", nil, []line{prog(madeELF{interp: "/lib/none", needed: []string{"liba.so"}}), lib("lib/liba.so", madeELF{})}, ""},
	{"transitive, each once, breadth first", nil, []line{
		prog(madeELF{needed: []string{"liba.so", "libb.so"}}),
		lib("lib/liba.so", madeELF{needed: []string{"libc.so", "libb.so"}}), lib("usr/lib/libb.so", madeELF{needed: []string{"liba.so", "libd.so"}}),
		lib("lib64/libc.so", madeELF{}), lib("usr/lib/x86_64-linux-gnu/libd.so", madeELF{}),
	}, "/lib/liba.so /usr/lib/libb.so /lib64/libc.so /usr/lib/x86_64-linux-gnu/libd.so"},
	{"another architecture earlier in the path", []string{"LD_LIBRARY_PATH=/a:/b:/c"}, []line{
		prog(madeELF{needed: []string{"liba.so"}}),
		lib("a/liba.so", madeELF{class: elf.ELFCLASS32, machine: elf.EM_386}), lib("b/liba.so", madeELF{machine: elf.EM_AARCH64}),
		lib("c/liba.so", madeELF{}), lib("lib/liba.so", madeELF{}),
	}, "/c/liba.so"},
	{"32 bits", nil, []line{
		prog(madeELF{class: elf.ELFCLASS32, machine: elf.EM_386, needed: []string{"liba.so"}}),
		lib("lib/i386-linux-gnu/liba.so", madeELF{class: elf.ELFCLASS32, machine: elf.EM_386, needed: []string{"libb.so"}}),
		lib("lib/libb.so", madeELF{}), lib("usr/lib/libb.so", madeELF{class: elf.ELFCLASS32, machine: elf.EM_386}),
	}, "/lib/i386-linux-gnu/liba.so /usr/lib/libb.so"},
	{"a link to the library", nil, []line{prog(madeELF{needed: []string{"liba.so"}}), symlink("lib/liba.so", "liba.so.1"), lib("lib/liba.so.1", madeELF{})}, "/lib/liba.so.1"},
	{"a loop in the place of the library", nil, []line{prog(madeELF{needed: []string{"liba.so"}}), symlink("lib64/liba.so", "liba.so"), lib("usr/lib/liba.so", madeELF{})}, "/usr/lib/liba.so"},
	{"no library, and the rest", nil, []line{prog(madeELF{needed: []string{"none.so", "liba.so"}}), lib("lib/liba.so", madeELF{})}, "/lib/liba.so"},
	{"a path for a name", nil, []line{prog(madeELF{needed: []string{"/x/liba.so", "${ORIGIN}/libb.so"}}), lib("x/liba.so", madeELF{}), lib("opt/bin/libb.so", madeELF{})}, "/opt/bin/libb.so /x/liba.so"},
	{"a name that is loaded", nil, []line{
		prog(madeELF{needed: []string{"liba.so.1", "libb.so"}}),
		lib("lib/liba.so.1", madeELF{soname: "libb.so"}), lib("lib/libb.so", madeELF{}),
	}, "/lib/liba.so.1"},
	{"$ORIGIN behind links", nil, []line{
		symlink("run", "/link/prog"), symlink("link", "opt/bin"),
		prog(madeELF{needed: []string{"liba.so"}, runpath: "$ORIGIN/../lib:/nowhere"}), lib("opt/lib/liba.so", madeELF{}), lib("lib/liba.so", madeELF{}),
	}, "/opt/lib/liba.so"},
	{"a runpath is the object's own", nil, []line{
		prog(madeELF{needed: []string{"liba.so"}, runpath: "/x"}), lib("x/liba.so", madeELF{needed: []string{"libb.so"}}),
		lib("x/libb.so", madeELF{}), lib("lib/libb.so", madeELF{}),
	}, "/lib/libb.so /x/liba.so"},
	{"an rpath is inherited", nil, []line{
		prog(madeELF{needed: []string{"liba.so"}, rpath: "/x"}), lib("x/liba.so", madeELF{needed: []string{"libb.so"}, rpath: "/y"}),
		lib("x/libb.so", madeELF{}), lib("lib/libb.so", madeELF{}),
	}, "/x/liba.so /x/libb.so"},
	{"not to an object with a runpath", nil, []line{
		prog(madeELF{needed: []string{"liba.so"}, rpath: "/x"}), lib("x/liba.so", madeELF{needed: []string{"libb.so"}, runpath: "/y"}),
		lib("x/libb.so", madeELF{}), lib("lib/libb.so", madeELF{}),
	}, "/lib/libb.so /x/liba.so"},
	{"rpath, environment, runpath", []string{"LD_LIBRARY_PATH=/e"}, []line{
		prog(madeELF{needed: []string{"liba.so"}, rpath: "/x"}), lib("x/liba.so", madeELF{needed: []string{"libb.so"}, runpath: "/y"}),
		lib("e/liba.so", madeELF{}), lib("e/libb.so", madeELF{}), lib("y/libb.so", madeELF{}),
	}, "/e/libb.so /x/liba.so"},
	{"preloaded", []string{"LD_PRELOAD=/x/p.so q.so"}, []line{
		prog(madeELF{needed: []string{"liba.so"}}), lib("x/p.so", madeELF{needed: []string{"libp.so"}}), lib("lib/q.so", madeELF{}), lib("lib/r.so", madeELF{}),
		lib("lib/libp.so", madeELF{}), lib("lib/liba.so", madeELF{}), reg("etc/ld.so.preload", "/lib/r.so\n"), reg("etc/ld.so.cache", "x"),
	}, "/etc/ld.so.cache /etc/ld.so.preload /lib/liba.so /lib/libp.so /lib/q.so /lib/r.so /x/p.so"},
	{"configured", nil, []line{
		prog(madeELF{needed: []string{"liba.so", "libb.so", "libc.so"}}),
		reg("etc/ld.so.conf", "# comment\ninclude ld.so.conf.d/*.conf nowhere*\ninclude /etc/ld.so.conf\n/x # and more\n"),
		reg("etc/ld.so.conf.d/b.conf", "/b\n"), reg("etc/ld.so.conf.d/a.conf", "/a:/c\n"), reg("etc/ld.so.conf.d/not", "/n\n"),
		lib("b/liba.so", madeELF{}), lib("a/liba.so", madeELF{}), lib("x/libb.so", madeELF{}), lib("n/libc.so", madeELF{}), lib("c/libc.so", madeELF{}),
	}, "/a/liba.so /c/libc.so /x/libb.so"},
	{"musl", nil, []line{
		prog(madeELF{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"liba.so", "libc.musl-x86_64.so.1"}, runpath: "/x"}),
		exe("lib/ld-musl-x86_64.so.1", madeELF{}.bytes()), symlink("lib/libc.musl-x86_64.so.1", "ld-musl-x86_64.so.1"),
		reg("etc/ld-musl-x86_64.path", "/x\n/y:/z\n"), lib("x/liba.so", madeELF{needed: []string{"libb.so"}}), lib("z/libb.so", madeELF{}), lib("lib/libb.so", madeELF{}),
	}, "/etc/ld-musl-x86_64.path /lib/ld-musl-x86_64.so.1 /x/liba.so /z/libb.so"},
	{"musl by default", nil, []line{
		prog(madeELF{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"liba.so"}}),
		exe("lib/ld-musl-x86_64.so.1", madeELF{}.bytes()), lib("usr/local/lib/liba.so", madeELF{}),
	}, "/lib/ld-musl-x86_64.so.1 /usr/local/lib/liba.so"},
}

func TestLinker(t *testing.T) {
	for _, c := range linkCases {
		t.Run(c.name, func(t *testing.T) {
			lines := append([]line{exe("lib/ld.so", madeELF{soname: "ld.so"}.bytes())}, c.lines...)
			config := v1.Config{Cmd: []string{"/opt/bin/prog"}, Env: c.env}
			if c.lines[0].Name == "run" {
				config.Cmd = []string{"/run"}
			}
			names := guessed(t, config, lines...)
			if len(names) == 0 || names[0] != "/opt/bin/prog" {
				t.Fatalf("guessed %v", names)
			}
			names = slices.DeleteFunc(names[1:], func(s string) bool { return s == "/lib/ld.so" })
			if c.name != "transitive, each once, breadth first" {
				slices.Sort(names)
			}
			if got := strings.Join(names, " "); got != c.want {
				t.Errorf("guessed %s\nwant    %s", got, c.want)
			}
		})
	}
}

// TestLinkerOfThisMachine asks the machine's own linker, within a root of its
// own, what it would load for the machine's programs, whose libraries are
// scattered about.
func TestLinkerOfThisMachine(t *testing.T) {
	need(t, "root", "ldconfig", "chroot", "ldd")
	const ld = "/lib64/ld-linux-x86-64.so.2"
	if _, err := os.Stat(ld); err != nil {
		t.Skip(err)
	}
	ran := 0
	for _, program := range []string{"/bin/ls", "/usr/bin/python3", "/usr/bin/nbdcopy"} {
		if _, err := os.Stat(program); err != nil {
			continue
		}
		dst := newTarget(t) // the image is the same for each environment
		for _, env := range []string{"", "LD_LIBRARY_PATH=/opt/1:/opt/2"} {
			root := t.TempDir()
			lines := []line{dir("opt"), reg("etc/ld.so.conf", "include /etc/conf.d/*.conf\n"), reg("etc/conf.d/z.conf", "/opt/0\n"), reg("etc/conf.d/y.conf", "/opt/2\n/opt/1\n")}
			put := func(name, from string) {
				b, err := os.ReadFile(from)
				if err != nil {
					t.Fatal(err)
				}
				lines = append(lines, exe(name, string(b)))
			}
			put("bin/prog", program)
			put(ld[1:], ld)
			// They are in three places, one of them in two, and there is a
			// wrong one of each where it may be found first.
			for i, lib := range needs(t, ld, program, "", "") {
				if filepath.Base(lib) == filepath.Base(ld) {
					continue
				}
				in := func(k int) string { return fmt.Sprintf("opt/%d/%s", (i+k)%3, filepath.Base(lib)) }
				put(in(0), lib)
				if i == 0 {
					put(in(1), lib)
				}
				lines = append(lines, reg(in(2), madeELF{class: elf.ELFCLASS32, machine: elf.EM_386, soname: filepath.Base(lib)}.bytes()))
			}
			for _, l := range lines {
				if l.Typeflag != '5' {
					writeFile(t, filepath.Join(root, l.Name), []byte(l.body))
					if err := os.Chmod(filepath.Join(root, l.Name), 0o755); err != nil {
						t.Fatal(err)
					}
				}
			}
			run(t, "ldconfig", "-X", "-r", root)
			want := needs(t, ld, "/bin/prog", root, env)
			var c v1.Config
			c.Cmd = []string{"/bin/prog"}
			if env != "" {
				c.Env = []string{env}
			}
			names, _ := guessedParts(t, dst, c, lines...)
			if len(names) < 2 || names[0] != "/bin/prog" || names[1] != ld {
				t.Fatalf("guessed %v", names)
			}
			if got := names[2:]; !slices.Equal(got, want) {
				t.Errorf("%s, %s: guessed\n%s\nthe linker loads\n%s", program, env, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			ran++
		}
	}
	if ran == 0 {
		t.Error("none of the programs is there")
	}
}

// needs is what the machine's linker says that it loads, in its order.
func needs(t testing.TB, ld, program, root, env string) (libs []string) {
	t.Helper()
	cmd := exec.Command(ld, "--list", program)
	if root != "" {
		cmd = exec.Command("chroot", root, ld, "--list", program)
	}
	cmd.Env = nil
	if env != "" {
		cmd.Env = []string{env}
	}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s --list %s: %v", ld, program, err)
	}
	for l := range strings.Lines(string(out)) {
		if _, to, ok := strings.Cut(l, " => /"); ok {
			if file := "/" + strings.Fields(to)[0]; file != ld {
				libs = append(libs, file)
			}
		}
	}
	return libs
}

// elfOf is a file with these bytes, all of it read already.
func elfOf(t testing.TB, b []byte) (*contents, *ext4.Inode) {
	t.Helper()
	n := uint32(len(b)+blockSize-1) / blockSize
	in := &ext4.Inode{Mode: modeRegular | 0o755, Size: int64(len(b))}
	if n > 0 {
		in.Data = []ext4.Run{{Stream: 1, Count: n}}
	}
	held := make([]byte, int(n)*blockSize)
	copy(held, b)
	return &contents{
		streams: []Stream{{}, {Table: &blockmap.Table{Chunks: []blockmap.Chunk{{Count: n}}}}},
		held:    []heldChunk{{stream: 1, chunk: 0, b: held}},
	}, in
}

// FuzzELF reads files that nothing is known of as ELF files, and lets a program
// be made of them.
func FuzzELF(f *testing.F) {
	for _, m := range []madeELF{
		{}, {interp: "/prog", needed: []string{"prog", "/prog", "$ORIGIN/prog"}, soname: "x", rpath: "/:$ORIGIN", runpath: ":"},
		{class: elf.ELFCLASS32, machine: elf.EM_386, needed: []string{"prog"}},
	} {
		b := []byte(m.bytes())
		f.Add(b)
		for _, at := range []int{4, 5, 16, 32, 54, 56, 64 + 8, 64 + 32, 64 + 56 + 8, 64 + 56 + 32} {
			c := slices.Clone(b)
			for i := range 8 {
				if at+i < len(c) {
					c[at+i] = 0xff
				}
			}
			f.Add(c)
		}
	}
	f.Add([]byte("#!/prog"))
	f.Add([]byte("#!/usr/bin/env -S prog"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, in := elfOf(t, b)
		if f, err := readELF(t.Context(), c, in); err == nil && len(f.needed) > maxNeeded {
			t.Fatalf("%d libraries", len(f.needed))
		}
		tr := newTree()
		tr.root.names = map[string]*node{"prog": {inode: in}, "sh": {inode: in}, "lib": {inode: &ext4.Inode{Mode: modeSymlink, Target: "/"}}}
		g := &guesser{log: slog.New(slog.DiscardHandler), tree: tr, contents: c, env: map[string]string{"PATH": "/:/lib"}, wanted: make(map[*ext4.Inode]bool), elfs: make(map[*ext4.Inode]parsed)}
		g.run(t.Context(), []string{"sh", "/prog", "x"}, 0)
		g.run(t.Context(), []string{"prog"}, 0)
		for _, w := range g.wants {
			if w.off < 0 || w.n <= 0 || w.off+w.n > in.Size {
				t.Fatalf("bytes %d+%d of a file of %d", w.off, w.n, in.Size)
			}
		}
	})
}

// FuzzShell cuts up scripts that nothing is known of.
func FuzzShell(f *testing.F) {
	for _, c := range programCases {
		for _, l := range c.more {
			f.Add(l.body, true)
			f.Add(l.body, false)
		}
	}
	for _, s := range []string{"`", "$(", "${", "${1", "\"$", "\"", "'", "\\", "<<", "<<E\n", "a<<<b", "x=$x$x;exec $x", "exec -a", "$@$@\"$@\""} {
		f.Add(s, true)
	}
	f.Fuzz(func(t *testing.T, text string, inline bool) {
		all := shellCommands(text, inline, "/zero", []string{"one", "two"}, map[string]string{"E": "env"})
		if len(all) > maxCommands+2 {
			t.Fatalf("%d commands", len(all))
		}
		for _, argv := range all {
			if len(argv) == 0 {
				t.Fatal("a command without a name")
			}
			for _, a := range argv {
				if len(a) > 4*maxString {
					t.Fatalf("a word of %d bytes", len(a))
				}
			}
		}
	})
}

// TestHostileELF has counts and lengths that no file has.
func TestHostileELF(t *testing.T) {
	good := []byte(madeELF{interp: "/lib/ld.so", needed: []string{"liba.so"}, pad: 10_000}.bytes())
	for name, change := range map[string]func(b []byte){
		"program headers beyond the file": func(b []byte) { copy(b[32:], "\xff\xff\xff\xff\xff\xff\xff\x7f") },
		"65535 program headers":           func(b []byte) { b[56], b[57] = 0xff, 0xff },
		"headers of another size":         func(b []byte) { b[54] = 1 },
		"another byte order":              func(b []byte) { b[5] = 2 },
		"no byte order":                   func(b []byte) { b[5] = 9 },
		"no class":                        func(b []byte) { b[4] = 0 },
		"an object file":                  func(b []byte) { b[16] = 1 },
	} {
		b := slices.Clone(good)
		change(b)
		c, in := elfOf(t, b)
		if _, err := readELF(t.Context(), c, in); err == nil {
			t.Errorf("%s: read", name)
		}
	}
	// As many libraries as fit, of a hundred names.
	var needed []string
	for i := range 3000 {
		needed = append(needed, strings.Repeat("x", i%100+1))
	}
	c, in := elfOf(t, []byte(madeELF{needed: needed}.bytes()))
	f, err := readELF(t.Context(), c, in)
	if err != nil || len(f.needed) != maxNeeded {
		t.Errorf("%v, %v", f, err)
	}
}

// TestGuessBudget reads no more than it may.
func TestGuessBudget(t *testing.T) {
	c, in := elfOf(t, []byte(noise(1, 100_000)))
	c.held, c.budget = nil, 100_000
	if _, err := c.read(t.Context(), in, 0, 10); err != errBudget || c.failed != nil {
		t.Errorf("%v, %v", err, c.failed)
	}
	if b, err := c.read(t.Context(), in, in.Size, 10); len(b) > 0 || err != nil {
		t.Errorf("behind the end: %q, %v", b, err)
	}
	in.Data = nil
	if b, err := c.read(t.Context(), in, in.Size-3, 10); string(b) != "\x00\x00\x00" || err != nil {
		t.Errorf("a hole: %q, %v", b, err)
	}
}
