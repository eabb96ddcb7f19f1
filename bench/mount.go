package bench

import (
	"bytes"
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
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// isolated is argv[0] of a process that Isolate has started.
const isolated = "bench-isolated"

// Isolate runs this program again in a new mount namespace, and returns its exit
// code. In the program that it has started, Isolate does nothing, and done is
// false. Whatever happens to a benchmark, its mounts end with its processes, and
// no other process sees them.
func Isolate(ctx context.Context) (code int, done bool, err error) {
	if os.Args[0] == isolated {
		return 0, false, forgetMounts()
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = isolated
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Unshareflags also makes the mounts private: none spreads to the host.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	dieWithUs(cmd)
	err = cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, true, nil
	}
	return 1, true, err
}

// forgetMounts detaches the copies of mounts of loop devices and of FUSE that a new mount
// namespace has. They belong to other programs, whose devices they would keep in use
// after these programs have unmounted them.
func forgetMounts() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[0], "/dev/loop") && !strings.HasPrefix(f[2], "fuse") {
			continue
		}
		// Blanks and so on in a path are written as \040; such a mount stays.
		if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach the copy of the mount at %s: %w", f[1], err)
		}
	}
	return nil
}

// Root is a root filesystem with the mounts that programs expect: /proc, /dev,
// /tmp, /run. It is an ext4 filesystem of a node, of an NBD export or in a file, mounted
// read-only, or a directory. An export is attached by nbdfuse and a loop device,
// which also works on kernels without nbd. Every Root requires [Isolate].
type Root struct {
	Dir string

	fuseDir string
	fuse    *exec.Cmd // nil if it is not of an export
	said    tail
	ended   chan struct{}
	mounts  []string // in the order in which they were mounted
}

// Mount attaches the default export of a unix socket, and mounts it below dir.
// readAhead is the readahead of the block device in KiB: /dev/nbd and virtio
// have 128, and the kernel's default for a loop device differs.
func Mount(ctx context.Context, socket, dir string, readAhead int) (r *Root, err error) {
	r = &Root{Dir: filepath.Join(dir, "root"), fuseDir: filepath.Join(dir, "nbd"), ended: make(chan struct{})}
	for _, d := range []string{r.Dir, r.fuseDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	r.fuse = exec.Command("nbdfuse", "-r", r.fuseDir, "--unix", socket)
	r.fuse.Stderr = &r.said
	dieWithUs(r.fuse)
	if err := r.fuse.Start(); err != nil {
		return nil, err
	}
	go func() {
		r.fuse.Wait()
		close(r.ended)
	}()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("mount %s: %w", socket, err), r.Close())
		}
	}()
	file := filepath.Join(r.fuseDir, "nbd")
	if err := r.waitFor(ctx, file); err != nil {
		return r, err
	}
	return r, r.mountFile(ctx, file, readAhead)
}

// MountNode mounts an image of a running server below dir, by `thaw mount` with a driver.
// The node goes with the mount.
func MountNode(ctx context.Context, s *Server, driver, dir string, readAhead int) (*Root, error) {
	r := &Root{Dir: filepath.Join(dir, "root")}
	if err := os.Mkdir(r.Dir, 0o755); err != nil {
		return nil, err
	}
	out, err := Output(exec.CommandContext(ctx, s.cmd.Path, "mount", s.image, r.Dir, "--driver", driver, "--cache", s.cache, "--json"))
	if err != nil {
		return nil, err
	}
	r.mounts = append(r.mounts, r.Dir)
	var mounted struct {
		Node string `json:"node"`
	}
	if err = json.Unmarshal([]byte(out), &mounted); err != nil {
		err = fmt.Errorf("output of thaw mount: %w", err)
	} else if err = setReadAhead(mounted.Node, readAhead); err == nil {
		err = r.furnish()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", s.image, err), r.Close())
	}
	return r, nil
}

// MountFile mounts the filesystem in a file below dir.
func MountFile(ctx context.Context, file, dir string, readAhead int) (*Root, error) {
	r := &Root{Dir: filepath.Join(dir, "root")}
	if err := os.Mkdir(r.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := r.mountFile(ctx, file, readAhead); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", file, err), r.Close())
	}
	return r, nil
}

// Furnish returns the Root of a directory, such as an unpacked image.
func Furnish(dir string) (*Root, error) {
	r := &Root{Dir: dir}
	if err := r.furnish(); err != nil {
		return nil, errors.Join(fmt.Errorf("furnish %s: %w", dir, err), r.Close())
	}
	return r, nil
}

func (r *Root) mountFile(ctx context.Context, file string, readAhead int) error {
	device, err := Output(exec.CommandContext(ctx, "losetup", "-f", "--show", "-r", file))
	if err != nil {
		return err
	}
	err = setReadAhead(device, readAhead)
	if err == nil {
		err = r.mount(device, "", "ext4", unix.MS_RDONLY)
	}
	// The kernel detaches it when its last user, the mount, is gone.
	if _, e := Output(exec.Command("losetup", "-d", device)); err != nil || e != nil {
		return errors.Join(err, e)
	}
	return r.furnish()
}

func (r *Root) waitFor(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
		select {
		case <-r.ended:
			return fmt.Errorf("nbdfuse ended%s", r.said.lines())
		default:
		}
		if err := sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("nbdfuse does not mount %s: %w", r.fuseDir, err)
		}
	}
}

func setReadAhead(device string, kib int) error {
	return os.WriteFile(filepath.Join("/sys/block", filepath.Base(device), "queue/read_ahead_kb"), []byte(strconv.Itoa(kib)), 0)
}

func (r *Root) mount(source, at, kind string, flags uintptr) error {
	to := filepath.Join(r.Dir, at)
	if err := unix.Mount(source, to, kind, flags, ""); err != nil {
		return fmt.Errorf("mount a %s at %s: %w", kind, to, err)
	}
	r.mounts = append(r.mounts, to)
	return nil
}

// furnish mounts what a container has, where the image has the directory.
func (r *Root) furnish() error {
	for _, m := range []struct{ at, kind string }{
		{"proc", "proc"}, {"dev", "tmpfs"}, {"tmp", "tmpfs"}, {"run", "tmpfs"}, {"var/tmp", "tmpfs"},
	} {
		if _, err := os.Lstat(filepath.Join(r.Dir, m.at)); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := r.mount(m.kind, m.at, m.kind, 0); err != nil {
			return err
		}
	}
	dev := filepath.Join(r.Dir, "dev")
	if !slices.Contains(r.mounts, dev) {
		return nil
	}
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		path := filepath.Join(dev, name)
		if err := errors.Join(unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))), os.Chmod(path, 0o666)); err != nil {
			return fmt.Errorf("make %s: %w", path, err)
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(dev, "shm"), 0o1777)
}

// Run runs a program in the root, and then kills what it left running.
func (r *Root) Run(ctx context.Context, program string, args ...string) (out string, u Usage, err error) {
	var stdout, stderr bytes.Buffer
	// Not SysProcAttr.Chroot: this process would wait for the child's exec without
	// letting the garbage collector run, and the exec waits for blocks that a
	// [Link] of this process may have to carry.
	cmd := exec.CommandContext(ctx, "chroot", append([]string{r.Dir, program}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LANG=C.UTF-8"}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = 10 * time.Second // for a descendant that keeps the pipes open
	u, err = Run(cmd)
	if e := r.killAll(); err == nil {
		err = e
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), u, err
}

// killAll kills the processes that have this root, by their IDs.
func (r *Root) killAll() error {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		left := 0
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil {
				continue
			}
			if root, err := os.Readlink(filepath.Join("/proc", e.Name(), "root")); err == nil && root == r.Dir {
				left++
				syscall.Kill(pid, syscall.SIGKILL) // fails only if it has ended
			}
		}
		if left == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("processes in %s do not end after SIGKILL", r.Dir)
}

// Close unmounts everything, and disconnects from the export.
func (r *Root) Close() error {
	err := r.killAll()
	for _, m := range slices.Backward(r.mounts) {
		err = errors.Join(err, unmount(m))
	}
	r.mounts = nil
	if r.fuse == nil {
		return err
	}
	select {
	case <-r.ended:
		return err
	default:
	}
	if e := unmount(r.fuseDir); e != nil {
		err = errors.Join(err, e)
		r.fuse.Process.Kill() // fails only if it has ended
	}
	select {
	case <-r.ended:
	case <-time.After(time.Minute):
		r.fuse.Process.Kill()
		<-r.ended
	}
	return err
}

// unmount waits up to a minute for the last user of the mount to end.
func unmount(dir string) error {
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if err = unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("unmount %s: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
}
