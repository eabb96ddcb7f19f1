// Command nbd measures NBD servers with fio: thaw, nbdkit (file and memory),
// qemu-nbd and go-nbd, all in the same run and with the same bytes.
//
//	go run ./bench/nbd -thaw PATH-OF-THAW
//
// For each row of the table, each round measures one server after the other, on a
// unix socket and on TCP loopback. A server's processor time is its own, from
// /proc, while fio runs. The rows "disk" measure servers in a memory-limited cgroup,
// whose data are four times that. Each round is a line on stdout, in the format that
// benchstat reads; a Markdown table follows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == serveVerb {
		if err := serveMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench/nbd:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/nbd:", err)
		os.Exit(1)
	}
}

type options struct {
	thaw    string
	dir     string
	rounds  int
	runtime time.Duration
	sizeMiB int
	only    string
	record  bool
}

func run(ctx context.Context) error {
	var o options
	flag.StringVar(&o.thaw, "thaw", "thaw", "thaw to measure")
	flag.StringVar(&o.dir, "dir", "", "directory for the image and the cache, kept for later runs (default: a temporary one)")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	flag.DurationVar(&o.runtime, "runtime", 2*time.Second, "time of each run of fio")
	flag.IntVar(&o.sizeMiB, "size", 1024, "content to read, in MiB")
	flag.StringVar(&o.only, "only", "", "only rows whose name contains this")
	flag.BoolVar(&o.record, "record", false, "also measure thaw while it records a start")
	flag.Parse()
	tools := []bench.Program{
		{Name: "fio", Package: "fio", Version: []string{"--version"}},
		{Name: "nbdkit", Package: "nbdkit", Version: []string{"--version"}},
		{Name: "qemu-nbd", Package: "qemu-utils", Version: []string{"--version"}},
		{Name: "nbdcopy", Package: "libnbd-bin"},
	}
	if err := bench.Need(tools...); err != nil {
		return err
	}
	machine, err := bench.ThisMachine()
	if err != nil {
		return err
	}
	versions, err := bench.Versions(ctx, tools...)
	if err != nil {
		return err
	}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "bench-nbd-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	b := &benchmark{options: o, rec: bench.NewRecorder(os.Stdout)}
	facts := append(versions, bench.Fact{Key: "go-nbd", Value: "v0.3.2"},
		bench.Fact{Key: "command", Value: "go run ./bench/nbd " + strings.Join(os.Args[1:], " ")})
	if err := b.rec.Header("thaw/bench/nbd", machine, facts...); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, transport := range []string{"unix", "tcp"} {
		if err := b.measure(ctx, transport); err != nil {
			return err
		}
	}
	if err := b.measureMixed(ctx); err != nil {
		return err
	}
	if err := b.measureDisk(ctx); err != nil {
		return err
	}
	return b.report(os.Stdout)
}

// row is a row of the table: a load.
type row struct {
	name string
	job  bench.FioJob
	// delayed rows run against devices that take 5 ms per read.
	delayed bool
}

var rows = []row{
	{name: "4k-QD1", job: bench.FioJob{BS: "4k", Depth: 1, RW: "randread"}},
	{name: "4k-QD32", job: bench.FioJob{BS: "4k", Depth: 32, RW: "randread"}},
	{name: "4k-QD128", job: bench.FioJob{BS: "4k", Depth: 128, RW: "randread"}},
	{name: "4k-QD32-4conn", job: bench.FioJob{BS: "4k", Depth: 32, Jobs: 4, RW: "randread"}},
	{name: "64k-QD32", job: bench.FioJob{BS: "64k", Depth: 32, RW: "randread"}},
	{name: "1M-seq", job: bench.FioJob{BS: "1M", Depth: 8, RW: "read"}},
	{name: "4k-QD32-5ms", job: bench.FioJob{BS: "4k", Depth: 32, RW: "randread"}, delayed: true},
}

const (
	iops      = "iops"
	cpuPerIO  = "cpu-ns/io"
	bandwidth = "B/s"
	p99       = "p99-ns"
)

func (b *benchmark) wanted(name string) bool { return strings.Contains(name, b.only) }

// measure runs all rows over a transport.
func (b *benchmark) measure(ctx context.Context, transport string) error {
	for _, r := range rows {
		name := transport + "/" + r.name
		if !b.wanted(name) || r.delayed && transport != "unix" {
			continue
		}
		servers, err := b.start(ctx, transport, r.delayed)
		if err != nil {
			return errors.Join(err, stopAll(servers))
		}
		sides := make([]func(context.Context, int) error, len(servers))
		for i, s := range servers {
			sides[i] = func(ctx context.Context, _ int) error {
				res, err := b.fio(ctx, s, r.job)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", name, s.Name, err)
				}
				return b.rec.Add("NBD/"+name+"/server="+s.Name,
					bench.Measure{Value: 1e9 / max(res.IOPS, 1), Unit: bench.Wall},
					bench.Measure{Value: res.IOPS, Unit: iops},
					bench.Measure{Value: res.Bandwidth, Unit: bandwidth},
					bench.Measure{Value: res.CPU.Seconds() * 1e9 / max(res.IOs, 1), Unit: cpuPerIO},
					bench.Measure{Value: res.P99, Unit: p99})
			}
		}
		err = bench.Alternate(ctx, b.rounds, sides...)
		if err := errors.Join(err, stopAll(servers)); err != nil {
			return err
		}
	}
	return nil
}

// measureMixed compares the latency of resident reads on one connection: alone,
// and mixed with reads that take 5 ms.
func (b *benchmark) measureMixed(ctx context.Context) error {
	if !b.wanted("mixed") {
		return nil
	}
	alone := bench.FioJob{BS: "4k", Depth: 32, RW: "randread", Offset: 0, Size: mixedHits}
	mixed := bench.FioJob{BS: "4k", Depth: 32, RW: "randread", Offset: 0, Size: mixedHits + mixedMisses}
	s, err := b.startMixed(ctx)
	if err != nil {
		return err
	}
	err = bench.Alternate(ctx, b.rounds, func(ctx context.Context, _ int) error {
		for name, j := range map[string]bench.FioJob{"hits-alone": alone, "hits-mixed": mixed} {
			res, err := b.fioLatencies(ctx, s, j, mixedHits)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if err := b.rec.Add("NBD/mixed/"+name+"/server=thaw",
				bench.Measure{Value: res.P99, Unit: p99}, bench.Measure{Value: res.Median, Unit: "p50-ns"},
				bench.Measure{Value: res.IOPS, Unit: iops}); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, s.Stop())
}
