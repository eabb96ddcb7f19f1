// Command vm measures disks of a virtual machine, all in the same guest at the same time and
// with the same bytes: a vhost-user-blk backend of package nbd/vhost, an NBD drive of qemu
// that package nbd serves, the raw file as a drive of qemu, and the vhost-user-blk export of
// qemu-storage-daemon.
//
//	go run ./bench/vm
//
// The guest runs fio on one disk after the other, in rounds. Each disk is a file of its own in
// the page cache. thaw's servers have the simplest device behind them, a mapped file, so
// that the transports are compared. Each round is a line on stdout, in the format that
// benchstat reads; a Markdown table follows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
	"thaw/bench/guest"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == serveVerb {
		if err := serveMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench/vm:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/vm:", err)
		os.Exit(1)
	}
}

// row is a row of the table: a load.
type row struct {
	name  string
	rw    string
	bs    string
	depth int
	jobs  int
	sync  bool // fsync after each 16 writes
}

var rows = []row{
	{name: "4k-read-QD1", rw: "randread", bs: "4k", depth: 1, jobs: 1},
	{name: "4k-read-QD32", rw: "randread", bs: "4k", depth: 32, jobs: 1},
	{name: "4k-read-QD32-2jobs", rw: "randread", bs: "4k", depth: 32, jobs: 2},
	{name: "1M-read-seq", rw: "read", bs: "1M", depth: 8, jobs: 1},
	{name: "4k-write-QD1", rw: "randwrite", bs: "4k", depth: 1, jobs: 1},
	{name: "4k-write-QD32", rw: "randwrite", bs: "4k", depth: 32, jobs: 1},
	{name: "4k-write-fsync", rw: "randwrite", bs: "4k", depth: 8, jobs: 1, sync: true},
}

const (
	thawVhost = "thaw-vhost"
	thawNBD   = "thaw-nbd"
	rawFile   = "raw-file"
	qsd       = "qemu-storage-daemon"

	iops     = "iops"
	cpuPerIO = "server-cpu-ns/io"
	p50      = "p50-ns"
)

var sides = []string{thawVhost, thawNBD, rawFile, qsd}

type options struct {
	rounds  int
	runtime time.Duration
	sizeMiB int
	only    string
}

func run(ctx context.Context) error {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	flag.DurationVar(&o.runtime, "runtime", 2*time.Second, "time of each run of fio")
	flag.IntVar(&o.sizeMiB, "size", 256, "size of each disk, in MiB")
	flag.StringVar(&o.only, "only", "", "only rows whose name contains this")
	flag.Parse()
	tools := []bench.Program{
		{Name: "qemu-system-x86_64", Package: "qemu-system-x86", Version: []string{"--version"}},
		{Name: "qemu-storage-daemon", Package: "qemu-utils", Version: []string{"--version"}},
		{Name: "fio", Package: "fio", Version: []string{"--version"}},
	}
	if err := bench.Need(tools...); err != nil {
		return err
	}
	machine, err := bench.ThisMachine()
	if err != nil {
		return err
	}
	facts, err := bench.Versions(ctx, tools...)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &benchmark{options: o, dir: dir, rec: bench.NewRecorder(os.Stdout), began: make(map[string]time.Duration)}
	err = b.start(ctx)
	if err == nil {
		facts = append(facts, bench.Fact{Key: "command", Value: "go run ./bench/vm " + strings.Join(os.Args[1:], " ")})
		err = b.measure(ctx, func(g *guest.Machine) error {
			return b.rec.Header("thaw/bench/vm", machine, append(facts, g.Facts()...)...)
		})
	}
	b.stop()
	if err != nil {
		return err
	}
	return b.report(os.Stdout)
}

type benchmark struct {
	options
	dir     string
	rec     *bench.Recorder
	disks   []string                 // arguments of qemu, in the order of the disks: the first one is /dev/vda
	servers map[string]*exec.Cmd     // by side
	began   map[string]time.Duration // processor time of a server at the beginning of a load
}

// start makes the disks, and starts their servers.
func (b *benchmark) start(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	size := int64(b.sizeMiB) << 20
	b.servers = make(map[string]*exec.Cmd)
	for _, side := range sides {
		path := filepath.Join(b.dir, side+".img")
		if err := randomFile(path, size); err != nil {
			return err
		}
		sock := filepath.Join(b.dir, side+".sock")
		var args, disk []string
		chardev := []string{"-chardev", "socket,id=" + side + ",path=" + sock, "-device", "vhost-user-blk-pci,num-queues=2,chardev=" + side}
		drive := func(file string) []string {
			return []string{"-object", "iothread,id=t-" + side, "-drive", "id=" + side + ",format=raw,if=none,discard=unmap," + file,
				"-device", "virtio-blk-pci,num-queues=2,iothread=t-" + side + ",drive=" + side}
		}
		switch side {
		case thawVhost:
			args, disk = []string{self, serveVerb, side + "=" + path, "--dir", b.dir}, chardev
		case thawNBD:
			sock = filepath.Join(b.dir, side+".nbd")
			args, disk = []string{self, serveVerb, side + "=" + path, "--dir", b.dir}, drive("file=nbd+unix:///"+side+"?socket="+sock)
		case rawFile:
			disk = drive("aio=io_uring,file=" + path)
		case qsd:
			args = []string{"qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,aio=io_uring,filename=" + path,
				"--export", "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,addr.type=unix,addr.path=" + sock}
			disk = chardev
		}
		b.disks = append(b.disks, disk...)
		if args == nil {
			continue
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return err
		}
		b.servers[side] = cmd
		for end := time.Now().Add(20 * time.Second); ; {
			if _, err := os.Stat(sock); err == nil {
				break
			}
			if time.Now().After(end) || ctx.Err() != nil {
				return fmt.Errorf("%s does not listen within 20 s", side)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

func randomFile(path string, size int64) error {
	in, err := os.Open("/dev/urandom")
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(out, in, size)
	return errors.Join(err, out.Close())
}

func (b *benchmark) stop() {
	for _, cmd := range b.servers {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	}
}

// measure runs all rows in one guest.
func (b *benchmark) measure(ctx context.Context, header func(*guest.Machine) error) error {
	var s strings.Builder
	// The first read of each disk brings its pages into memory, wherever they belong.
	for i := range sides {
		fmt.Fprintf(&s, "dd if=%s of=/dev/null bs=1M iflag=direct 2>/dev/null || fail read\n", device(i))
		// The export of qemu-storage-daemon says that its cache is writethrough, which it
		// is not: the guest would not flush.
		fmt.Fprintf(&s, "b=/sys/block/%s; grep -q back $b/queue/write_cache || echo 'write back' >$b/cache_type || fail cache\n", filepath.Base(device(i)))
	}
	for _, r := range rows {
		if !strings.Contains(r.name, b.only) {
			continue
		}
		for range b.rounds {
			for i, side := range sides {
				args := fmt.Sprintf("--name=x --filename=%s --rw=%s --bs=%s --iodepth=%d --numjobs=%d --ioengine=libaio --direct=1 --time_based --runtime=%.1f --randrepeat=0 --norandommap --thread --group_reporting --output-format=terse --terse-version=3 --output=/tmp/out",
					device(i), r.rw, r.bs, r.depth, r.jobs, b.runtime.Seconds())
				if r.sync {
					args += " --fsync=16"
				}
				fmt.Fprintf(&s, "say begin %s %s\nfio %s >/dev/null 2>&1 || fail fio\nsay end %s %s $(tail -n 1 /tmp/out)\n", r.name, side, args, r.name, side)
			}
		}
	}
	s.WriteString("end done\n")
	g := &guest.Machine{
		Script:   s.String(),
		Programs: []bench.Program{{Name: "fio", Package: "fio"}},
		Modules:  []string{"virtio_pci", "virtio_blk"},
		Memory:   1024,
		Args:     b.disks,
	}
	if err := g.Prepare(ctx, b.dir); err != nil {
		return err
	}
	if err := header(g); err != nil {
		return err
	}
	return g.Run(ctx, b.line)
}

// device is the disk of a side in the guest.
func device(i int) string { return "/dev/vd" + string(rune('a'+i)) }

// line takes what the guest says.
func (b *benchmark) line(text string) error {
	f := strings.Fields(text)
	if len(f) < 3 {
		return fmt.Errorf("unexpected line: %q", text)
	}
	row, side := f[1], f[2]
	cpu := time.Duration(0)
	if cmd := b.servers[side]; cmd != nil {
		var err error
		if cpu, err = bench.CPUTime(cmd.Process.Pid); err != nil {
			return err
		}
	}
	if f[0] == "begin" {
		b.began[side] = cpu
		return nil
	}
	res, err := parseTerse(f[len(f)-1])
	if err != nil {
		return fmt.Errorf("%s of %s: %w", row, side, err)
	}
	ms := []bench.Measure{{Value: 1e9 / max(res.iops, 1), Unit: bench.Wall}, {Value: res.iops, Unit: iops}, {Value: res.p50, Unit: p50}}
	if b.servers[side] != nil {
		ms = append(ms, bench.Measure{Value: float64(cpu-b.began[side]) / max(res.ios, 1), Unit: cpuPerIO})
	}
	return b.rec.Add("VM/"+row+"/disk="+side, ms...)
}

type result struct{ ios, iops, p50 float64 }

// parseTerse reads a line of fio's terse output, version 3: see "TERSE OUTPUT" in fio(1).
func parseTerse(line string) (*result, error) {
	f := strings.Split(line, ";")
	const (
		errorField = 4
		fields     = 41 // of each direction
		total      = 0  // KiB
		perSecond  = 2
		percentile = 12 // the first of twenty: 1.000000%=N, in us
		runtimeMS  = 3
	)
	if len(f) < 5+3*fields || f[0] != "3" {
		return nil, fmt.Errorf("output of fio: %q", line)
	}
	if f[errorField] != "0" {
		return nil, fmt.Errorf("fio failed with %s", f[errorField])
	}
	var r result
	for d := range 2 {
		at := f[5+d*fields:][:fields]
		n, err := strconv.ParseFloat(at[perSecond], 64)
		if err != nil || n == 0 {
			continue
		}
		ms, err := strconv.ParseFloat(at[runtimeMS], 64)
		if err != nil {
			return nil, err
		}
		r.iops, r.ios = n, n*ms/1000
		for _, p := range at[percentile:][:20] {
			if us, ok := strings.CutPrefix(p, "50.000000%="); ok {
				if r.p50, err = strconv.ParseFloat(us, 64); err != nil {
					return nil, err
				}
				r.p50 *= 1000
			}
		}
	}
	if r.iops == 0 {
		return nil, fmt.Errorf("fio did nothing: %q", line)
	}
	return &r, nil
}

// report writes the table.
func (b *benchmark) report(w io.Writer) error {
	t := bench.Table{Columns: []string{"load", "thaw vhost-user", "thaw NBD", "raw file", "qemu-storage-daemon", "vhost / NBD", "vhost / file", "vhost / daemon", "CPU us/IO, thaw vhost", "daemon"}}
	for _, r := range rows {
		name := "VM/" + r.name + "/disk="
		if b.rec.Rounds(name+thawVhost, iops) == 0 {
			continue
		}
		cells := []string{r.name}
		for _, side := range sides {
			cells = append(cells, fmt.Sprintf("%.0f", b.rec.Median(name+side, iops)))
		}
		for _, side := range sides[1:] {
			cells = append(cells, fmt.Sprintf("%.2f", b.rec.Ratio(name+thawVhost, name+side, iops)))
		}
		for _, side := range []string{thawVhost, qsd} {
			cells = append(cells, fmt.Sprintf("%.1f", b.rec.Median(name+side, cpuPerIO)/1000))
		}
		t.Row(cells...)
	}
	if _, err := fmt.Fprintf(w, "\nMedians of %d rounds: requests per second in the guest, and the server's CPU time per request.\n\n", b.rounds); err != nil {
		return err
	}
	_, err := t.WriteTo(w)
	return err
}
