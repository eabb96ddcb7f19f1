package main

import (
	"context"
	"errors"

	"thaw/bench"
)

// startCold mounts the flat image from the local disk, and runs it.
func startCold(ctx context.Context, b *benchmark, s *site, dir string, c *clock) (ms []bench.Measure, err error) {
	c.start()
	root, err := bench.MountFile(ctx, s.flat, dir, b.readAhead)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	c.mark(mounted)
	return s.answer(ctx, root, s.load, c)
}

// startWarm runs the image a second time from the same mount.
func startWarm(ctx context.Context, b *benchmark, s *site, dir string, c *clock) (ms []bench.Measure, err error) {
	root, err := bench.MountFile(ctx, s.flat, dir, b.readAhead)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	if _, _, err := s.load.run(ctx, root); err != nil {
		return nil, err
	}
	c.start()
	return s.answer(ctx, root, s.load, c)
}

// answer runs the load, and stops the clock.
func (p *prepared) answer(ctx context.Context, root *bench.Root, l load, c *clock) ([]bench.Measure, error) {
	before := c.sofar()
	out, u, err := l.run(ctx, root)
	// Not the time until Run returns: it also looks for processes that are left.
	c.stop(before + u.Wall)
	if err == nil {
		err = p.check(l, out)
	}
	if err != nil {
		return nil, err
	}
	return []bench.Measure{{Value: float64(u.Wall), Unit: runTime}, {Value: float64(u.User + u.Sys), Unit: "run-cpu-ns"}}, nil
}
