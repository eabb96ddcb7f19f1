package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

type benchmark struct {
	options
	file  string
	rec   *bench.Recorder
	sides []*side
}

// side is something that fio reads.
type side struct {
	name, path string
	pids       []int // whose processor time counts
	close      func() error
}

// row is a row of the table.
type row struct {
	name, bs, rw string
	depth, jobs  int
}

var rows = []row{
	{"4k-QD1", "4k", "randread", 1, 1},
	{"4k-QD32", "4k", "randread", 32, 1},
	{"4k-QD32-4jobs", "4k", "randread", 32, 4},
	{"64k-QD16", "64k", "randread", 16, 1},
	{"1M-seq", "1M", "read", 4, 1},
}

const (
	iops      = "iops"
	bandwidth = "B/s"
	cpuPerIO  = "cpu-ns/io"
)

// prepare writes content that is not zeros, and leaves it in the page cache.
func (b *benchmark) prepare() error {
	f, err := os.Create(b.file)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for i := range b.sizeMiB {
		for j := range p {
			p[j] = byte(j*7 + i)
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return f.Sync()
}

func (b *benchmark) stop() (err error) {
	for _, s := range b.sides {
		err = errors.Join(err, s.close())
	}
	b.sides = nil
	return err
}

func (b *benchmark) start(ctx context.Context, name string) (*side, error) {
	if driver, ok := strings.CutPrefix(name, "thaw-"); ok {
		return b.startServer(name, "attach", driver)
	}
	switch name {
	case "loop":
		return b.startLoop(ctx, name, b.file, false, nil, func() error { return nil })
	case "nbdfuse", "nbdfuse-file":
		return b.startNBDFUSE(ctx, name)
	}
	return nil, errors.New("no such side")
}

// startServer starts this program as a server, which says where the node is.
func (b *benchmark) startServer(name string, args ...string) (*side, error) {
	cmd := exec.Command("/proc/self/exe", append(append([]string{serveVerb}, args...), b.file)...)
	cmd.Args[0] = "bench-attach"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		cmd.Process.Kill()
		return nil, errors.Join(fmt.Errorf("it does not start: %w", err), cmd.Wait())
	}
	return &side{name: name, path: strings.TrimSpace(line), pids: []int{cmd.Process.Pid}, close: func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		t := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
		defer t.Stop()
		return cmd.Wait()
	}}, nil
}

// startLoop makes a loop device. With direct I/O the flat file would be read from the disk.
func (b *benchmark) startLoop(ctx context.Context, name, file string, direct bool, pids []int, close func() error) (*side, error) {
	mode := "--direct-io=off"
	if direct {
		mode = "--direct-io=on"
	}
	device, err := bench.Output(exec.CommandContext(ctx, "losetup", "-f", "--show", "-r", mode, file))
	if err != nil {
		return nil, errors.Join(err, close())
	}
	return &side{name: name, path: device, pids: pids, close: func() error {
		_, err := bench.Output(exec.Command("losetup", "-d", device))
		return errors.Join(err, close())
	}}, nil
}

// startNBDFUSE serves the content by thaw's NBD server, mounts it by nbdfuse, and makes a
// loop device of that.
func (b *benchmark) startNBDFUSE(ctx context.Context, name string) (*side, error) {
	s, err := b.startServer(name, "nbd", filepath.Join(b.dir, name+".sock"))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, errors.Join(err, s.close())
	}
	cmd := exec.Command("nbdfuse", "-r", dir, "--unix", s.path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	end := func() error {
		err := syscall.Unmount(dir, syscall.MNT_DETACH)
		t := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
		defer t.Stop()
		return errors.Join(err, cmd.Wait(), s.close())
	}
	file := filepath.Join(dir, "nbd")
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			break
		}
		if time.Now().After(limit) {
			return nil, errors.Join(errors.New("nbdfuse does not mount"), end())
		}
	}
	pids := append(s.pids, cmd.Process.Pid)
	if name == "nbdfuse-file" {
		return &side{name: name, path: file, pids: pids, close: end}, nil
	}
	return b.startLoop(ctx, name, file, true, pids, end)
}

// measure is one run of fio.
func (b *benchmark) measure(ctx context.Context, s *side, r row) error {
	before, err := bench.CPUTime(s.pids...)
	if err != nil {
		return err
	}
	job := bench.FioJob{BS: r.bs, RW: r.rw, Depth: r.depth, Jobs: r.jobs, Size: int64(b.sizeMiB) << 20, Runtime: b.runtime, More: []string{"--readonly"}}
	f, err := bench.Fio(ctx, append(job.Args(), "--ioengine=libaio", "--direct=1", "--filename="+s.path)...)
	if err != nil {
		return fmt.Errorf("%s, %s: %w", r.name, s.name, err)
	}
	after, err := bench.CPUTime(s.pids...)
	if err != nil {
		return err
	}
	return b.rec.Add("Attach/"+r.name+"/side="+s.name,
		bench.Measure{Value: 1e9 / max(f.IOPS, 1), Unit: bench.Wall},
		bench.Measure{Value: f.IOPS, Unit: iops},
		bench.Measure{Value: f.Bandwidth, Unit: bandwidth},
		bench.Measure{Value: float64(after-before) / max(f.IOs, 1), Unit: cpuPerIO},
		bench.Measure{Value: f.P99, Unit: "p99-ns"})
}

// report writes the table. Ratios are to the first side.
func (b *benchmark) report(w io.Writer) error {
	t := bench.Table{Columns: []string{"load"}}
	for i, s := range b.sides {
		t.Columns = append(t.Columns, s.name)
		if i > 0 {
			t.Columns = append(t.Columns, b.sides[0].name+" / "+s.name)
		}
	}
	for _, r := range rows {
		name := "Attach/" + r.name + "/side="
		if b.rec.Rounds(name+b.sides[0].name, iops) == 0 {
			continue
		}
		cells := []string{r.name}
		for i, s := range b.sides {
			cpu := b.rec.Median(name+s.name, cpuPerIO) / 1e3
			if r.bs == "1M" {
				cells = append(cells, fmt.Sprintf("%.0f MB/s, %.0f", b.rec.Median(name+s.name, bandwidth)/1e6, cpu))
			} else {
				cells = append(cells, fmt.Sprintf("%.0f, %.1f", b.rec.Median(name+s.name, iops), cpu))
			}
			if i > 0 {
				cells = append(cells, fmt.Sprintf("%.2f", b.rec.Ratio(name+b.sides[0].name, name+s.name, iops)))
			}
		}
		t.Row(cells...)
	}
	if _, err := fmt.Fprintf(w, "\nMedians of %d rounds: requests per second (MB/s where marked), and the servers' CPU time per request in us.\n\n", b.rounds); err != nil {
		return err
	}
	_, err := t.WriteTo(w)
	return err
}
