package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"thaw/bench"
)

// job is a load that fio generates.
type job struct {
	bs     string
	rw     string
	depth  int
	jobs   int   // connections; 0 for one
	offset int64 // of the part to read
	size   int64 // of the part to read; 0 for all content
}

type result struct {
	ios       float64
	iops      float64
	bandwidth float64
	cpu       time.Duration // of the server
	p99       float64       // ns
	median    float64
}

func (b *benchmark) args(s *server, j job) []string {
	if j.size == 0 {
		j.offset, j.size = b.offset, int64(b.sizeMiB)<<20
	}
	return []string{
		"--name=x", "--ioengine=nbd", "--uri=" + s.uri, "--rw=" + j.rw, "--bs=" + j.bs, "--iodepth=" + strconv.Itoa(j.depth),
		"--numjobs=" + strconv.Itoa(max(j.jobs, 1)), "--offset=" + strconv.FormatInt(j.offset, 10), "--size=" + strconv.FormatInt(j.size, 10),
		"--time_based", "--runtime=" + strconv.FormatFloat(b.runtime.Seconds(), 'f', -1, 64), "--randrepeat=0", "--norandommap",
		"--thread", "--group_reporting", "--output-format=json",
	}
}

// fio runs a job against a server.
func (b *benchmark) fio(ctx context.Context, s *server, j job) (*result, error) {
	before, err := cpuTime(s.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	out, err := bench.Output(exec.CommandContext(ctx, "fio", b.args(s, j)...))
	if err != nil {
		return nil, err
	}
	after, err := cpuTime(s.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	r, err := parseFio(out)
	if err != nil {
		return nil, err
	}
	r.cpu = after - before
	return r, nil
}

func parseFio(out string) (*result, error) {
	// fio may print warnings before its JSON.
	if i := strings.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	var f struct {
		Jobs []struct {
			Error int `json:"error"`
			Read  struct {
				TotalIOs float64 `json:"total_ios"`
				IOPS     float64 `json:"iops"`
				BW       float64 `json:"bw_bytes"`
				Clat     struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			} `json:"read"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		return nil, fmt.Errorf("output of fio: %w", err)
	}
	if len(f.Jobs) != 1 || f.Jobs[0].Error != 0 || f.Jobs[0].Read.TotalIOs == 0 {
		return nil, fmt.Errorf("fio failed: %s", out)
	}
	rd := f.Jobs[0].Read
	return &result{ios: rd.TotalIOs, iops: rd.IOPS, bandwidth: rd.BW, p99: rd.Clat.Percentile["99.000000"], median: rd.Clat.Percentile["50.000000"]}, nil
}

// fioLatencies runs a job, and returns the latencies of its reads below the offset
// limit.
func (b *benchmark) fioLatencies(ctx context.Context, s *server, j job, limit int64) (*result, error) {
	dir, err := os.MkdirTemp("", "fio")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	args := append(b.args(s, j), "--write_lat_log="+filepath.Join(dir, "l"), "--log_offset=1", "--disable_slat=1", "--disable_lat=1")
	out, err := bench.Output(exec.CommandContext(ctx, "fio", args...))
	if err != nil {
		return nil, err
	}
	r, err := parseFio(out)
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
	r.p99, r.median = ns[len(ns)*99/100], ns[len(ns)/2]
	return r, nil
}

// cpuTime returns the processor time that a process has used; see proc(5).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, can contain anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	const utime, stime, ticks = 11, 12, 100
	var n int64
	for _, i := range []int{utime, stime} {
		v, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, err
		}
		n += v
	}
	return time.Duration(n) * (time.Second / ticks), nil
}
