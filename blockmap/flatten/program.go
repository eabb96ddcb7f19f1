package flatten

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap/ext4"
)

// guesser predicts what a start of the image reads: the program of the config, the init that
// a virtual machine starts, and the files that the kernel and the linker load for them. If the program is a script or
// starts another program, it follows that one too.
//
// The image may be hostile. Nothing in its files makes a build fail or take long: the
// guesser omits what it does not understand.
type guesser struct {
	log      *slog.Logger
	tree     *tree
	contents *contents
	env      map[string]string
	workDir  string

	wants  []want
	late   []want // read once the whole program is mapped
	wanted map[*ext4.Inode]bool
	elfs   map[*ext4.Inode]parsed

	libDirs                []string // of /etc/ld.so.conf
	runs, lookups, configs int      // counts so far
}

// want is a part of a file that will be read.
type want struct {
	inode *ext4.Inode
	span
}

type parsed struct {
	f   *elfFile
	err error
}

const (
	// maxWhole bounds the size of a file that is predicted whole. Of a larger file,
	// only the parts are predicted that are known to be read.
	maxWhole = 8 << 20

	maxScript  = 64 << 10 // size of a script that is parsed
	maxELFs    = 2048
	maxRuns    = 64 // programs that start one another
	maxNest    = 8
	maxLookups = 1 << 18 // look-ups of paths
	maxArgs    = 64
)

// guess predicts what a start of the image will read. It fails only if ctx ends.
func (b *builder) guess(ctx context.Context, t *tree, streams []Stream) ([]want, error) {
	var c v1.ConfigFile
	if err := json.Unmarshal(b.src.Config, &c); err != nil {
		return nil, nil // diffIDs has decoded the same config before
	}
	contents := newContents(b.streams.temp, b.dst, streams)
	defer contents.close()
	g := &guesser{
		log: b.Log, tree: t, contents: contents, env: make(map[string]string),
		workDir: path.Join("/", c.Config.WorkingDir), wanted: make(map[*ext4.Inode]bool), elfs: make(map[*ext4.Inode]parsed),
	}
	for _, kv := range c.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		g.env[k] = v
	}
	if g.env["PATH"] == "" {
		g.env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	g.run(ctx, slices.Concat(c.Config.Entrypoint, c.Config.Cmd), 0)
	g.run(ctx, []string{"/sbin/init"}, 0) // of a virtual machine; a container's start does not wait for what comes last
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if contents.failed != nil {
		// An incomplete guess would differ from one build to the next.
		b.Log.Warn("the image gets no guess of what a start will read", "err", contents.failed)
		return nil, nil
	}
	return g.wants, nil
}

// run predicts what a command reads.
func (g *guesser) run(ctx context.Context, argv []string, depth int) {
	if g.runs++; len(argv) == 0 || g.runs > maxRuns || depth > maxNest || ctx.Err() != nil {
		return
	}
	argv = argv[:min(len(argv), maxArgs)]
	file := g.executable(argv[0])
	if file == "" {
		g.log.Debug("guess: no such program", "program", argv[0])
		return
	}
	real, n := g.tree.find(file)
	if in, f, err := g.elf(ctx, file); err == nil {
		g.wantELF(in, f)
		g.link(ctx, real, in, f)
		g.relocate()
		g.handOn(ctx, argv, depth)
		return
	}
	head, err := g.contents.read(ctx, n.inode, 0, 256) // the kernel looks at no more
	line, ok := strings.CutPrefix(string(head), "#!")
	if err != nil || !ok {
		g.log.Debug("guess: not a program", "file", file, "err", err)
		return
	}
	g.want(file)
	line, _, _ = strings.Cut(line, "\n")
	interp, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
	interp, tabbed, _ := strings.Cut(interp, "\t")
	next := []string{interp}
	if arg = strings.TrimSpace(tabbed + " " + arg); arg != "" {
		next = append(next, arg)
	}
	g.run(ctx, append(append(next, file), argv[1:]...), depth+1)
}

// launchers run the first of their arguments that names a program.
var launchers = []string{"env", "tini", "tini-static", "dumb-init", "docker-init", "catatonit", "gosu", "su-exec", "nohup", "nice", "ionice", "stdbuf", "setpriv", "time", "timeout"}

var shells = []string{"sh", "ash", "bash", "dash", "ksh", "mksh", "zsh"}

// handOn predicts what the arguments make a program run or read.
func (g *guesser) handOn(ctx context.Context, argv []string, depth int) {
	name, args := path.Base(argv[0]), argv[1:]
	switch {
	case slices.Contains(shells, name):
		g.shell(ctx, args, depth)
	case slices.Contains(launchers, name):
		if name == "env" {
			args = splitString(args)
		}
		if (name == "gosu" || name == "su-exec") && len(args) > 0 {
			args = args[1:] // skip the user
		}
		for i, a := range args {
			if !strings.HasPrefix(a, "-") && g.executable(a) != "" {
				g.run(ctx, args[i:], depth+1)
				return
			}
		}
	default:
		// python3 main.py, java -jar app.jar: the program reads an argument that is no
		// option and names a file.
		for _, a := range args {
			if !strings.HasPrefix(a, "-") {
				g.want(g.abs(a))
			}
		}
	}
}

// splitString does what env -S does: it splits the one argument of a script's first
// line into several.
func splitString(args []string) (split []string) {
	for _, a := range args {
		if s, ok := strings.CutPrefix(a, "-S"); ok {
			split = append(split, strings.Fields(s)...)
		} else if s, ok := strings.CutPrefix(a, "--split-string="); ok {
			split = append(split, strings.Fields(s)...)
		} else {
			split = append(split, a)
		}
	}
	return split
}

// shell predicts what a shell runs: a command string, or a script.
func (g *guesser) shell(ctx context.Context, args []string, depth int) {
	command := false
	for len(args) > 0 && len(args[0]) > 1 && (args[0][0] == '-' || args[0][0] == '+') {
		flags := args[0][1:]
		args = args[1:]
		if flags == "-" {
			break
		}
		if strings.HasPrefix(flags, "-") {
			continue
		}
		command = command || strings.Contains(flags, "c")
		if strings.HasSuffix(flags, "o") && len(args) > 0 {
			args = args[1:]
		}
	}
	if len(args) == 0 {
		return
	}
	text, zero, rest := args[0], "", args[1:]
	if command {
		if len(rest) > 0 {
			zero, rest = rest[0], rest[1:]
		}
	} else {
		zero = g.abs(args[0])
		text = g.text(ctx, zero)
	}
	for _, argv := range shellCommands(text, command, zero, rest, g.env) {
		g.run(ctx, argv, depth+1)
	}
}

// abs returns a path as the program of the image sees it.
func (g *guesser) abs(p string) string {
	if strings.HasPrefix(p, "/") {
		return p
	}
	return g.workDir + "/" + p
}

// regular returns the inode of a regular file, or nil.
func (g *guesser) regular(file string) *ext4.Inode {
	if g.lookups++; len(file) > maxString || g.lookups > maxLookups {
		return nil
	}
	_, n := g.tree.find(file)
	if n == nil || n.inode.Mode&modeType != modeRegular {
		return nil
	}
	return n.inode
}

// executable returns the path of a command, or "" if there is none.
func (g *guesser) executable(name string) string {
	can := func(file string) bool {
		in := g.regular(file)
		return in != nil && in.Mode&0o111 != 0
	}
	switch {
	case name == "":
	case strings.Contains(name, "/"):
		if file := g.abs(name); can(file) {
			return file
		}
	default:
		dirs := fields(g.env["PATH"], ":")
		for _, dir := range dirs[:min(len(dirs), maxDirs)] {
			if file := g.abs(dir) + "/" + name; can(file) {
				return file
			}
		}
	}
	return ""
}

// read returns the beginning of a text file, or "" if there is none.
func (g *guesser) read(ctx context.Context, file string) string {
	in := g.regular(file)
	if in == nil {
		return ""
	}
	b, err := g.contents.read(ctx, in, 0, maxScript)
	if err != nil {
		g.log.Debug("guess: not read", "file", file, "err", err)
	}
	return string(b)
}

// text returns a text file, and predicts that the start reads it too.
func (g *guesser) text(ctx context.Context, file string) string {
	g.want(file)
	return g.read(ctx, file)
}

// elf parses an ELF file, each file once.
func (g *guesser) elf(ctx context.Context, file string) (*ext4.Inode, *elfFile, error) {
	in := g.regular(file)
	if in == nil {
		return nil, nil, fmt.Errorf("%s: no such file", file)
	}
	p, ok := g.elfs[in]
	if !ok {
		if len(g.elfs) >= maxELFs {
			return nil, nil, errBudget
		}
		if p.f, p.err = readELF(ctx, g.contents, in); p.err != nil {
			p.err = fmt.Errorf("%s: %w", file, p.err)
		}
		g.elfs[in] = p
	}
	return in, p.f, p.err
}

// want predicts reads of an existing file: the whole file, or its two ends, where
// archives and tables begin.
func (g *guesser) want(file string) {
	in := g.regular(file)
	if in == nil || g.wanted[in] {
		return
	}
	g.wanted[in] = true
	if in.Size <= maxWhole {
		g.add(&g.wants, in, span{0, in.Size})
	} else {
		g.add(&g.wants, in, span{0, entryReach})
		g.add(&g.wants, in, span{in.Size - entryReach, entryReach})
	}
}

func (g *guesser) wantELF(in *ext4.Inode, f *elfFile) {
	if g.wanted[in] {
		return
	}
	g.wanted[in] = true
	if in.Size <= maxWhole {
		g.add(&g.wants, in, span{0, in.Size})
		return
	}
	for _, s := range f.head {
		g.add(&g.wants, in, s)
	}
	// The file that was mapped first is relocated last.
	body := make([]want, 0, len(f.body))
	for _, s := range f.body {
		g.add(&body, in, s)
	}
	g.late = slices.Concat(body, g.late)
}

// relocate says that all files of a program are mapped.
func (g *guesser) relocate() {
	g.wants = append(g.wants, g.late...)
	g.late = nil
}

func (g *guesser) add(l *[]want, in *ext4.Inode, s span) {
	if s.off < in.Size && s.n > 0 {
		*l = append(*l, want{in, span{s.off, min(s.n, in.Size-s.off)}})
	}
}
