// Command attach measures nodes with fio: thaw's drivers that this host has, nbdfuse with
// a loop device, and a loop device on the flat file, all in the same run and with the same
// bytes.
//
//	go run ./bench/attach
//
// For each row of the table, each round measures one side after the other. All content is
// in the page cache, and fio reads past the page cache of the node: what is measured is
// the way from the node to the bytes. The side nbdfuse-file has no loop device: fio reads the
// file by FUSE. (That of thaw is mounted nowhere.) Each round is a line on stdout, in the
// format that benchstat reads; a Markdown table follows. It requires root.
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
			fmt.Fprintln(os.Stderr, "bench/attach:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code, done, err := bench.Isolate(ctx)
	if err == nil && !done {
		err = run(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/attach:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

type options struct {
	dir     string
	rounds  int
	runtime time.Duration
	sizeMiB int
	only    string
	sides   string
}

func run(ctx context.Context) (err error) {
	var o options
	flag.StringVar(&o.dir, "dir", "", "directory for the content (default: a temporary one)")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	flag.DurationVar(&o.runtime, "runtime", 2*time.Second, "time of each run of fio")
	flag.IntVar(&o.sizeMiB, "size", 512, "content to read, in MiB")
	flag.StringVar(&o.only, "only", "", "only rows whose name contains this")
	flag.StringVar(&o.sides, "sides", "thaw-fuse,nbdfuse,loop", "sides to measure, of thaw-fuse, thaw-ublk, thaw-nbd, nbdfuse, nbdfuse-file, loop")
	flag.Parse()
	tools := []bench.Program{
		{Name: "fio", Package: "fio", Version: []string{"--version"}},
		{Name: "nbdfuse", Package: "libnbd-bin", Version: []string{"--version"}},
		{Name: "losetup", Package: "mount", Version: []string{"--version"}},
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
		if o.dir, err = os.MkdirTemp("", "bench-attach-"); err != nil {
			return err
		}
		defer os.RemoveAll(o.dir)
	}
	b := &benchmark{options: o, rec: bench.NewRecorder(os.Stdout), file: filepath.Join(o.dir, "content")}
	facts := append(versions, bench.Fact{Key: "command", Value: "go run ./bench/attach " + strings.Join(os.Args[1:], " ")})
	if err := b.rec.Header("thaw/bench/attach", machine, facts...); err != nil {
		return err
	}
	if err := b.prepare(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	for _, name := range strings.Split(o.sides, ",") {
		s, err := b.start(ctx, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		b.sides = append(b.sides, s)
	}
	for _, r := range rows {
		if !strings.Contains(r.name, o.only) {
			continue
		}
		sides := make([]func(context.Context, int) error, len(b.sides))
		for i, s := range b.sides {
			sides[i] = func(ctx context.Context, _ int) error { return b.measure(ctx, s, r) }
		}
		if err := bench.Alternate(ctx, o.rounds, sides...); err != nil {
			return err
		}
	}
	return b.report(os.Stdout)
}
