package flatten

import (
	"context"
	"debug/elf"
	"path"
	"slices"
	"strings"

	"thaw/blockmap/ext4"
)

// linker finds the libraries of one program as the dynamic linker of the image would:
// that of glibc (ld.so(8)) or of musl, whichever the program asks for. It cannot find
// libraries that depend on the processor of the host (below glibc-hwcaps), nor those
// that the program opens itself.
type linker struct {
	g       *guesser
	musl    bool
	env     []string // LD_LIBRARY_PATH
	system  []string // the directories of the image and of its linker
	machine *elfFile // the program, whose class and machine libraries must have
	queue   []*object
	loaded  map[*ext4.Inode]bool
	sonames map[string]bool
}

// object is a file in a process.
type object struct {
	*elfFile
	origin         string   // the directory in which it was found
	loader         *object  // the object that needs it
	rpath, runpath []string // of elfFile, expanded
}

const (
	// maxObjects bounds the libraries of a program. maxDirs bounds the directories that
	// one setting lists. maxConfigs bounds the files and patterns that list
	// directories.
	maxObjects = 1024
	maxDirs    = 128
	maxConfigs = 64
	maxChain   = 64 // libraries in a chain in which each needs the next
)

// link predicts the linker and the libraries of a program, in the order in which they
// are opened.
func (g *guesser) link(ctx context.Context, real string, in *ext4.Inode, f *elfFile) {
	if f.interp == "" {
		return // static
	}
	interp, ld, err := g.elf(ctx, f.interp)
	if err != nil {
		g.log.Debug("guess: no dynamic linker", "program", real, "linker", f.interp, "err", err)
		return // the kernel would not start it either
	}
	l := &linker{
		g: g, musl: strings.Contains(path.Base(f.interp), "ld-musl"),
		env:    fields(g.env["LD_LIBRARY_PATH"], ":;"),
		loaded: map[*ext4.Inode]bool{in: true, interp: true}, sonames: map[string]bool{ld.soname: true, path.Base(f.interp): true},
	}
	g.wantELF(interp, ld)
	l.machine = f
	l.queue = []*object{l.object(f, path.Dir(real), nil)}
	preload := fields(g.env["LD_PRELOAD"], ": ")
	if l.musl {
		l.system = l.muslDirs(ctx, f.interp)
	} else {
		preload = append(preload, strings.FieldsFunc(g.text(ctx, "/etc/ld.so.preload"), func(r rune) bool {
			return r == ' ' || r == '\t' || r == '\n' || r == ':'
		})...)
		g.want("/etc/ld.so.cache")
		if g.configs == 0 {
			g.libDirs = g.configured(ctx, "/etc/ld.so.conf")
		}
		l.system = slices.Concat(g.libDirs, defaultDirs(f))
	}
	for _, name := range preload {
		l.need(ctx, l.queue[0], name)
	}
	// Breadth first, as linkers do.
	for i := 0; i < len(l.queue); i++ {
		for _, name := range l.queue[i].needed {
			l.need(ctx, l.queue[i], name)
		}
	}
}

// need loads the library that an object asks for by name, unless it has done so before.
func (l *linker) need(ctx context.Context, o *object, name string) {
	if l.sonames[name] || len(l.queue) > maxObjects || l.g.lookups > maxLookups || ctx.Err() != nil {
		return
	}
	l.sonames[name] = true
	if strings.Contains(name, "/") {
		l.open(ctx, o, l.expand(name, o.origin))
		return
	}
	for _, dirs := range l.search(o) {
		for _, dir := range dirs[:min(len(dirs), maxDirs)] {
			if l.open(ctx, o, l.g.abs(dir)+"/"+name) {
				return
			}
		}
	}
	l.g.log.Debug("guess: no such library", "library", name, "wanted_by", o.origin)
}

// object makes the object of an ELF file that was found in the directory origin.
func (l *linker) object(f *elfFile, origin string, loader *object) *object {
	expand := func(list string) (dirs []string) {
		left := maxStrings
		for _, dir := range fields(list, ":") {
			if dir = l.expand(dir, origin); len(dir) <= maxString && len(dirs) < maxDirs && len(dir) <= left {
				dirs = append(dirs, dir)
				left -= len(dir)
			}
		}
		return dirs
	}
	return &object{elfFile: f, origin: origin, loader: loader, rpath: expand(f.rpath), runpath: expand(f.runpath)}
}

// search returns the directories that may have libraries that o needs, in order.
func (l *linker) search(o *object) (dirs [][]string) {
	if l.musl {
		dirs = append(dirs, l.env)
	}
	for p, depth := o, 0; p != nil && depth < maxChain; p, depth = p.loader, depth+1 {
		switch {
		case l.musl: // musl treats rpath and runpath alike
			dirs = append(dirs, p.rpath, p.runpath)
		case len(o.runpath) == 0 && len(p.runpath) == 0:
			dirs = append(dirs, p.rpath)
		}
	}
	if l.musl {
		return append(dirs, l.system)
	}
	return append(dirs, l.env, o.runpath, l.system)
}

// open loads the file at a path, if it is a library for this program.
func (l *linker) open(ctx context.Context, o *object, file string) bool {
	in, f, err := l.g.elf(ctx, file)
	if err != nil || f.class != l.machine.class || f.machine != l.machine.machine || f.order != l.machine.order {
		return false
	}
	if !l.loaded[in] {
		l.loaded[in] = true
		l.sonames[f.soname] = true
		l.queue = append(l.queue, l.object(f, path.Dir(file), o))
		l.g.wantELF(in, f)
	}
	return true
}

// expand replaces the dynamic string tokens of a path.
func (l *linker) expand(s, origin string) string {
	if !strings.Contains(s, "$") {
		return s
	}
	lib := "lib"
	if t := triplet(l.machine); t != "" {
		lib = "lib/" + t // as in Debian
	}
	return strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin, "${LIB}", lib, "$LIB", lib).Replace(s)
}

// muslDirs returns the directories that musl searches: those that a file named after
// the linker lists, or else the built-in ones.
func (l *linker) muslDirs(ctx context.Context, interp string) []string {
	arch, _, _ := strings.Cut(strings.TrimPrefix(path.Base(interp), "ld-musl-"), ".")
	if text := l.g.text(ctx, "/etc/ld-musl-"+arch+".path"); text != "" {
		return fields(text, ":\n")
	}
	return []string{"/lib", "/usr/local/lib", "/usr/lib"}
}

// configured returns the directories that a configuration of ldconfig lists. The linker
// reads the cache that ldconfig makes from it, in which these directories come first.
func (g *guesser) configured(ctx context.Context, file string) (dirs []string) {
	if g.configs++; g.configs > maxConfigs {
		return nil
	}
	for line := range strings.Lines(g.read(ctx, file)) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || words[0] == "hwcap":
		case words[0] == "include":
			for _, pattern := range words[1:] {
				if !strings.HasPrefix(pattern, "/") {
					pattern = path.Dir(file) + "/" + pattern
				}
				for _, f := range g.glob(pattern) {
					dirs = append(dirs, g.configured(ctx, f)...)
				}
			}
		default:
			for _, dir := range strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\r\n:,", r) }) {
				dir, _, _ = strings.Cut(dir, "=")
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs[:min(len(dirs), maxDirs)]
}

// glob returns the files whose last part matches a pattern, sorted.
func (g *guesser) glob(pattern string) (files []string) {
	dir, base := path.Split(pattern)
	_, n := g.tree.find(dir)
	if g.configs++; n == nil || g.configs > maxConfigs {
		return nil
	}
	for name := range n.names {
		if ok, err := path.Match(base, name); ok && err == nil {
			files = append(files, dir+name)
		}
	}
	slices.Sort(files)
	return files[:min(len(files), maxDirs)]
}

// defaultDirs returns the directories that are built into a linker. Each distribution
// chooses some of them, and their order. The class and machine of the files in them
// decide which files fit.
func defaultDirs(f *elfFile) []string {
	var dirs []string
	if t := triplet(f); t != "" {
		dirs = append(dirs, "/lib/"+t, "/usr/lib/"+t)
	}
	if f.class == elf.ELFCLASS64 {
		dirs = append(dirs, "/lib64", "/usr/lib64")
	}
	return append(dirs, "/lib", "/usr/lib")
}

// triplet returns Debian's name for the directories of an architecture.
func triplet(f *elfFile) string {
	wide := f.class == elf.ELFCLASS64
	switch {
	case f.machine == elf.EM_X86_64 && wide:
		return "x86_64-linux-gnu"
	case f.machine == elf.EM_X86_64:
		return "x86_64-linux-gnux32"
	case f.machine == elf.EM_386:
		return "i386-linux-gnu"
	case f.machine == elf.EM_AARCH64 && wide:
		return "aarch64-linux-gnu"
	case f.machine == elf.EM_ARM:
		return "arm-linux-gnueabihf"
	case f.machine == elf.EM_PPC64:
		return "powerpc64le-linux-gnu"
	case f.machine == elf.EM_RISCV && wide:
		return "riscv64-linux-gnu"
	case f.machine == elf.EM_S390 && wide:
		return "s390x-linux-gnu"
	}
	return ""
}

// fields cuts a list at any of the separators and drops empty parts.
func fields(list, separators string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return strings.ContainsRune(separators, r) })
}
