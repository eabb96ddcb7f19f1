package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"thaw/bench"
	"thaw/blockmap"
)

// oneHost measures many devices on one host: of one image, and of images that share all
// layers but one. The registry is behind a link.
func (b *benchmark) oneHost(ctx context.Context, s *site) error {
	for _, w := range ways {
		err := bench.Alternate(ctx, b.rounds,
			func(ctx context.Context, _ int) error { return b.devices(ctx, s, w, 1) },
			func(ctx context.Context, _ int) error { return b.devices(ctx, s, w, b.count) })
		if err != nil {
			return err
		}
	}
	return bench.Alternate(ctx, b.rounds,
		func(ctx context.Context, _ int) error { return b.sharing(ctx, s, 1) },
		func(ctx context.Context, _ int) error { return b.sharing(ctx, s, len(s.variants)) })
}

// learn reads all scripts from a server that reads the registry directly, and notes the sums.
func (b *benchmark) learn(ctx context.Context, s *site) (err error) {
	dir := filepath.Join(s.dir, "learn")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	args := []string{"--complete", "off"}
	for _, v := range s.variants {
		args = append(args, s.direct(v.tag))
	}
	server, err := bench.Serve(ctx, b.thaw, s.direct(plainTag), dir, args...)
	if err != nil {
		return err
	}
	defer server.Kill()
	learn := func(tag string, sc script) error {
		c, err := dial(ctx, server.Socket, s.direct(tag))
		if err != nil {
			return err
		}
		defer c.close()
		return c.learn(sc)
	}
	if err := learn(plainTag, s.script); err != nil {
		return err
	}
	for i := range s.variants {
		if err := learn(s.variants[i].tag, s.variants[i].script); err != nil {
			return err
		}
	}
	_, err = server.Stop()
	return err
}

// devices starts an image that many times at once, on an empty cache.
func (b *benchmark) devices(ctx context.Context, s *site, w way, n int) error {
	starts := make([]start, n)
	for i := range starts {
		starts[i] = start{w.tag, s.script}
	}
	name := fmt.Sprintf("Devices/image=%s/way=%s/devices=%d", s.Name, w.name, n)
	return b.onHost(ctx, s, name, starts, nil, append([]string{"--complete", "off"}, w.args...), s.distinct(w))
}

// sharing starts variants of the image at once.
func (b *benchmark) sharing(ctx context.Context, s *site, n int) error {
	var starts []start
	var tags []string
	var opens int64
	distinct := make(map[blockmap.Digest]int64)
	for _, v := range s.variants[:n] {
		starts = append(starts, start{v.tag, v.script})
		tags = append(tags, v.tag)
		opens += v.opens
		needed(distinct, v.script, v.index)
	}
	return b.onHost(ctx, s, fmt.Sprintf("Sharing/image=%s/images=%d", s.Name, n), starts, tags, []string{"--complete", "off"}, sum(distinct)+opens)
}

// start is one start: the image, and what it reads.
type start struct {
	tag    string
	script script
}

// onHost runs starts at once against one server, and records the time from the server's launch
// to the last start's end, what the link carried, and the memory.
func (b *benchmark) onHost(ctx context.Context, s *site, name string, starts []start, tags, args []string, distinct int64) (err error) {
	dir := filepath.Join(s.dir, "host")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	link, err := bench.ListenLink(s.registry.Addr, b.link.rtt, b.link.rate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	addr := link.Addr().String()
	if tags == nil {
		tags = []string{starts[0].tag}
	}
	for _, t := range tags[1:] {
		args = append(args, s.at(addr, t))
	}
	began := time.Now()
	server, err := bench.Serve(ctx, b.thaw, s.at(addr, tags[0]), dir, append(args, b.serveArgs...)...)
	if err != nil {
		return err
	}
	defer server.Kill()
	open := link.Stats()
	clients := make([]*client, len(starts))
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.close()
			}
		}
	}()
	ready := time.Now()
	times := make([]time.Duration, len(starts))
	errs := make([]error, len(starts))
	var wg sync.WaitGroup
	for i, x := range starts {
		wg.Go(func() {
			if clients[i], errs[i] = dial(ctx, server.Socket, s.at(addr, x.tag)); errs[i] == nil {
				errs[i] = clients[i].start(ctx, x.script)
			}
			times[i] = time.Since(ready)
		})
	}
	wg.Wait()
	took := time.Since(began)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// Again, with everything resident: what the machine takes for that many starts.
	again := time.Now()
	for i, x := range starts {
		wg.Go(func() { errs[i] = clients[i].start(ctx, x.script) })
	}
	wg.Wait()
	resident := time.Since(again)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	memory, err := anonymous(server.PID())
	if err != nil {
		return err
	}
	used := link.Stats()
	for _, c := range clients {
		c.close()
	}
	clear(clients)
	served, err := server.Stop()
	if err != nil {
		return err
	}
	slowest, total := time.Duration(0), time.Duration(0)
	for _, t := range times {
		slowest = max(slowest, t)
		total += t
	}
	progress("%s: %v, resident %v, %s from the registry (%s to open), distinct %s, %d requests, %s of memory", name, took.Round(time.Millisecond), resident.Round(time.Millisecond),
		bench.Bytes(used.Down), bench.Bytes(open.Down), bench.Bytes(distinct), used.Requests, bench.Bytes(memory))
	return b.rec.Add(name, bench.Measure{Value: float64(took), Unit: bench.Wall}, bench.Measure{Value: float64(slowest), Unit: slowestUnit},
		bench.Measure{Value: float64(total) / float64(len(times)), Unit: meanUnit}, bench.Measure{Value: float64(used.Down), Unit: registryUnit},
		bench.Measure{Value: float64(distinct), Unit: distinctUnit}, bench.Measure{Value: float64(used.Requests), Unit: requestsUnit},
		bench.Measure{Value: float64(resident), Unit: residentUnit}, bench.Measure{Value: float64(memory), Unit: memoryUnit}, bench.Measure{Value: float64(served.Usage.User + served.Usage.Sys), Unit: bench.CPU})
}

// Units of what is recorded.
const (
	residentUnit = "resident-ns"
	slowestUnit  = "slowest-ns"
	meanUnit     = "mean-ns"
	registryUnit = "registry-B"
	distinctUnit = "distinct-B"
	requestsUnit = "requests"
	memoryUnit   = "anonymous-B"
)

// anonymous returns the memory of a process that is not of files.
func anonymous(pid int) (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no RssAnon", pid)
}
