package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"thaw/bench"
	"thaw/bench/cold/stargz"
)

// benchmark is one run of this command.
type benchmark struct {
	options
	results *results
	dir     string // working directory of this run
	chosen  []row
	out     io.Writer
	warm    []string // files of the programs that a host has in memory
}

// site is a prepared image behind a link, and what is done with it.
type site struct {
	*prepared
	*wires
	load load
}

// image measures all rows of an image over all links.
func (b *benchmark) image(ctx context.Context, w bench.Workload) (err error) {
	if b.warm == nil {
		b.warm = b.hostFiles(ctx)
	}
	p, err := b.prepare(ctx, w)
	if p != nil {
		defer func() { err = errors.Join(err, p.close()) }()
	}
	if err != nil {
		return err
	}
	for _, do := range b.loads {
		if err := b.expect(ctx, p, do); err != nil {
			return err
		}
		planned := p.planned
		if do.name == everything.name {
			planned = p.stored
		}
		if err := b.results.addPlan(do.imageName(p.Name), planned, p.size, p.stored); err != nil {
			return err
		}
		for _, l := range b.links {
			if err := b.overLink(ctx, p, l, do); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *benchmark) overLink(ctx context.Context, p *prepared, l link, do load) (err error) {
	w, err := openWires(l, p.registry.Addr, p.files.Addr())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	if err := b.results.addLink(l); err != nil {
		return err
	}
	s := &site{p, w, do}
	var sides []func(context.Context, int) error
	for _, r := range b.chosen {
		if !do.has(r) {
			continue
		}
		if why := p.lacks[r.name]; why != "" {
			progress("%s: no row %s: %s", p.Name, r.name, why)
			continue
		}
		sides = append(sides, func(ctx context.Context, round int) error {
			if err := b.round(ctx, s, r, round); err != nil {
				return fmt.Errorf("%s, %s over %v: %w", r.name, do.name, l, err)
			}
			return nil
		})
	}
	return bench.Alternate(ctx, b.rounds, sides...)
}

// round starts the image once, and records it.
func (b *benchmark) round(ctx context.Context, s *site, r row, round int) (err error) {
	dir := filepath.Join(b.dir, "start")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if _, err := bench.Quiet(ctx, b.quiet); err != nil {
		return err
	}
	if err := b.forget(); err != nil {
		return err
	}
	if err := s.wires.settle(ctx); err != nil {
		return err
	}
	c := &clock{w: s.wires}
	defer c.abandon()
	more, err := r.start(ctx, b, s, dir, c)
	if err != nil {
		return err
	}
	image := s.load.imageName(s.Name)
	progress("%s %s %d: %s %.2f s, %d requests, %s", image, s.link.name, round+1, r.name, c.end.Seconds(), c.used.Requests, bench.Bytes(c.used.Down))
	name := startName(image, s.link.name, r.name)
	if err := b.results.rec.Add(name, append(c.measures(), more...)...); err != nil {
		return err
	}
	if r.timeline && round == b.rounds-1 {
		return b.results.addTimeline(c.timeline(image, s.link.name, r.name))
	}
	return nil
}

// forget makes the page cache that of a host that has never had the image: it
// holds the programs that start images, and nothing else.
func (b *benchmark) forget() error {
	if err := bench.DropCaches(); err != nil {
		return err
	}
	for _, f := range b.warm {
		if err := readFile(f); err != nil {
			return err
		}
	}
	return nil
}

// hostFiles returns the programs that the chosen rows run on the host, and the
// libraries that they are linked to.
func (b *benchmark) hostFiles(ctx context.Context) []string {
	files := []string{b.thaw}
	programs := append([]bench.Program{{Name: "chroot"}}, stargz.Programs...)
	for _, p := range append(programs, needsOf(b.chosen)...) {
		path, err := exec.LookPath(p.Name)
		if err != nil {
			continue // no chosen row needs it: Need has checked those
		}
		files = append(files, path)
		// ldd fails for static programs.
		out, _ := exec.CommandContext(ctx, "ldd", path).Output()
		for field := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(field, "/") {
				files = append(files, field)
			}
		}
	}
	return files
}

func readFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}
