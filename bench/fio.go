package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// FioJob is a load that fio generates.
type FioJob struct {
	BS, RW  string
	Depth   int
	Jobs    int           // connections; 0 for one
	Offset  int64         // of the part to use
	Size    int64         // of the part to use
	Runtime time.Duration // 0: until as many bytes were moved as the part has, each of them once
	Fsync   int           // flush after so many writes; 0 for never
	More    []string
}

// FioResult is what fio reports of a job.
type FioResult struct {
	IOs       float64 // reads and writes
	IOPS      float64
	Bandwidth float64       // bytes per second
	Took      time.Duration // from the first request to the last reply
	CPU       time.Duration // of the server
	P99       float64       // ns; of reads if there are any
	Median    float64
}

// Args returns the arguments for fio without those that say what to run the job on.
func (j FioJob) Args() []string {
	args := []string{
		"--name=x", "--rw=" + j.RW, "--bs=" + j.BS, "--iodepth=" + strconv.Itoa(j.Depth),
		"--numjobs=" + strconv.Itoa(max(j.Jobs, 1)), "--offset=" + strconv.FormatInt(j.Offset, 10), "--size=" + strconv.FormatInt(j.Size, 10),
		"--randrepeat=0", "--thread", "--group_reporting", "--output-format=json",
	}
	if j.Runtime > 0 {
		args = append(args, "--norandommap", "--time_based", "--runtime="+strconv.FormatFloat(j.Runtime.Seconds(), 'f', -1, 64))
	}
	if j.Fsync > 0 {
		args = append(args, "--fsync="+strconv.Itoa(j.Fsync))
	}
	return append(args, j.More...)
}

// Fio runs a job against a server.
func (s *NBDServer) Fio(ctx context.Context, j FioJob) (*FioResult, error) {
	before, err := CPUTime(s.Cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	r, err := Fio(ctx, append(j.Args(), "--ioengine=nbd", "--uri="+s.URI)...)
	if err != nil {
		return nil, err
	}
	after, err := CPUTime(s.Cmd.Process.Pid)
	r.CPU = after - before
	return r, err
}

// Fio runs fio, whose output is JSON.
func Fio(ctx context.Context, args ...string) (*FioResult, error) {
	out, err := Output(exec.CommandContext(ctx, "fio", args...))
	if err != nil {
		return nil, err
	}
	return parseFio(out)
}

type fioSide struct {
	TotalIOs float64 `json:"total_ios"`
	IOPS     float64 `json:"iops"`
	BW       float64 `json:"bw_bytes"`
	Runtime  float64 `json:"runtime"` // ms
	Clat     struct {
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

func parseFio(out string) (*FioResult, error) {
	// fio may print warnings before its JSON.
	if i := strings.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	var f struct {
		Jobs []struct {
			Error int     `json:"error"`
			Read  fioSide `json:"read"`
			Write fioSide `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		return nil, fmt.Errorf("output of fio: %w", err)
	}
	if len(f.Jobs) != 1 || f.Jobs[0].Error != 0 || f.Jobs[0].Read.TotalIOs+f.Jobs[0].Write.TotalIOs == 0 {
		return nil, fmt.Errorf("fio failed: %s", out)
	}
	rd, wr := f.Jobs[0].Read, f.Jobs[0].Write
	latency := rd.Clat.Percentile
	if rd.TotalIOs == 0 {
		latency = wr.Clat.Percentile
	}
	return &FioResult{
		IOs: rd.TotalIOs + wr.TotalIOs, IOPS: rd.IOPS + wr.IOPS, Bandwidth: rd.BW + wr.BW, Took: time.Duration(max(rd.Runtime, wr.Runtime) * 1e6),
		P99: latency["99.000000"], Median: latency["50.000000"],
	}, nil
}

// CPUTime returns the processor time that processes have used; see proc(5).
func CPUTime(pids ...int) (sum time.Duration, err error) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// The name, in parentheses, can contain anything.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		const utime, stime = 11, 12
		for _, i := range []int{utime, stime} {
			n, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return 0, err
			}
			sum += time.Duration(n) * (time.Second / userHz)
		}
	}
	return sum, nil
}
