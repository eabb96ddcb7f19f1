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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

type options struct {
	images    string
	only      string
	parts     []string
	rounds    int
	count     int
	variants  int
	link      link
	dir       string
	out       string
	plots     string
	thaw      string
	serveArgs []string
	size      string
	hosts     int
	per       int
	hostRate  int64 // of a host's link in a namespace, bits per second
	simHosts  int
	seed      uint64
	plan      string
	trace     string
	faultAt   time.Duration // since the start
}

// link is what lies between a host and the registry.
type link struct {
	rtt  time.Duration
	rate int64 // bits per second
}

func (l link) String() string { return fmt.Sprintf("%v, %d Mbit/s", l.rtt, l.rate/1e6) }

func parseLink(s string) (link, error) {
	rtt, mbits, ok := strings.Cut(s, ":")
	d, err := time.ParseDuration(rtt)
	n, err2 := strconv.ParseInt(mbits, 10, 64)
	if !ok || errors.Join(err, err2) != nil || d < 0 || n <= 0 || n > 1e6 {
		return link{}, fmt.Errorf("link %q is not RTT:MBITS, as in 2ms:1000", s)
	}
	return link{d, n * 1e6}, nil
}

// benchmark is one run of this command.
type benchmark struct {
	options
	rec        *bench.Recorder
	simulated  []simulated
	agreements []agreement
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s "+format+"\n", append([]any{time.Now().Format(time.TimeOnly)}, args...)...)
}

var programs = []bench.Program{
	{Name: "docker-registry", Package: "docker-registry", Version: []string{"--version"}},
	{Name: "nbdfuse", Package: "libnbd-bin"}, {Name: "fusermount3", Package: "fuse3"}, {Name: "losetup", Package: "mount"},
	{Name: "ip", Package: "iproute2"}, {Name: "tc", Package: "iproute2"},
}

// parts are the parts of the benchmark, in their order.
var parts = []string{"host", "hosts", "peer", "faults", "agree", "simulate"}

func main() {
	o := options{link: link{20 * time.Millisecond, 200e6}, parts: parts}
	flag.StringVar(&o.images, "images", "", "directory of OCI layouts, made by scripts/workloads")
	flag.StringVar(&o.only, "only", "flask", "only these images, separated by commas")
	flag.Func("parts", "parts, separated by commas: "+strings.Join(parts, ", ")+" (default all)", func(s string) error {
		o.parts = strings.Split(s, ",")
		for _, p := range o.parts {
			if !slices.Contains(parts, p) {
				return fmt.Errorf("unknown part %q", p)
			}
		}
		return nil
	})
	flag.Func("link", "link of host to the registry, as `RTT:MBITS` (default 20ms:200)", func(s string) (err error) {
		o.link, err = parseLink(s)
		return err
	})
	flag.IntVar(&o.rounds, "rounds", 3, "rounds of each row")
	flag.IntVar(&o.count, "devices", 100, "devices of one image on one host")
	flag.IntVar(&o.variants, "variants", 50, "images that share all layers but one")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "working directory")
	flag.StringVar(&o.out, "out", "", "file to which all lines are appended, besides stdout")
	flag.StringVar(&o.plots, "plots", "", "directory for plots, as SVG and PNG (default none)")
	flag.StringVar(&o.thaw, "thaw", "", "thaw to measure (default: that of this checkout)")
	flag.Func("serve-args", "further arguments for thaw serve", func(s string) error {
		o.serveArgs = strings.Fields(s)
		return nil
	})
	flag.StringVar(&o.trace, "trace", "", "trace file of a start of the image (default: record one, with everything resident)")
	flag.StringVar(&o.size, "size", "8G", "size of the filesystems")
	flag.IntVar(&o.hosts, "hosts", 8, "hosts in namespaces of their own")
	flag.IntVar(&o.per, "starts", 20, "starts on each of these hosts")
	mbits := flag.Int64("host-mbits", 1000, "rate of the link of each of these hosts, in each direction, in Mbit/s")
	flag.DurationVar(&o.faultAt, "fault-at", 500*time.Millisecond, "when something happens to a host, since the start; it should be in the middle of the transfer")
	flag.IntVar(&o.simHosts, "sim-hosts", 10_000, "hosts to simulate; a tenth of them is simulated as well")
	flag.Uint64Var(&o.seed, "seed", 1, "seed of the simulator")
	flag.StringVar(&o.plan, "plan", "", "file with the plan of a start to simulate (default: a start of flask)")
	planOf := flag.String("write-plan", "", "measure nothing; write the plan of `IMAGE,TRACE`, a block image and a trace file, to stdout")
	flag.Parse()
	o.hostRate = *mbits * 1e6
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	var code int
	var err error
	if *planOf != "" {
		err = writePlan(ctx, *planOf)
	} else {
		code, err = run(ctx, o, flag.Args())
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/fanout:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run(ctx context.Context, o options, args []string) (code int, err error) {
	if len(args) > 0 || o.rounds < 1 {
		return 2, errors.New("usage: go run ./bench/fanout [flags]; -help lists the flags")
	}
	measured := slices.ContainsFunc(o.parts, func(p string) bool { return p != "simulate" })
	if measured {
		if o.images == "" {
			return 2, errors.New("-images is missing; -parts simulate needs none")
		}
		if err := bench.Need(programs...); err != nil {
			return 1, err
		}
		if code, done, err := bench.Isolate(ctx); done || err != nil {
			return code, err
		}
	}
	out := io.Writer(os.Stdout)
	if o.out != "" {
		f, err := os.OpenFile(o.out, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			return 1, err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		out = io.MultiWriter(out, f)
	}
	dir, err := os.MkdirTemp(o.dir, "fan")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	o.dir = dir
	b := &benchmark{options: o, rec: bench.NewRecorder(out)}
	if measured && b.options.thaw == "" {
		if b.options.thaw, err = bench.BuildThaw(ctx, dir); err != nil {
			return 1, err
		}
	}
	if err := b.header(ctx, measured); err != nil {
		return 1, err
	}
	if measured {
		images, err := bench.FindWorkloads(o.images, o.only)
		if err != nil {
			return 1, err
		}
		for _, w := range images {
			if err := b.image(ctx, w); err != nil {
				return 1, fmt.Errorf("%s: %w", w.Name, err)
			}
		}
	}
	if slices.Contains(o.parts, "simulate") {
		if err := b.simulate(ctx); err != nil {
			return 1, err
		}
	}
	return 0, b.report(out)
}

// image runs the chosen parts on an image.
func (b *benchmark) image(ctx context.Context, w bench.Workload) (err error) {
	n := 0
	if slices.Contains(b.parts, "host") {
		n = b.options.variants
	}
	s, err := b.prepare(ctx, w, n)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	s.script = scriptOf(s.trace)
	if err := b.learn(ctx, s); err != nil {
		return err
	}
	for _, p := range []struct {
		name string
		run  func(context.Context, *site) error
	}{{"host", b.oneHost}, {"hosts", b.fewHosts}, {"peer", b.peerChunk}, {"faults", b.faulty}, {"agree", b.agree}} {
		if !slices.Contains(b.parts, p.name) {
			continue
		}
		if err := p.run(ctx, s); err != nil {
			return fmt.Errorf("part %s: %w", p.name, err)
		}
	}
	return nil
}

// header writes what the figures depend on.
func (b *benchmark) header(ctx context.Context, measured bool) error {
	machine, err := bench.ThisMachine()
	if err != nil {
		return err
	}
	var facts []bench.Fact
	if measured {
		if facts, err = bench.Versions(ctx, programs...); err != nil {
			return err
		}
		commit, err := bench.Commit(b.thaw)
		if err != nil {
			return err
		}
		facts = append(facts, bench.Fact{Key: "thaw", Value: commit})
	}
	command := "go run ./bench/" + bench.Command(&exec.Cmd{Args: append([]string{"fanout"}, os.Args[1:]...)})
	return b.rec.Header("thaw/bench/fanout", machine, append(facts, bench.Fact{Key: "command", Value: command})...)
}
