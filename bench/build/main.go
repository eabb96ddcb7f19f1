// Command build measures `thaw build`: against umoci and mke2fs, which also make an
// ext4 filesystem of an image, with several chunk sizes, and by the number of layers.
//
//	go run ./bench/build -images DIR            thaw build against umoci unpack + mke2fs -d
//	go run ./bench/build -images DIR -chunks    chunk sizes: what is stored, and what a first run fetches
//	go run ./bench/build -layers                images of few and of many small layers, over a slow link
//
// DIR has OCI layouts by scripts/workloads, each with an image tagged latest whose
// program is /app/run. Each round is a line on stdout, in the format that benchstat
// reads; a table follows. Progress goes to stderr.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"thaw/bench"
)

type options struct {
	images    string
	only      string
	rounds    int
	dir       string
	size      string
	chunks    bool
	sizes     string
	layers    bool
	counts    string
	jobs      int
	reuse     bool
	rtt       time.Duration
	mbits     int64
	readAhead int
	quiet     time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.images, "images", "", "directory of OCI layouts, made by scripts/workloads")
	flag.StringVar(&o.only, "only", "", "only these images, separated by commas")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each side")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "working directory, on a disk with room for twice the largest unpacked image")
	flag.StringVar(&o.size, "size", "8G", "size of the filesystems")
	flag.BoolVar(&o.chunks, "chunks", false, "compare chunk sizes")
	flag.StringVar(&o.sizes, "sizes", "64K,128K,256K,512K,1M", "with -chunks: chunk sizes, separated by commas")
	flag.BoolVar(&o.layers, "layers", false, "compare numbers of layers, on images that it makes")
	flag.StringVar(&o.counts, "counts", "3,120", "with -layers: numbers of layers, separated by commas")
	flag.IntVar(&o.jobs, "jobs", 0, "with -layers: --jobs of thaw build; 0 for its default")
	flag.BoolVar(&o.reuse, "reuse", true, "with -layers: build in the other repository with --reuse of the first")
	flag.DurationVar(&o.rtt, "rtt", 20*time.Millisecond, "with -chunks and -layers: round trip of the link to the registry")
	flag.Int64Var(&o.mbits, "mbits", 200, "with -chunks and -layers: rate of the link in Mbit/s")
	flag.IntVar(&o.readAhead, "readahead", 128, "with -chunks: readahead of the kernel in KiB")
	flag.DurationVar(&o.quiet, "quiet", 0, "wait for an idle machine before each round, at most this long, and repeat builds that other processes disturb")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code, err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/build:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

var (
	umoci    = bench.Program{Name: "umoci", Package: "umoci", Version: []string{"--version"}}
	mke2fs   = bench.Program{Name: "mke2fs", Package: "e2fsprogs", Version: []string{"-V"}}
	nbdfuse  = bench.Program{Name: "nbdfuse", Package: "libnbd-bin", Version: []string{"--version"}}
	fuse3    = bench.Program{Name: "fusermount3", Package: "fuse3"}
	losetup  = bench.Program{Name: "losetup", Package: "mount"}
	registry = bench.Program{Name: "docker-registry", Package: "docker-registry", Version: []string{"--version"}}
)

func run(ctx context.Context, o options) (code int, err error) {
	if (o.images == "") != o.layers || o.chunks && o.layers || flag.NArg() > 0 || o.rounds < 1 {
		return 2, errors.New("usage: go run ./bench/build [flags] -images DIR; -help lists the flags")
	}
	needs := []bench.Program{umoci, mke2fs}
	switch {
	case o.chunks:
		needs = []bench.Program{nbdfuse, fuse3, losetup, registry}
	case o.layers:
		needs = []bench.Program{registry}
	}
	if err := bench.Need(needs...); err != nil {
		return 1, err
	}
	if o.chunks {
		if code, done, err := bench.Isolate(ctx); done || err != nil {
			return code, err
		}
	}
	var images []bench.Workload
	if !o.layers {
		if images, err = bench.FindWorkloads(o.images, o.only); err != nil {
			return 1, err
		}
	}
	machine, err := bench.ThisMachine()
	if err != nil {
		return 1, err
	}
	facts, err := bench.Versions(ctx, needs...)
	if err != nil {
		return 1, err
	}
	facts = append(facts, bench.Fact{Key: "command", Value: commandLine()})
	dir, err := os.MkdirTemp(o.dir, "thaw-bench-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &benchmark{options: o, dir: dir, rec: bench.NewRecorder(os.Stdout), out: os.Stdout, verified: make(map[string]bool)}
	if b.thaw, err = bench.BuildThaw(ctx, dir); err != nil {
		return 1, err
	}
	commit, err := bench.Commit(b.thaw)
	if err != nil {
		return 1, err
	}
	facts = append(facts, bench.Fact{Key: "thaw", Value: commit})
	if err := b.rec.Header("thaw/bench/build", machine, facts...); err != nil {
		return 1, err
	}
	switch {
	case o.chunks:
		return 0, b.chunkSizes(ctx, images)
	case o.layers:
		return 0, b.layerCounts(ctx)
	}
	return 0, b.against(ctx, images)
}

// commandLine returns the command for the header.
func commandLine() string {
	return "go run ./bench/" + bench.Command(&exec.Cmd{Args: append([]string{"build"}, os.Args[1:]...)})
}

// benchmark is the state that the comparisons share.
type benchmark struct {
	options
	dir  string // working directory of this run
	thaw string // the program
	rec  *bench.Recorder
	out  io.Writer

	verified map[string]bool // images whose block image thaw verify has checked
}

// calm waits for an idle machine if -quiet is set.
func (b *benchmark) calm(ctx context.Context) error {
	waited, err := bench.Quiet(ctx, b.quiet)
	if waited > 10*time.Second {
		progress("waited %.0f s for an idle machine", waited.Seconds())
	}
	return err
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
}
