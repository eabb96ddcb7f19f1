// Command write measures writes to NBD servers with fio: thaw with an overlay, nbdkit (a
// file, and a copy-on-write filter over a file), qemu-nbd with qcow2 over a file, and fio
// on a plain file, all in the same run and over the same bytes.
//
//	go run ./bench/write -thaw PATH-OF-THAW
//
// For each row of the table, each round measures one side after the other, on a unix
// socket. Each starts with nothing written. A second table compares the first write to each
// block with the second one. Each round is a line on stdout, in the format that benchstat
// reads; Markdown tables follow. Rows named commit measure thaw commit, and have a table of
// their own.
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

	"golang.org/x/sys/unix"

	"thaw/bench"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/write:", err)
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
	sides   string
	quiet   time.Duration
}

func run(ctx context.Context) error {
	var o options
	flag.StringVar(&o.thaw, "thaw", "thaw", "thaw to measure")
	flag.StringVar(&o.dir, "dir", "", "directory for the image, the cache and the overlays, kept for later runs (default: a temporary one)")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	flag.DurationVar(&o.runtime, "runtime", 2*time.Second, "time of each run of fio")
	flag.IntVar(&o.sizeMiB, "size", 512, "content to write to, in MiB")
	flag.StringVar(&o.only, "only", "", "only rows whose name contains this")
	flag.StringVar(&o.sides, "sides", "", "only these sides, separated by commas")
	flag.DurationVar(&o.quiet, "quiet", 0, "before each round, wait until the machine is idle, for at most this time")
	flag.Parse()
	tools := []bench.Program{
		{Name: "fio", Package: "fio", Version: []string{"--version"}},
		{Name: "nbdkit", Package: "nbdkit", Version: []string{"--version"}},
		{Name: "qemu-nbd", Package: "qemu-utils", Version: []string{"--version"}},
		{Name: "qemu-img", Package: "qemu-utils"},
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
		if o.dir, err = os.MkdirTemp("", "bench-write-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	b := &benchmark{options: o, rec: bench.NewRecorder(os.Stdout)}
	if err := b.rec.Header("thaw/bench/write", machine, append(versions, bench.Fact{Key: "command", Value: "go run ./bench/write " + strings.Join(os.Args[1:], " ")})...); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	if err := b.measureFirst(ctx); err != nil {
		return err
	}
	if err := b.measureCommit(ctx); err != nil {
		return err
	}
	return b.report(os.Stdout)
}

// row is a row of the table: a load.
type row struct {
	name string
	job  bench.FioJob
}

var rows = []row{
	{"4k-QD1", bench.FioJob{BS: "4k", Depth: 1, RW: "randwrite"}},
	{"4k-QD32", bench.FioJob{BS: "4k", Depth: 32, RW: "randwrite"}},
	{"4k-QD1-fsync64", bench.FioJob{BS: "4k", Depth: 1, RW: "randwrite", Fsync: 64}},
	{"4k-QD32-fsync64", bench.FioJob{BS: "4k", Depth: 32, RW: "randwrite", Fsync: 64}},
	{"1M-seq", bench.FioJob{BS: "1M", Depth: 8, RW: "write"}},
	{"4k-QD32-mixed", bench.FioJob{BS: "4k", Depth: 32, RW: "randrw", More: []string{"--rwmixread=70"}}},
}

// firstRows are loads that write to each block once, and then again.
var firstRows = []row{
	{"4k-QD1", bench.FioJob{BS: "4k", Depth: 1, RW: "randwrite"}},
	{"4k-QD32", bench.FioJob{BS: "4k", Depth: 32, RW: "randwrite"}},
	{"4k-QD1-fsync64", bench.FioJob{BS: "4k", Depth: 1, RW: "randwrite", Fsync: 64}},
	{"4k-QD32-fsync64", bench.FioJob{BS: "4k", Depth: 32, RW: "randwrite", Fsync: 64}},
	{"1M-seq", bench.FioJob{BS: "1M", Depth: 8, RW: "write"}},
}

const (
	iops      = "iops"
	bandwidth = "B/s"
	cpuPerIO  = "cpu-ns/io"
	p99       = "p99-ns"
)

func (b *benchmark) wanted(name string) bool { return strings.Contains(name, b.only) }

// over returns the job for the content.
func (b *benchmark) over(j bench.FioJob) bench.FioJob {
	j.Offset, j.Size = b.offset, int64(b.sizeMiB)<<20
	return j
}

// measure runs all rows.
func (b *benchmark) measure(ctx context.Context) error {
	for _, r := range rows {
		if !b.wanted(r.name) {
			continue
		}
		j := b.over(r.job)
		j.Runtime = b.runtime
		if err := b.alternate(ctx, "Write/"+r.name, sides, func(ctx context.Context, x *instance, name string) error {
			return b.add(ctx, x, name, j)
		}); err != nil {
			return err
		}
	}
	return nil
}

// measureFirst compares first writes with second ones.
func (b *benchmark) measureFirst(ctx context.Context) error {
	for _, r := range firstRows {
		if !b.wanted("first/" + r.name) {
			continue
		}
		j := b.over(r.job)
		if r.job.BS == "4k" {
			j.Size /= 4 // a minute at depth 1 otherwise
		}
		if err := b.alternate(ctx, "Write/first/"+r.name, firstSides, func(ctx context.Context, x *instance, name string) error {
			for _, pass := range []string{"first", "second"} {
				if err := b.add(ctx, x, name+"/pass="+pass, j); err != nil {
					return err
				}
				unix.Sync() // what one pass has left to the disk does not slow down the next one
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// alternate runs f for each side in turn, each newly started.
func (b *benchmark) alternate(ctx context.Context, name string, sides []side, f func(ctx context.Context, x *instance, name string) error) error {
	var all []func(context.Context, int) error
	for _, s := range sides {
		if b.sides != "" && !strings.Contains(","+b.sides+",", ","+s.name+",") {
			continue
		}
		all = append(all, func(ctx context.Context, _ int) error {
			if b.quiet > 0 {
				if _, err := bench.Quiet(ctx, b.quiet); err != nil {
					return err
				}
			}
			x, err := b.start(ctx, s)
			if err == nil {
				unix.Sync()
				err = errors.Join(f(ctx, x, name+"/server="+s.name), x.stop())
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, s.name, err)
			}
			return nil
		})
	}
	return bench.Alternate(ctx, b.rounds, all...)
}

// add runs a job against a side, and records the round.
func (b *benchmark) add(ctx context.Context, x *instance, name string, j bench.FioJob) error {
	res, err := x.fio(ctx, j)
	if err != nil {
		return err
	}
	return b.rec.Add(name,
		bench.Measure{Value: 1e9 / max(res.IOPS, 1), Unit: bench.Wall},
		bench.Measure{Value: res.IOPS, Unit: iops},
		bench.Measure{Value: res.Bandwidth, Unit: bandwidth},
		bench.Measure{Value: res.CPU.Seconds() * 1e9 / max(res.IOs, 1), Unit: cpuPerIO},
		bench.Measure{Value: res.P99, Unit: p99})
}
