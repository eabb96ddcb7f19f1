package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"thaw/bench"
)

// over returns the job for all content, unless it is for a part.
func (b *benchmark) over(j bench.FioJob) bench.FioJob {
	if j.Size == 0 {
		j.Offset, j.Size = b.offset, int64(b.sizeMiB)<<20
	}
	j.Runtime = b.runtime
	return j
}

// fio runs a job against a server.
func (b *benchmark) fio(ctx context.Context, s *bench.NBDServer, j bench.FioJob) (*bench.FioResult, error) {
	return s.Fio(ctx, b.over(j))
}

// fioLatencies runs a job, and returns the latencies of its reads below the offset
// limit.
func (b *benchmark) fioLatencies(ctx context.Context, s *bench.NBDServer, j bench.FioJob, limit int64) (*bench.FioResult, error) {
	dir, err := os.MkdirTemp("", "fio")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	j.More = []string{"--write_lat_log=" + filepath.Join(dir, "l"), "--log_offset=1", "--disable_slat=1", "--disable_lat=1"}
	r, err := b.fio(ctx, s, j)
	if err != nil {
		return nil, err
	}
	logs, err := filepath.Glob(filepath.Join(dir, "l_clat*.log"))
	if err != nil || len(logs) == 0 {
		return nil, errors.Join(errors.New("fio wrote no log of latencies"), err)
	}
	var ns []float64
	for _, path := range logs {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		// time in ms, latency in ns, direction, block size, offset [, priority]
		for line := range strings.Lines(string(text)) {
			f := strings.Split(strings.TrimSpace(line), ",")
			if len(f) < 5 {
				return nil, fmt.Errorf("invalid line in fio's log of latencies: %q", line)
			}
			lat, err1 := strconv.ParseFloat(strings.TrimSpace(f[1]), 64)
			off, err2 := strconv.ParseInt(strings.TrimSpace(f[4]), 10, 64)
			if err1 != nil || err2 != nil {
				return nil, fmt.Errorf("invalid line in fio's log of latencies: %q", line)
			}
			if off < limit {
				ns = append(ns, lat)
			}
		}
	}
	if len(ns) < 100 {
		return nil, fmt.Errorf("fio made only %d reads below offset %d: raise -runtime", len(ns), limit)
	}
	slices.Sort(ns)
	r.P99, r.Median = ns[len(ns)*99/100], ns[len(ns)/2]
	return r, nil
}
