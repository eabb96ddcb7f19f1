package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"thaw/bench"
)

const (
	stored     = "stored-B"
	indexBytes = "index-B"
	chunkCount = "chunks"
	fetched    = "fetched-B"
	requests   = "requests"
	wire       = "wire-B"
)

// chunkSizes builds each image with each chunk size. It then runs the image's
// program from each block image, on an empty cache, with two origins: the layout,
// and a registry behind a slow link.
func (b *benchmark) chunkSizes(ctx context.Context, images []bench.Workload) error {
	sizes := strings.Split(b.sizes, ",")
	for _, m := range images {
		if err := b.chunkSizesOf(ctx, m, sizes); err != nil {
			return fmt.Errorf("%s: %w", m.Name, err)
		}
	}
	return b.chunkTables(images, sizes)
}

func chunkName(m bench.Workload, size string) string {
	return "Chunks/image=" + m.Name + "/chunk=" + size
}

func startName(m bench.Workload, size, origin string) string {
	return "Start/image=" + m.Name + "/chunk=" + size + "/origin=" + origin
}

func (b *benchmark) chunkSizesOf(ctx context.Context, m bench.Workload, sizes []string) (err error) {
	dir := filepath.Join(b.dir, m.Name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	reg, err := bench.StartRegistry(ctx, dir)
	if err != nil {
		return err
	}
	defer reg.Close()
	link, err := bench.ListenLink(reg.Addr, b.rtt, b.mbits*1e6)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	for _, size := range sizes {
		oci := filepath.Join(dir, size)
		if err := b.buildChunks(ctx, m, size, oci); err != nil {
			return err
		}
		if _, err := bench.Push(ctx, oci, "thaw", tagOf(reg.Addr, m, size)); err != nil {
			return err
		}
		if _, err := bench.ReadAll(oci); err != nil {
			return err
		}
	}
	var sides []func(context.Context, int) error
	for _, size := range sizes {
		sides = append(sides, func(ctx context.Context, _ int) error {
			_, err := b.start(ctx, m, startName(m, size, "layout"), "oci:"+filepath.Join(dir, size)+":thaw")
			return err
		}, func(ctx context.Context, _ int) error {
			before := link.Stats()
			add, err := b.start(ctx, m, "", tagOf(link.Addr().String(), m, size))
			if err != nil {
				return err
			}
			after := link.Stats()
			return b.rec.Add(startName(m, size, "link"), append(add, bench.Measure{Value: float64(after.Down - before.Down), Unit: wire},
				bench.Measure{Value: float64(after.Connections - before.Connections), Unit: "connections"})...)
		})
	}
	return bench.Alternate(ctx, b.rounds, sides...)
}

func tagOf(addr string, m bench.Workload, size string) string {
	return addr + "/" + m.Name + ":" + strings.ToLower(size)
}

// buildChunks builds the block image with chunks of one size.
func (b *benchmark) buildChunks(ctx context.Context, m bench.Workload, size, oci string) error {
	cmd := exec.CommandContext(ctx, b.thaw, "build", "oci:"+m.Ref(), "oci:"+oci+":thaw", "--size", b.size, "--chunk-size", size, "--temp", b.dir, "--json")
	var out strings.Builder
	cmd.Stdout = &out
	u, err := bench.Run(cmd)
	if err != nil {
		return err
	}
	var built struct {
		Index   int64 `json:"index_bytes"`
		Chunks  int64 `json:"chunks"`
		Content int64 `json:"content_bytes"`
		Stored  int64 `json:"stored_bytes"`
	}
	if err := json.Unmarshal([]byte(out.String()), &built); err != nil {
		return fmt.Errorf("output of thaw build: %w", err)
	}
	progress("%s: built with chunks of %s in %.1f s", m.Name, size, u.Wall.Seconds())
	return b.rec.Add(chunkName(m, size), append(u.Measures(),
		bench.Measure{Value: float64(built.Content), Unit: "content-B"}, bench.Measure{Value: float64(built.Stored), Unit: stored},
		bench.Measure{Value: float64(built.Index), Unit: indexBytes}, bench.Measure{Value: float64(built.Chunks), Unit: chunkCount})...)
}

// start runs the program of an image once, on an empty cache, and records the
// result unless name is empty.
func (b *benchmark) start(ctx context.Context, m bench.Workload, name, ref string) (ms []bench.Measure, err error) {
	dir, err := os.MkdirTemp(b.dir, "start-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := b.calm(ctx); err != nil {
		return nil, err
	}
	began := time.Now()
	s, err := bench.Serve(ctx, b.thaw, ref, dir)
	if err != nil {
		return nil, err
	}
	defer s.Kill()
	defer func() {
		if err != nil {
			s.Kill()
			err = fmt.Errorf("%w%s", err, s.Said())
		}
	}()
	root, err := bench.Mount(ctx, s.Socket, dir, b.readAhead)
	if err != nil {
		return nil, err
	}
	mounted := time.Since(began)
	out, u, err := root.Run(ctx, bench.Start)
	took := time.Since(began)
	if err := errors.Join(err, root.Close()); err != nil {
		return nil, err
	}
	if err := m.Check(out); err != nil {
		return nil, err
	}
	served, err := s.Stop()
	if err != nil {
		return nil, err
	}
	if served.WrongChunks+served.FailedChunks > 0 {
		return nil, fmt.Errorf("%d chunks arrived damaged, and %d could not be fetched", served.WrongChunks, served.FailedChunks)
	}
	progress("%s from %s: %.2f s, %d requests for %s", m.Name, ref, took.Seconds(), served.Requests, bench.Bytes(served.FetchedBytes))
	ms = []bench.Measure{
		{Value: float64(took), Unit: bench.Wall}, {Value: float64(s.Ready), Unit: "ready-ns"}, {Value: float64(mounted), Unit: "mounted-ns"},
		{Value: float64(u.Wall), Unit: "run-ns"}, {Value: float64(served.FetchedBytes), Unit: fetched}, {Value: float64(served.Requests), Unit: requests},
		{Value: float64(served.CachedBytes), Unit: "cached-B"}, {Value: float64(served.Usage.User + served.Usage.Sys), Unit: "serve-cpu-ns"},
	}
	if name != "" {
		err = b.rec.Add(name, ms...)
	}
	return ms, err
}

func (b *benchmark) chunkTables(images []bench.Workload, sizes []string) error {
	t := bench.Table{Columns: []string{"image", "chunk size", "stored", "index", "of stored", "chunks", "fetched", "requests", "from the layout",
		fmt.Sprintf("over %v, %d Mbit/s", b.rtt, b.mbits), "bytes on the link"}}
	type sums struct{ stored, index, chunks, fetched, requests, layout, link, wire float64 }
	all := make([]sums, len(sizes))
	row := func(m, size string, s sums) {
		t.Row(m, size, bench.Bytes(s.stored), bench.Bytes(s.index), fmt.Sprintf("%.3f %%", 100*s.index/s.stored), fmt.Sprintf("%.0f", s.chunks),
			bench.Bytes(s.fetched), fmt.Sprintf("%.0f", s.requests), bench.Seconds(s.layout), bench.Seconds(s.link), bench.Bytes(s.wire))
	}
	for _, m := range images {
		for i, size := range sizes {
			med := b.rec.Median
			c, link := chunkName(m, size), startName(m, size, "link")
			s := sums{
				med(c, stored), med(c, indexBytes), med(c, chunkCount), med(link, fetched), med(link, requests),
				med(startName(m, size, "layout"), bench.Wall), med(link, bench.Wall), med(link, wire),
			}
			row(m.Name, size, s)
			a := &all[i]
			*a = sums{a.stored + s.stored, a.index + s.index, a.chunks + s.chunks, a.fetched + s.fetched, a.requests + s.requests,
				a.layout + s.layout, a.link + s.link, a.wire + s.wire}
		}
	}
	for i, size := range sizes {
		row("all", size, all[i])
	}
	fmt.Fprintln(b.out)
	_, err := t.WriteTo(b.out)
	return err
}
