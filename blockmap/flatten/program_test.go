package flatten

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

func cancelled(t testing.TB) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(t.Context())
	t.Cleanup(func() { cancel(nil) })
	return ctx, cancel
}

func exe(name, body string) line { return line{Header: head('0', name, 0o755), body: body} }

// madeELF is an ELF file, as small as a linker takes it.
type madeELF struct {
	class                  elf.Class   // 64 bits by default
	machine                elf.Machine // x86-64 by default
	interp                 string
	needed                 []string
	soname, rpath, runpath string
	pad                    int // bytes at its end
}

func (m madeELF) bytes() string {
	strtab := "\x00"
	str := func(s string) uint64 {
		at := len(strtab)
		strtab += s + "\x00"
		return uint64(at)
	}
	var dyn []elf.Dyn64
	add := func(tag elf.DynTag, v uint64) { dyn = append(dyn, elf.Dyn64{Tag: int64(tag), Val: v}) }
	for _, n := range m.needed {
		add(elf.DT_NEEDED, str(n))
	}
	optional := func(tag elf.DynTag, s string) {
		if s != "" {
			add(tag, str(s))
		}
	}
	optional(elf.DT_SONAME, m.soname)
	optional(elf.DT_RPATH, m.rpath)
	optional(elf.DT_RUNPATH, m.runpath)
	const strings, base = 0x200, 0x10000
	add(elf.DT_STRTAB, base+strings)
	add(elf.DT_STRSZ, uint64(len(strtab)))
	add(elf.DT_NULL, 0)
	interp := strings + uint64(len(strtab))
	dynamic := (interp + uint64(len(m.interp)) + 1 + 7) &^ 7
	if m.machine == 0 {
		m.machine = elf.EM_X86_64
	}
	narrow := m.class == elf.ELFCLASS32
	dynSize := uint64(len(dyn) * 16)
	if narrow {
		dynSize /= 2
	}
	size := dynamic + dynSize + uint64(m.pad)
	progs := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Vaddr: base, Filesz: size, Memsz: size, Flags: uint32(elf.PF_R)},
		{Type: uint32(elf.PT_DYNAMIC), Off: dynamic, Vaddr: base + dynamic, Filesz: dynSize, Flags: uint32(elf.PF_R)},
	}
	if m.interp != "" {
		progs = append(progs, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: interp, Filesz: uint64(len(m.interp)) + 1})
	}
	var b []byte
	put := func(v any) {
		var err error
		if b, err = binary.Append(b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	ident := [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1}
	h := elf.Header64{Ident: ident, Type: uint16(elf.ET_DYN), Machine: uint16(m.machine), Version: 1, Phoff: 64, Phentsize: 56, Phnum: uint16(len(progs))}
	if narrow {
		ident[elf.EI_CLASS] = byte(elf.ELFCLASS32)
		put(elf.Header32{Ident: ident, Type: h.Type, Machine: h.Machine, Version: 1, Phoff: 52, Phentsize: 32, Phnum: h.Phnum})
	} else {
		put(h)
	}
	for _, p := range progs {
		if narrow {
			put(elf.Prog32{Type: p.Type, Off: uint32(p.Off), Vaddr: uint32(p.Vaddr), Filesz: uint32(p.Filesz), Memsz: uint32(p.Memsz), Flags: p.Flags})
		} else {
			put(p)
		}
	}
	at := func(off uint64, s string) {
		b = append(b, make([]byte, off+uint64(len(s))-uint64(len(b)))...)
		copy(b[off:], s)
	}
	if len(b) > strings {
		panic("the headers are too long")
	}
	at(strings, strtab)
	at(interp, m.interp+"\x00")
	at(dynamic, "")
	for _, d := range dyn {
		if narrow {
			put(elf.Dyn32{Tag: int32(d.Tag), Val: uint32(d.Val)})
		} else {
			put(d)
		}
	}
	return string(b) + noise(uint64(m.pad), m.pad)
}

// guessed gives the names of the files that are guessed for an image, in order,
// each once.
func guessed(t testing.TB, c v1.Config, lines ...line) []string {
	t.Helper()
	names, _ := guessedParts(t, newTarget(t), c, lines...)
	return names
}

// guessedParts gives the parts of files as well. A target that has the layer of
// these lines saves the conversion.
func guessedParts(t testing.TB, dst *dirTarget, c v1.Config, lines ...line) (names []string, wants []want) {
	t.Helper()
	src := newSource(t, plain, tarball(t, lines...)).configured(t, func(old *v1.Config) { *old = c })
	o := testOptions
	o.NoGuess, o.TempDir, o.Tag = true, t.TempDir(), "x"
	res, err := Build(t.Context(), &src.Source, dst, o)
	if err != nil {
		t.Fatal(err)
	}
	tr := newTree()
	b := newBuilder(&src.Source, dst, o)
	b.streams = &Streams{}
	if b.diffIDs, err = diffIDs(&src.Source); err != nil {
		t.Fatal(err)
	}
	layer, _ := b.reuse(t.Context(), 0, b.layerTag(0))
	if layer == nil {
		t.Fatal("there is no conversion")
	}
	if err := tr.applyLayer(t.Context(), layer.toc, 1, layer.stored()); err != nil {
		t.Fatal(err)
	}
	inodes := make(map[*ext4.Inode]string)
	var walk func(path string, n *node)
	walk = func(path string, n *node) {
		if old, ok := inodes[n.inode]; !ok || path < old {
			inodes[n.inode] = path
		}
		for name, child := range n.names {
			walk(path+"/"+name, child)
		}
	}
	walk("", tr.root)
	if len(res.Index.Streams) == 1 {
		res.Index.Streams = append(res.Index.Streams, blockmap.Table{})
	}
	m, ix := readBack(t, res, dst)
	if wants, err = b.guess(t.Context(), tr, m.Streams(ix)); err != nil {
		t.Fatal(err)
	}
	for _, w := range wants {
		if name := inodes[w.inode]; !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, wants
}

func command(argv ...string) v1.Config { return v1.Config{Cmd: argv} }

// system is a program with a library and its linker, and a shell and more.
func system(t testing.TB, more ...line) []line {
	t.Helper()
	prog := func(name string) line {
		return exe(name, madeELF{interp: "/lib/ld.so", needed: []string{"libc.so"}}.bytes())
	}
	return append([]line{
		dir("bin"), dir("lib"), dir("usr/bin"), dir("app"), exe("lib/ld.so", madeELF{soname: "ld.so"}.bytes()),
		reg("lib/libc.so", madeELF{soname: "libc.so", needed: []string{"ld.so"}}.bytes()),
		prog("bin/dash"), symlink("bin/sh", "dash"), prog("usr/bin/env"), prog("usr/bin/tini"), prog("usr/bin/gosu"), prog("bin/rm"),
		prog("usr/bin/python3"), prog("usr/bin/server"), reg("usr/bin/data", "not a program"), reg("app/main.py", "import this\n"),
	}, more...)
}

var programCases = []struct {
	name   string
	config v1.Config
	more   []line
	want   string // without ld.so and libc.so, which any of them has
}{
	{"a path", command("/usr/bin/server"), nil, "/usr/bin/server"},
	{"a name", command("server"), nil, "/usr/bin/server"},
	{"a name that PATH does not lead to", v1.Config{Cmd: []string{"server"}, Env: []string{"PATH=/bin:/nowhere"}}, nil, ""},
	{"an entrypoint", v1.Config{Entrypoint: []string{"server"}, Cmd: []string{"dash"}}, nil, "/usr/bin/server"},
	{"relative to the working directory", v1.Config{Cmd: []string{"./bin/../bin/server"}, WorkingDir: "/usr"}, nil, "/usr/bin/server"},
	{"nothing to run", v1.Config{}, nil, ""},
	{"an empty name", command(""), nil, ""},
	{"a directory", command("/usr"), nil, ""},
	{"a file that is not to be executed", command("/usr/bin/data"), nil, ""},
	{"a link that leads out of the root", command("/l"), []line{symlink("l", "../../../../usr/bin/server")}, "/usr/bin/server"},
	{"links of links", command("/a/server"), []line{symlink("a", "b"), symlink("b", "/usr/./bin/")}, "/usr/bin/server"},
	{"a loop of links", command("/a"), []line{symlink("a", "b"), symlink("b", "a")}, ""},
	{"a link to itself below itself", command("/a"), []line{symlink("a", "a/a")}, ""},
	{"a script", command("/app/run", "x"), []line{exe("app/run", "#!/usr/bin/python3\nimport this\n")}, "/app/run /usr/bin/python3"},
	{"a script with an argument", command("/app/run"), []line{exe("app/run", "#! /usr/bin/python3\t -u \nx")}, "/app/run /usr/bin/python3"},
	{"a script without a line", command("/app/run"), []line{exe("app/run", "#!/usr/bin/python3")}, "/app/run /usr/bin/python3"},
	{"a script of env", command("/app/run"), []line{exe("app/run", "#!/usr/bin/env python3\n")}, "/app/run /usr/bin/env /usr/bin/python3"},
	{"a script of env with options", command("/app/run"), []line{exe("app/run", "#!/usr/bin/env -S A=b python3 -u\n")}, "/app/run /usr/bin/env /usr/bin/python3"},
	{"env does not split by itself", command("/app/run"), []line{exe("app/run", "#!/usr/bin/env python3 -u\n")}, "/app/run /usr/bin/env"},
	{"a script whose interpreter is a script", command("/app/run"), []line{exe("app/run", "#!/app/inner\n"), exe("app/inner", "#!/usr/bin/python3\n")}, "/app/run /app/inner /usr/bin/python3"},
	{"a script whose interpreter is itself", command("/app/run"), []line{exe("app/run", "#!/app/run\n")}, "/app/run"},
	{"a script whose interpreter is not there", command("/app/run"), []line{exe("app/run", "#!/nowhere\n")}, "/app/run"},
	{"a script without an interpreter", command("/app/run"), []line{exe("app/run", "#!\n#! \n")}, "/app/run"},
	{"no program", command("/app/run"), []line{exe("app/run", "hello")}, ""},
	{"an empty program", command("/app/run"), []line{exe("app/run", "")}, ""},
	{"an argument that is a file", v1.Config{Cmd: []string{"python3", "-u", "main.py"}, WorkingDir: "/app"}, nil, "/usr/bin/python3 /app/main.py"},
	{"an init", v1.Config{Entrypoint: []string{"tini", "--"}, Cmd: []string{"python3", "/app/main.py"}}, nil, "/usr/bin/tini /usr/bin/python3 /app/main.py"},
	{"another user", command("gosu", "dash", "server"), nil, "/usr/bin/gosu /usr/bin/server"},
	{"a shell's words", command("/bin/sh", "-c", "exec server --flag >/dev/null 2>&1"), nil, "/bin/dash /usr/bin/server"},
	{"a shell's words with options", command("sh", "-o", "pipefail", "-ec", "python3 /app/main.py && rm x"), nil, "/bin/dash /usr/bin/python3 /app/main.py /bin/rm"},
	{"a shell's script", command("sh", "-e", "/app/go"), []line{reg("app/go", "X=1 server\n")}, "/bin/dash /app/go /usr/bin/server"},
	{"a shell alone", command("sh"), nil, "/bin/dash"},
	{"the usual entrypoint", v1.Config{Entrypoint: []string{"/app/entry.sh"}, Cmd: []string{"server", "-x"}},
		[]line{exe("app/entry.sh", "#!/bin/sh\nset -e\nif [ \"${1#-}\" != \"$1\" ]; then\n\tset -- server \"$@\"\nfi\nrm -f /tmp/pid\nexec \"$@\"\n")}, "/app/entry.sh /bin/dash /usr/bin/server"},
	{"a wrapper with variables", command("/app/run", "x"),
		[]line{exe("app/run", "#!/bin/sh\nNAME=server\nexport DIR=/usr/$NAME-x DIR=/usr/bin # comment\nNOW=`date`\nfor f in $(ls; echo \")\"); do :; done\n[ -n \"$NOW\" ] && exec $NOW/rm\nelse exec -a y \"${DIR}/$NAME\" ${X:-y} ${1+\"$@\"}\nfi\nrm x\n")},
		"/app/run /bin/dash /usr/bin/server"},
	{"a script that becomes itself", command("/app/run", "x"), []line{exe("app/run", "#!/bin/sh\nexec \"$0\" \"$@\"\nexec $0 $0\nexec sh $0\n")}, "/app/run /bin/dash"},
	{"an init of a machine", v1.Config{}, []line{dir("sbin"), symlink("sbin/init", "/usr/lib/systemd"), exe("usr/lib/systemd", madeELF{interp: "/lib/ld.so", needed: []string{"libc.so"}}.bytes())}, "/usr/lib/systemd"},
	{"an init of a machine behind the program", command("server"), []line{dir("sbin"), exe("sbin/init", "#!/bin/sh\nexec rm\n")}, "/usr/bin/server /sbin/init /bin/dash /bin/rm"},
	{"an init that is the program", command("/sbin/init"), []line{dir("sbin"), exe("sbin/init", madeELF{}.bytes())}, "/sbin/init"},
	{"a here-document", command("/app/run"), []line{exe("app/run", "#!/bin/sh\npython3 <<-'END'; true\nexec rm\n\tEND\nserver\n")}, "/app/run /bin/dash /usr/bin/server"},
}

func TestPrograms(t *testing.T) {
	for _, c := range programCases {
		t.Run(c.name, func(t *testing.T) {
			names := guessed(t, c.config, system(t, c.more...)...)
			names = slices.DeleteFunc(names, func(s string) bool { return strings.HasPrefix(s, "/lib/") })
			if got := strings.Join(names, " "); got != c.want {
				t.Errorf("guessed %s\nwant    %s", got, c.want)
			}
		})
	}
}

// TestLargeFiles guesses parts of them.
func TestLargeFiles(t *testing.T) {
	_, wants := guessedParts(t, newTarget(t), command("/bin/python3", "/app/data"), exe("bin/python3", madeELF{pad: 20 << 20}.bytes()), reg("app/data", noise(1, 30<<20)))
	total := int64(0)
	for _, w := range wants {
		total += w.n
	}
	if len(wants) < 3 || total > 1<<20 {
		t.Errorf("%d bytes in %d parts", total, len(wants))
	}
}

// TestGuessIsBounded guesses for images that make it as much work as they can.
func TestGuessIsBounded(t *testing.T) {
	var names, dirs []string
	for i := range 900 {
		names = append(names, fmt.Sprintf("none%d.so", i))
		dirs = append(dirs, fmt.Sprintf("/d%d", i))
	}
	lines := []line{exe("lib/ld.so", madeELF{}.bytes())}
	var libs, includes []string
	for i := range 400 {
		name := fmt.Sprintf("lib%d.so", i)
		libs = append(libs, name)
		m := madeELF{rpath: strings.Join(dirs, ":")}
		for _, n := range names {
			m.needed = append(m.needed, fmt.Sprint(i, n))
		}
		lines = append(lines, reg("lib/"+name, m.bytes()))
		// Each file includes all files, many times over.
		include := fmt.Sprintf("etc/c/%d", i)
		lines = append(lines, reg(include, strings.Repeat("include /etc/c/*\n/x\n", 100)))
		includes = append(includes, "include /"+include)
	}
	lines = append(lines, reg("etc/ld.so.conf", strings.Join(includes, "\n")))
	lines = append(lines, exe("prog", madeELF{interp: "/lib/ld.so", needed: libs, rpath: "/lib"}.bytes()))
	// Each shell starts eight of itself.
	lines = append(lines, symlink("sh", "prog"), exe("run", "#!/sh\n"+strings.Repeat("exec /run\n", 20)))
	began := time.Now()
	if got := guessed(t, command("/run"), lines...); len(got) < 3 || got[0] != "/run" || got[1] != "/prog" {
		t.Errorf("guessed %v", got)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %v", took)
	}
}
