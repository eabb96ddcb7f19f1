package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A mount is a file system that every system has.
type mount struct {
	fs, dir, options string
	flags            uintptr
	optional         bool // a kernel may lack it
}

const (
	quiet  = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	shared = unix.MS_NOSUID | unix.MS_NODEV
)

var mounts = []mount{
	{fs: "proc", dir: "/proc", flags: quiet},
	{fs: "sysfs", dir: "/sys", flags: quiet},
	{fs: "devtmpfs", dir: "/dev", options: "mode=0755", flags: unix.MS_NOSUID},
	{fs: "devpts", dir: "/dev/pts", options: "gid=5,mode=0620,ptmxmode=0666", flags: unix.MS_NOSUID | unix.MS_NOEXEC},
	{fs: "tmpfs", dir: "/dev/shm", options: "mode=1777", flags: shared},
	{fs: "tmpfs", dir: "/run", options: "mode=0755", flags: shared},
	{fs: "tmpfs", dir: "/tmp", options: "mode=1777", flags: shared},
	{fs: "cgroup2", dir: "/sys/fs/cgroup", flags: quiet, optional: true},
}

// mountAll mounts what the kernel or an initramfs has not mounted yet.
func mountAll() []error {
	var bad []error
	for _, m := range mounts {
		if isMount(m.dir) {
			continue
		}
		err := os.Mkdir(m.dir, 0o755)
		if os.IsExist(err) || m.optional {
			err = nil
		}
		if err == nil {
			err = unix.Mount(m.fs, m.dir, m.fs, m.flags, m.options)
		}
		if err != nil && !m.optional {
			bad = append(bad, fmt.Errorf("mount %s on %s: %w", m.fs, m.dir, err))
		}
	}
	// The kernel does not make these.
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(target, filepath.Join("/dev", name)); err != nil && !os.IsExist(err) {
			bad = append(bad, err)
		}
	}
	return bad
}

// isMount reports whether something is mounted on dir.
func isMount(dir string) bool {
	var here, above unix.Stat_t
	return unix.Lstat(dir, &here) == nil && unix.Lstat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}

// replaceFile shows content under a name for as long as the machine runs. The file of the image, which may be on a read-only
// root, stays as it is.
func replaceFile(name, content string) error {
	dir := "/run/thaw-init"
	file := filepath.Join(dir, filepath.Base(name))
	fail := func(err error) error { return fmt.Errorf("replace %s: %w", name, err) }
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	_, err := os.Lstat(file)
	// The content is written in place: what is mounted is this file, not its name.
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		return fail(err)
	}
	if err == nil {
		return nil // it is mounted already
	}
	if f, err := os.OpenFile(name, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
		f.Close()
	}
	if err := unix.Mount(file, name, "", unix.MS_BIND, ""); err != nil {
		os.Remove(file)
		return fail(err)
	}
	return nil
}

// unmountAll unmounts all but the root and what the kernel makes up, the last mounted first, and makes the root read-only: its
// journal is empty then. What cannot be unmounted is detached.
func unmountAll() []error {
	var bad []error
	dirs, err := mounted()
	if err != nil {
		bad = append(bad, err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		switch dir := dirs[i]; {
		case dir == "/", dir == "/dev", dir == "/proc": // the console, and /proc/self/mounts
		default:
			if err := unix.Unmount(dir, 0); err != nil {
				if !errors.Is(err, unix.EBUSY) || unix.Unmount(dir, unix.MNT_DETACH) != nil {
					bad = append(bad, fmt.Errorf("unmount %s: %w", dir, err))
				}
			}
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		bad = append(bad, fmt.Errorf("make the root read-only: %w", err))
	}
	return bad
}

// mounted returns the directories on which something is mounted, in order.
func mounted() ([]string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(bufio.NewScanner(f))
}

func parseMounts(s *bufio.Scanner) ([]string, error) {
	var dirs []string
	// The kernel escapes what would end a field.
	escapes := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for s.Scan() {
		if f := strings.Fields(s.Text()); len(f) > 1 {
			dirs = append(dirs, escapes.Replace(f[1]))
		}
	}
	return dirs, s.Err()
}
