package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"thaw/bench"
	"thaw/bench/cold/stargz"
)

// stargzNames are the names of eStargz images, by row.
var stargzNames = map[string]string{stargzRow: "stargz:latest", stargzOptimized: "stargz-optimized:latest"}

// prepareStargz converts the image. If programs are missing, it notes that and
// leaves out the rows.
func (b *benchmark) prepareStargz(ctx context.Context, p *prepared) (err error) {
	if !b.wants(stargzRow) && !b.wants(stargzOptimized) {
		return nil
	}
	if err := stargz.Find(); err != nil {
		for row := range stargzNames {
			p.lacks[row] = err.Error()
		}
		return b.results.note("no rows of stargz: " + err.Error())
	}
	missing := false
	for row, tag := range stargzNames {
		if !b.wants(row) {
			continue
		}
		kept := b.kept(p, row)
		if _, err := os.Stat(filepath.Join(kept, "oci-layout")); kept == "" || err != nil {
			missing = true
		} else if _, err := bench.Push(ctx, kept, "latest", p.direct(tag)); err != nil {
			return err
		}
	}
	if !missing {
		return nil
	}
	dir := filepath.Join(p.dir, "stargz")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	host, err := stargz.Start(ctx, dir, p.registry.Addr)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w%s", err, host.Log())
		}
		err = errors.Join(err, host.Close())
		if err == nil {
			err = os.RemoveAll(dir)
		}
	}()
	from := p.direct(sourceName)
	for row, tag := range stargzNames {
		if !b.wants(row) {
			continue
		}
		to := p.direct(tag)
		if row == stargzOptimized {
			err = host.Optimize(ctx, from, to, bench.Start)
		} else {
			err = host.Convert(ctx, from, to)
		}
		if err == nil {
			err = keep(ctx, to, b.kept(p, row))
		}
		if err != nil {
			return err
		}
		progress("%s: converted for %s", p.Name, row)
	}
	return nil
}

// kept returns where a converted image is kept between runs; empty if it is not.
func (b *benchmark) kept(p *prepared, row string) string {
	if b.keep == "" {
		return ""
	}
	return filepath.Join(b.keep, p.Name+"-"+p.digest.Hex[:12]+"-"+row)
}

// keep copies an image of the registry to a layout, unless dir is empty.
func keep(ctx context.Context, ref, dir string) error {
	if dir == "" {
		return nil
	}
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		return err
	}
	img, err := remote.Image(r, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	// It gets its name when it is complete.
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	l, err := layout.Write(part, empty.Index)
	if err != nil {
		return err
	}
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"})); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(part, dir)
}

// startStargz pulls lazily, and runs the program. The daemons are started before
// the clock, as on a host, with empty stores.
func startStargz(row string) func(context.Context, *benchmark, *site, string, *clock) ([]bench.Measure, error) {
	return func(ctx context.Context, b *benchmark, s *site, dir string, c *clock) (_ []bench.Measure, err error) {
		addr := s.wires.registry.Addr().String()
		host, err := stargz.Start(ctx, dir, addr)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, host.Close()) }()
		ref := s.at(addr, stargzNames[row])
		c.start()
		if err := host.Pull(ctx, ref); err != nil {
			return nil, fmt.Errorf("%w%s", err, host.Log())
		}
		c.mark(mounted)
		before := c.sofar()
		out, err := host.Exec(ctx, ref, bench.Start)
		took := c.sofar()
		c.stop(took)
		if err == nil {
			err = s.Check(out)
		}
		if err != nil {
			return nil, fmt.Errorf("%w%s", err, host.Log())
		}
		return []bench.Measure{{Value: float64(took - before), Unit: runTime}}, nil
	}
}
