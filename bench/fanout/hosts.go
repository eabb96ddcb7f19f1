package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"thaw/bench"
	"thaw/blockmap"
)

// way is how a start knows what it will read.
type way struct {
	name, tag string
	args      []string
}

var ways = []way{
	{"plain", plainTag, nil},
	{"trace", tracedTag, []string{"--trace", "auto"}},
	{"bundle", bundleTag, []string{"--trace", "auto"}},
}

// distinct is how many bytes of chunks a start needs; of a bundle, how many that has.
func (s *site) distinct(w way) int64 {
	if w.name == "bundle" {
		return s.bundle
	}
	all := make(map[blockmap.Digest]int64)
	needed(all, s.script, s.index)
	return sum(all)
}

// fewHosts measures starts on several hosts at once: one host alone, hosts with a zone, without
// one, and behind a pull-through cache.
func (b *benchmark) fewHosts(ctx context.Context, s *site) error {
	for _, w := range ways[1:] {
		var sides []func(context.Context, int) error
		side := func(m mode, hosts, per int) {
			sides = append(sides, func(ctx context.Context, _ int) error { return b.hostsAtOnce(ctx, s, w, m, hosts, per) })
		}
		side(withoutZone, 1, 1)
		side(withoutZone, 1, b.per)
		side(withZone, b.hosts, b.per)
		side(withoutZone, b.hosts, b.per)
		side(withCache, b.hosts, b.per)
		if err := bench.Alternate(ctx, b.rounds, sides...); err != nil {
			return err
		}
	}
	return nil
}

func hostsName(image string, w way, m mode, hosts, per int) string {
	return fmt.Sprintf("Hosts/image=%s/way=%s/mode=%s/hosts=%d/starts=%d", image, w.name, m, hosts, per)
}

func (b *benchmark) hostsAtOnce(ctx context.Context, s *site, w way, m mode, hosts, per int) (err error) {
	f, err := b.newFleet(ctx, s, m, hosts, w.args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	x, err := f.start(ctx, w.tag, f.hosts, per, nil)
	if err != nil {
		return err
	}
	return b.note(hostsName(s.Name, w, m, hosts, per), x, s.distinct(w))
}

// note records what starts came to. An error of a reader fails the benchmark.
func (b *benchmark) note(name string, x *started, distinct int64) error {
	if err := errors.Join(x.errs...); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	progress("%s: %v, p50 %v, %s from the registry in %d requests, %.3f of distinct, busiest %.2f of the mean", name, x.took.Round(time.Millisecond),
		x.percentile(0.5).Round(time.Millisecond), bench.Bytes(x.registry), x.requests, float64(x.registry)/float64(distinct), x.toMean())
	return b.rec.Add(name, x.measures(distinct)...)
}

// fault is something that happens to one host of a zone while starts run.
type fault struct {
	name string
	// before prepares it, and returns the hosts that start the image; readers of these see no
	// error.
	before func(ctx context.Context, f *fleet, w way) (hosts []*member, err error)
	during func(ctx context.Context, f *fleet) error
}

// halved is the fault that costs each half of the hosts all bytes that it does not have yet.
const halved = "halved"

var faults = []fault{
	{name: "added", during: func(ctx context.Context, f *fleet) error {
		m, err := f.add(ctx)
		if err != nil {
			return err
		}
		c, err := dial(ctx, m.server.Socket, f.s.at(f.addr, tracedTag))
		if err != nil {
			return err
		}
		defer c.close()
		return c.start(ctx, f.s.script)
	}},
	{name: "killed", before: allButLast, during: func(ctx context.Context, f *fleet) error {
		f.last().server.Kill()
		return nil
	}},
	{name: "lost", before: allButLast, during: func(ctx context.Context, f *fleet) error {
		return f.net.sw.run(ctx, "ip", "link", "set", f.last().name, "down")
	}},
	{name: "partitioned", during: func(ctx context.Context, f *fleet) error {
		for _, other := range f.hosts[:len(f.hosts)-1] {
			if err := f.net.separate(ctx, f.last().namespace, other.namespace); err != nil {
				return err
			}
		}
		return nil
	}},
	{name: halved, during: func(ctx context.Context, f *fleet) error {
		half := len(f.hosts) / 2
		for _, a := range f.hosts[:half] {
			for _, b := range f.hosts[half:] {
				if err := f.net.separate(ctx, a.namespace, b.namespace); err != nil {
					return err
				}
			}
		}
		return nil
	}},
	{name: "slow", before: allButLast, during: func(ctx context.Context, f *fleet) error {
		return f.net.limit(ctx, f.last().namespace, f.b.hostRate/10)
	}},
	{name: "lying", before: makeLiar},
}

func (f *fleet) last() *member { return f.hosts[len(f.hosts)-1] }

// allButLast starts the image on all hosts, but counts errors of all but the last one, to which
// the fault happens.
func allButLast(_ context.Context, f *fleet, _ way) ([]*member, error) {
	return f.hosts[:len(f.hosts)-1], nil
}

// makeLiar starts the image on the last host alone, and then changes all bytes that it has. It
// believes them, as a host does whose disk lies.
func makeLiar(ctx context.Context, f *fleet, w way) ([]*member, error) {
	liar := f.last()
	if _, err := liar.server.Stop(); err != nil {
		return nil, err
	}
	f.mode = withoutZone // it reads everything from the registry, and the others nothing
	err := f.serve(ctx, liar)
	f.mode = withZone
	if err != nil {
		return nil, err
	}
	x, err := f.start(ctx, w.tag, []*member{liar}, 1, nil)
	if err == nil {
		err = errors.Join(x.errs...)
	}
	if err == nil {
		_, err = liar.server.Stop()
	}
	if err != nil {
		return nil, fmt.Errorf("start the image on the host that is to lie: %w", err)
	}
	changed, err := scramble(filepath.Join(liar.dir, "cache"))
	if err != nil {
		return nil, err
	}
	if changed == 0 {
		return nil, errors.New("the host that is to lie has no data")
	}
	if err := f.serve(ctx, liar); err != nil {
		return nil, err
	}
	return f.hosts[:len(f.hosts)-1], f.meet(ctx, f.hosts)
}

// scramble writes other bytes over the data of the large files below a directory, and returns
// how many. Holes stay.
func scramble(dir string) (changed int64, err error) {
	rng := rand.NewChaCha8([32]byte{1})
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() < 1<<20 {
			return err // maps and manifests
		}
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer file.Close()
		for at := int64(0); ; {
			from, err := unix.Seek(int(file.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return nil
			}
			if err != nil {
				return err
			}
			if at, err = unix.Seek(int(file.Fd()), from, unix.SEEK_HOLE); err != nil {
				return err
			}
			if _, err := io.CopyN(io.NewOffsetWriter(file, from), rng, at-from); err != nil {
				return err
			}
			changed += at - from
		}
	})
	return changed, err
}

// faulty measures starts while something happens to a host of the zone.
func (b *benchmark) faulty(ctx context.Context, s *site) error {
	w := ways[1]
	for range b.rounds {
		for _, x := range faults {
			if err := b.withFault(ctx, s, w, x); err != nil {
				return fmt.Errorf("a host is %s: %w", x.name, err)
			}
		}
	}
	return nil
}

func faultName(image string, w way, x fault) string {
	return fmt.Sprintf("Fault/image=%s/way=%s/fault=%s", image, w.name, x.name)
}

func (b *benchmark) withFault(ctx context.Context, s *site, w way, x fault) (err error) {
	f, err := b.newFleet(ctx, s, withZone, b.hosts, w.args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	hosts := f.hosts
	if x.before != nil {
		if hosts, err = x.before(ctx, f, w); err != nil {
			return err
		}
	}
	var meanwhile func(context.Context) error
	if x.during != nil {
		meanwhile = func(ctx context.Context) error {
			if err := sleep(ctx, b.faultAt); err != nil {
				return err
			}
			return x.during(ctx, f)
		}
	}
	r, err := f.start(ctx, w.tag, hosts, b.per, meanwhile)
	if err != nil {
		return err
	}
	return b.note(faultName(s.Name, w, x), r, s.distinct(w))
}
