// Command kernel measures device nodes on a real Linux kernel that has ublk and nbd, all in
// one guest at the same time: thaw's nodes by ublk, and by nbd with 1 and with 4
// connections; nbd-client on nbdkit's file plugin and on qemu-nbd, with as many; and a loop
// device on a file with the same bytes.
//
//	go run ./bench/kernel
//
// thaw attach makes the nodes, of an image in an OCI layout that is in thaw's cache by then.
// All content is in the guest's page cache, and fio reads past the page cache of the nodes:
// what is measured is the way from a node to the bytes. Writes go to an overlay of thaw, and
// to a file of each peer; the blocks were written before. The disk below ignores
// flushes.
//
// For each row of the tables, each round measures one side after the other. Each round is a
// line on stdout, in the format that benchstat reads; Markdown tables follow. The guest's
// part of this program is in inside.go.
package main

import (
	"context"
	"flag"
	"fmt"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if len(os.Args) > 1 && os.Args[1] == insideVerb {
		err = inside(ctx, os.Args[2:])
	} else {
		err = run(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/kernel:", err)
		os.Exit(1)
	}
}

// options are those of the host and of the guest.
type options struct {
	rounds  int
	runtime time.Duration
	sizeMiB int
	only    string
	sides   string
	offset  int64 // in the guest: of the content on the device
}

func (o *options) flags(f *flag.FlagSet) {
	f.IntVar(&o.rounds, "rounds", 5, "rounds of each measurement")
	f.DurationVar(&o.runtime, "runtime", time.Second, "time of each run of fio")
	f.IntVar(&o.sizeMiB, "size", 128, "content to read, in MiB")
	f.StringVar(&o.only, "only", "", "only rows whose name contains one of these, separated by commas")
	f.StringVar(&o.sides, "sides", strings.Join(allSides, ","), "sides to measure")
}

func (o *options) args() []string {
	return []string{
		"-rounds", strconv.Itoa(o.rounds), "-runtime", o.runtime.String(), "-size", strconv.Itoa(o.sizeMiB), "-only", o.only, "-sides", o.sides,
	}
}

// wanted reports whether a row is to be measured.
func (o *options) wanted(row string) bool {
	for w := range strings.SplitSeq(o.only, ",") {
		if strings.Contains(row, w) {
			return true
		}
	}
	return false
}

// programs of this host that run in the guest. qemu, fio and the peers are what figures
// depend on.
var programs = []bench.Program{
	{Name: "fio", Package: "fio", Version: []string{"--version"}},
	{Name: "nbdkit", Package: "nbdkit", Version: []string{"--version"}},
	{Name: "qemu-nbd", Package: "qemu-utils", Version: []string{"--version"}},
	{Name: "nbd-client", Package: "nbd-client", Version: []string{"-V"}},
}

func run(ctx context.Context) error {
	var o options
	o.flags(flag.CommandLine)
	flag.Parse()
	qemu := bench.Program{Name: "qemu-system-x86_64", Package: "qemu-system-x86", Version: []string{"--version"}}
	tools := append([]bench.Program{qemu, {Name: "mke2fs", Package: "e2fsprogs"}}, programs...)
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
	dir, err := os.MkdirTemp("", "bench-kernel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &benchmark{options: o, rec: bench.NewRecorder(os.Stdout)}
	m, err := b.guest(ctx, dir)
	if err != nil {
		return err
	}
	facts = append(append(facts, m.Facts()...), bench.Fact{Key: "command", Value: "go run ./bench/kernel " + strings.Join(os.Args[1:], " ")})
	if err := b.rec.Header("thaw/bench/kernel", machine, facts...); err != nil {
		return err
	}
	if err := m.Run(ctx, b.line); err != nil {
		return err
	}
	return b.report(os.Stdout)
}

// guest makes the virtual machine: thaw and this program are in its initramfs, and the image
// is on its disk.
func (b *benchmark) guest(ctx context.Context, dir string) (*guest.Machine, error) {
	files := filepath.Join(dir, "files")
	bin, data, disk := filepath.Join(files, "bin"), filepath.Join(dir, "data"), filepath.Join(dir, "disk")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return nil, err
	}
	for name, pkg := range map[string]string{"thaw": "thaw/cmd/thaw", "kernel": "thaw/bench/kernel"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(bin, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if _, err := bench.Run(cmd); err != nil {
			return nil, err
		}
	}
	config, err := bench.Output(exec.CommandContext(ctx, "nbdkit", "--dump-config"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(config) {
		plugins, ok := strings.CutPrefix(strings.TrimSpace(line), "plugindir=")
		if !ok {
			continue
		}
		to := filepath.Join(files, plugins)
		if err := os.MkdirAll(to, 0o700); err != nil {
			return nil, err
		}
		if _, err := bench.Run(exec.CommandContext(ctx, "cp", filepath.Join(plugins, "nbdkit-file-plugin.so"), to)); err != nil {
			return nil, err
		}
	}
	src, size := filepath.Join(dir, "src"), int64(b.sizeMiB)<<20
	if err := bench.RandomImage(src, size); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{filepath.Join(bin, "thaw"), "build", "--level", "1", "--size", strconv.FormatInt(size+size/4+64<<20, 10), "oci:" + src + ":src", "oci:" + filepath.Join(data, "image") + ":bench"},
		// Room for thaw's cache and overlays, and for the files of the peers.
		{"mke2fs", "-q", "-t", "ext4", "-d", data, disk, strconv.FormatInt(4*size>>20+1024, 10) + "M"},
	} {
		if _, err := bench.Run(exec.CommandContext(ctx, args[0], args[1:]...)); err != nil {
			return nil, err
		}
	}
	m := &guest.Machine{
		Script: fmt.Sprintf("mkdir /data && mount -t ext4 $(disk data) /data || fail mount\n"+
			"ip link set lo up\nHOME=/tmp kernel %s || fail kernel\nend done\n", insideVerb+" '"+strings.Join(b.args(), "' '")+"'"),
		Programs: programs,
		Files:    files,
		Modules:  []string{"virtio_pci", "virtio_blk", "nbd", "ublk_drv", "loop", "ext4", "crc32c_generic?"},
		Memory:   1536 + 4*b.sizeMiB,
		Args:     []string{"-drive", "id=data,file=" + disk + ",format=raw,if=none,cache=unsafe", "-device", "virtio-blk-pci,drive=data,serial=data"},
	}
	return m, m.Prepare(ctx, dir)
}

type benchmark struct {
	options
	rec *bench.Recorder
}

// line takes what the guest says: rounds, as lines of a Recorder.
func (b *benchmark) line(text string) error {
	known := true
	err := b.rec.Read(strings.NewReader(text), func(string) error { known = false; return nil })
	if err != nil || !known {
		fmt.Fprintln(os.Stderr, "guest:", text)
		return err
	}
	_, err = fmt.Println(text)
	return err
}
