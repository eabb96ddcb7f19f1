package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"thaw/bench"
)

// The programs that a start by stargz-snapshotter runs, which a host has in
// memory.
var stargzPrograms = []string{"ctr-remote", "containerd-shim-runc-v2", "runc", "nsenter", "setpriv"}

// stargzNames are those of eStargz images, by row.
var stargzNames = map[string]string{stargzRow: "stargz:latest", stargzOptimized: "stargz-optimized:latest"}

// prepareStargz converts the image. Where the programs are missing it says so,
// and the rows are left out.
func (b *benchmark) prepareStargz(ctx context.Context, p *prepared) (err error) {
	if !b.wants(stargzRow) && !b.wants(stargzOptimized) {
		return nil
	}
	programs, err := bench.FindStargz()
	if err != nil {
		for row := range stargzNames {
			p.lacks[row] = err.Error()
		}
		return b.results.note("left out: " + err.Error())
	}
	dir := filepath.Join(p.dir, "stargz")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	s, err := programs.Start(ctx, dir, p.registry.Addr)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.Close())
		if err == nil {
			err = os.RemoveAll(dir)
		}
	}()
	from := p.direct(sourceName)
	if b.wants(stargzRow) {
		if err := s.Convert(ctx, from, p.direct(stargzNames[stargzRow])); err != nil {
			return err
		}
	}
	if b.wants(stargzOptimized) {
		if err := s.Optimize(ctx, from, p.direct(stargzNames[stargzOptimized]), bench.Start); err != nil {
			return err
		}
	}
	progress("%s: converted to eStargz", p.Name)
	return nil
}

// startStargz pulls lazily, and runs. The daemons run before, as they do on a
// host, with nothing in their stores.
func startStargz(row string) func(context.Context, *benchmark, *site, string, *clock) ([]bench.Measure, error) {
	return func(ctx context.Context, b *benchmark, s *site, dir string, c *clock) (_ []bench.Measure, err error) {
		programs, err := bench.FindStargz()
		if err != nil {
			return nil, err
		}
		addr := s.wires.registry.Addr().String()
		daemons, err := programs.Start(ctx, dir, addr)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, daemons.Close()) }()
		ref := s.at(addr, stargzNames[row])
		c.start()
		if err := daemons.Pull(ctx, ref); err != nil {
			return nil, err
		}
		c.mark(mounted)
		before := c.sofar()
		out, err := daemons.Exec(ctx, ref, bench.Start)
		took := c.sofar()
		c.stop(took)
		if err == nil {
			err = s.Check(out)
		}
		if err != nil {
			return nil, fmt.Errorf("%w%s", err, daemons.Said())
		}
		return []bench.Measure{{Value: float64(took - before), Unit: runTime}}, nil
	}
}
