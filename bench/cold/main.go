// Command cold measures cold starts: the time from nothing on the host to a
// program's answer, for thaw, for its peers, and for the best that is possible.
//
//	go run ./bench/cold -images DIR                    all images, links and rows: hours
//	go run ./bench/cold -images DIR -only flask -links slow -out flask.txt
//	go run ./bench/cold -table flask.txt torch.txt     tables of earlier runs
//
// DIR has OCI layouts by scripts/workloads. The preparation is not timed: each
// image is pushed to its own registry, built, recorded, and so on. Then each row
// starts the image once per round, in turn. Before a start, the host's caches and
// the kernel's page cache are dropped. The clock runs from the launch of the first
// process until the program has printed its answer and ended. A [bench.Link]
// between the host and the registry counts what it carries.
//
// The rows:
//
//	local-warm         the flat ext4 image on a local disk, all of it in memory
//	local-cold         the same, none of it in memory
//	resident           thaw with everything that the start reads in its cache and in memory
//	full-pull          skopeo copy, umoci unpack, run
//	stargz             containerd with stargz-snapshotter (scripts/stargz), eStargz
//	stargz-optimized   the same, converted with a recorded start, as a trace is
//	nbdkit-curl        the flat ext4 image over HTTP, by nbdkit
//	thaw               thaw serve on an empty cache, and thaw mount with the driver fuse
//	thaw-trace         the same, with a trace of an earlier start beside the image
//	thaw-bundle        the same, with a bundle beside it
//
// A row of thaw whose name ends in -nbdfuse, such as resident-nbdfuse, mounts the export by
// nbdfuse and a loop device instead of thaw mount. It is measured only if -rows names it.
//
// There are two loads. start runs the program of the image. everything reads every file
// of the image once; it has the rows local-cold, full-pull, nbdkit-curl and thaw.
//
// The limit is the time that no start by this transport over this link can beat:
// the longer of the time of resident, and the time that the line needs for the
// compressed bytes of the leaves that a start touches, plus two round trips.
//
// Each round is printed as a line at once, in the format that benchstat reads, and
// tables follow at the end. A run can be divided by image, link or row: -table
// reads the lines of all parts.
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
	"thaw/bench/cold/stargz"
)

type options struct {
	images    string
	only      string
	links     []link
	loads     []load
	rows      string
	rounds    int
	dir       string
	out       string
	plots     string
	table     bool
	thaw      string
	thawArgs  string
	buildArgs string
	variants  []variant
	nbdkit    string
	keep      string
	size      string
	readAhead int
	quiet     time.Duration
}

func main() {
	o := options{links: []link{slow, fast}, loads: []load{start}}
	flag.StringVar(&o.images, "images", "", "directory of OCI layouts, made by scripts/workloads")
	flag.StringVar(&o.only, "only", "", "only these images, separated by commas")
	flag.Func("links", "links, separated by commas: slow (20 ms, 200 Mbit/s), fast (2 ms, 2 Gbit/s) or NAME=RTT:MBITS (default slow,fast)", func(s string) (err error) {
		o.links, err = parseLinks(s)
		return err
	})
	flag.Func("loads", "loads, separated by commas: start (the image's program), everything (every file is read once) (default start)", func(s string) (err error) {
		o.loads, err = parseLoads(s)
		return err
	})
	flag.StringVar(&o.rows, "rows", "", "only these rows, separated by commas")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each row")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "working directory, on the disk to measure, with room for six times the largest unpacked image")
	flag.StringVar(&o.out, "out", "", "file to which all lines are appended, besides stdout")
	flag.StringVar(&o.plots, "plots", "", "directory for plots, as SVG and PNG (default none)")
	flag.BoolVar(&o.table, "table", false, "measure nothing; print tables and draw plots of files that earlier runs wrote")
	flag.StringVar(&o.thaw, "thaw", "", "thaw to measure (default: that of this checkout)")
	flag.StringVar(&o.thawArgs, "thaw-args", "--complete off", "further arguments for thaw serve, in all rows of thaw")
	flag.StringVar(&o.buildArgs, "build-args", "", "further arguments for thaw build")
	flag.Func("variant", "further row, `NAME=ROW ARGS`: a row of thaw with further arguments for thaw serve (repeatable)", func(s string) error {
		v, err := parseVariant(s)
		o.variants = append(o.variants, v)
		return err
	})
	flag.StringVar(&o.keep, "keep", "", "directory that keeps images converted to eStargz for later runs: a conversion takes minutes (default none)")
	flag.StringVar(&o.nbdkit, "nbdkit-args", nbdkitArgs, "arguments of nbdkit and its curl plugin, besides URL and socket")
	flag.StringVar(&o.size, "size", "8G", "size of the filesystems")
	flag.IntVar(&o.readAhead, "readahead", 128, "readahead of the kernel in KiB")
	flag.DurationVar(&o.quiet, "quiet", 0, "wait for an idle machine before each start, at most this long")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code, err := run(ctx, o, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/cold:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(ctx context.Context, o options, args []string) (code int, err error) {
	if o.table {
		if len(args) == 0 {
			return 2, errors.New("usage: go run ./bench/cold -table [-plots DIR] FILES")
		}
		r, err := readResults(args)
		if err != nil {
			return 1, err
		}
		return 0, r.report(os.Stdout, o.plots)
	}
	if o.images == "" || len(args) > 0 || o.rounds < 1 {
		return 2, errors.New("usage: go run ./bench/cold [flags] -images DIR; -help lists the flags")
	}
	rows, err := chooseRows(o)
	if err != nil {
		return 2, err
	}
	needs := needsOf(rows)
	if err := bench.Need(needs...); err != nil {
		return 1, err
	}
	if code, done, err := bench.Isolate(ctx); done || err != nil {
		return code, err
	}
	images, err := bench.FindWorkloads(o.images, o.only)
	if err != nil {
		return 1, err
	}
	out, err := openOut(o.out)
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	dir, err := os.MkdirTemp(o.dir, "cold-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &benchmark{options: o, dir: dir, chosen: rows, out: out, results: newResults(out)}
	if b.options.thaw == "" {
		if b.options.thaw, err = bench.BuildThaw(ctx, dir); err != nil {
			return 1, err
		}
	}
	if err := b.header(ctx, needs); err != nil {
		return 1, err
	}
	for _, w := range images {
		if err := b.image(ctx, w); err != nil {
			return 1, fmt.Errorf("%s: %w", w.Name, err)
		}
	}
	return 0, b.results.report(out, o.plots)
}

// header writes what the figures depend on.
func (b *benchmark) header(ctx context.Context, needs []bench.Program) error {
	machine, err := bench.ThisMachine()
	if err != nil {
		return err
	}
	if (b.wants(stargzRow) || b.wants(stargzOptimized)) && stargz.Find() == nil {
		needs = append(needs, stargz.Programs...)
	}
	facts, err := bench.Versions(ctx, needs...)
	if err != nil {
		return err
	}
	commit, err := bench.Commit(b.thaw)
	if err != nil {
		return err
	}
	command := "go run ./bench/" + bench.Command(&exec.Cmd{Args: append([]string{"cold"}, os.Args[1:]...)})
	facts = append(facts, bench.Fact{Key: "thaw", Value: commit}, bench.Fact{Key: "command", Value: command})
	return b.results.rec.Header("thaw/bench/cold", machine, facts...)
}

// openOut writes to stdout, and appends to a file unless its name is empty.
func openOut(file string) (io.WriteCloser, error) {
	if file == "" {
		return tee{os.Stdout, nil}, nil
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return tee{io.MultiWriter(os.Stdout, f), f}, nil
}

type tee struct {
	io.Writer
	f *os.File // nil if there is none
}

func (t tee) Close() error {
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
}
