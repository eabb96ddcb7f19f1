package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"thaw/bench"
)

// side is a tool that makes a filesystem of an image in dir, and returns its size.
type side struct {
	tool  string
	build func(ctx context.Context, m bench.Workload, dir string) (bench.Usage, int64, error)
}

const (
	onDisk = "on-disk-ns" // wall time, including a sync of the file system
	output = "output-B"
)

// against compares thaw with unpacking the image and making a filesystem of the
// files. umoci is measured twice: `unpack` writes a runtime bundle, whose mtree
// manifest takes much of its time; `raw unpack` only writes the files.
func (b *benchmark) against(ctx context.Context, images []bench.Workload) error {
	sides := []side{
		{"thaw", b.buildThaw},
		{"umoci-unpack+mke2fs", func(ctx context.Context, m bench.Workload, dir string) (bench.Usage, int64, error) {
			bundle := filepath.Join(dir, "bundle")
			return b.buildPeer(ctx, m, dir, filepath.Join(bundle, "rootfs"), "unpack", "--image", m.Ref(), bundle)
		}},
		{"umoci-raw-unpack+mke2fs", func(ctx context.Context, m bench.Workload, dir string) (bench.Usage, int64, error) {
			root := filepath.Join(dir, "rootfs")
			return b.buildPeer(ctx, m, dir, root, "raw", "unpack", "--image", m.Ref(), root)
		}},
	}
	for _, m := range images {
		if _, err := bench.ReadAll(m.Dir); err != nil {
			return err
		}
		var alternating []func(context.Context, int) error
		for _, s := range sides {
			alternating = append(alternating, func(ctx context.Context, round int) error {
				return b.round(ctx, m, s, round)
			})
		}
		if err := bench.Alternate(ctx, b.rounds, alternating...); err != nil {
			return err
		}
	}
	return b.againstTable(images, sides)
}

func buildName(m bench.Workload, tool string) string {
	return "Build/image=" + m.Name + "/tool=" + tool
}

// round runs a side once. With -quiet, it repeats a round in which other processes
// used the machine.
func (b *benchmark) round(ctx context.Context, m bench.Workload, s side, round int) error {
	for try := 1; ; try++ {
		u, ms, err := b.once(ctx, m, s)
		if err != nil {
			return err
		}
		if busy := u.Others > u.Wall/10; b.quiet == 0 || !busy || try == mostTries {
			progress("%s %d: %s %.1f s", m.Name, round+1, s.tool, u.Wall.Seconds())
			return b.rec.Add(buildName(m, s.tool), ms...)
		}
		progress("%s %d: %s %.1f s, but other processes used %.1f s of processor time: repeating it", m.Name, round+1, s.tool, u.Wall.Seconds(), u.Others.Seconds())
	}
}

// mostTries bounds how often a round is run. The last one counts in any case.
const mostTries = 5

// once runs a side in a new directory, after everything earlier was written to the
// disk.
func (b *benchmark) once(ctx context.Context, m bench.Workload, s side) (u bench.Usage, ms []bench.Measure, err error) {
	dir := filepath.Join(b.dir, "round")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return u, nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	unix.Sync()
	if err := b.calm(ctx); err != nil {
		return u, nil, err
	}
	u, size, err := s.build(ctx, m, dir)
	if err != nil {
		return u, nil, err
	}
	flush, err := syncDir(dir)
	if err != nil {
		return u, nil, err
	}
	if !b.verified[m.Name] && s.tool == "thaw" {
		if _, err := bench.Run(exec.CommandContext(ctx, b.thaw, "verify", "oci:"+filepath.Join(dir, "oci")+":thaw")); err != nil {
			return u, nil, err
		}
		b.verified[m.Name] = true
	}
	return u, append(u.Measures(), bench.Measure{Value: float64(u.Wall + flush), Unit: onDisk}, bench.Measure{Value: float64(size), Unit: output}), nil
}

func (b *benchmark) buildThaw(ctx context.Context, m bench.Workload, dir string) (bench.Usage, int64, error) {
	oci := filepath.Join(dir, "oci")
	// Its temporary files lie beside its output, as those of the peers do.
	u, err := bench.Run(exec.CommandContext(ctx, b.thaw, "build", "oci:"+m.Ref(), "oci:"+oci+":thaw", "--size", b.size, "--temp", dir))
	if err != nil {
		return u, 0, err
	}
	size, err := allocated(oci)
	return u, size, err
}

// buildPeer unpacks with umoci to root, and makes an ext4 filesystem of it.
func (b *benchmark) buildPeer(ctx context.Context, _ bench.Workload, dir, root string, unpack ...string) (bench.Usage, int64, error) {
	u, err := bench.Run(exec.CommandContext(ctx, umoci.Name, unpack...))
	if err != nil {
		return u, 0, err
	}
	img := filepath.Join(dir, "image")
	v, err := bench.Run(exec.CommandContext(ctx, mke2fs.Name, "-q", "-t", "ext4", "-b", "4096", "-d", root, img, b.size))
	if err != nil {
		return u, 0, err
	}
	size, err := allocated(img)
	return u.Then(v), size, err
}

// allocated returns the disk space of a file, or of all files below a directory.
func allocated(path string) (int64, error) {
	var total int64
	err := filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("disk space of %s: the system does not report it", path)
		}
		total += st.Blocks * 512
		return nil
	})
	return total, err
}

// syncDir syncs the file system of dir, and returns how long that took.
func syncDir(dir string) (time.Duration, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	began := time.Now()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return 0, fmt.Errorf("sync %s: %w", dir, err)
	}
	return time.Since(began), nil
}

func (b *benchmark) againstTable(images []bench.Workload, sides []side) error {
	t := bench.Table{Columns: []string{"image", "tool", "rounds", "time", "times thaw's", "until on disk", "times thaw's", "CPU", "peak memory", "output", "others' CPU"}}
	for _, m := range images {
		thaw := buildName(m, sides[0].tool)
		for _, s := range sides {
			name := buildName(m, s.tool)
			t.Row(m.Name, s.tool, fmt.Sprint(b.rec.Rounds(name, bench.Wall)),
				bench.Seconds(b.rec.Median(name, bench.Wall)), fmt.Sprintf("%.2f", b.rec.Ratio(name, thaw, bench.Wall)),
				bench.Seconds(b.rec.Median(name, onDisk)), fmt.Sprintf("%.2f", b.rec.Ratio(name, thaw, onDisk)),
				bench.Seconds(b.rec.Median(name, bench.CPU)), bench.Bytes(b.rec.Max(name, bench.RSS)), bench.Bytes(b.rec.Median(name, output)),
				bench.Seconds(b.rec.Median(name, bench.Others)))
		}
	}
	fmt.Fprintln(b.out)
	_, err := t.WriteTo(b.out)
	return err
}
