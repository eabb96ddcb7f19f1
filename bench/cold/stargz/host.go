// Package stargz drives containerd with stargz-snapshotter, a peer of thaw: it
// starts images of the eStargz format before they have been downloaded.
//
//	h, err := stargz.Start(ctx, dir, "127.0.0.1:5000")
//	err = h.Convert(ctx, "127.0.0.1:5000/app:v1", "127.0.0.1:5000/app:stargz")
//	err = h.Pull(ctx, "127.0.0.1:5000/app:stargz") // mounts; the contents come later
//	out, err := h.Exec(ctx, "127.0.0.1:5000/app:stargz", "/app/run")
//	err = h.Close()
//
// scripts/stargz builds the programs. Everything here requires root.
package stargz

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

// Programs are what a Host runs. scripts/stargz builds the first two, and
// installs the others.
var Programs = []bench.Program{
	{Name: "containerd-stargz-grpc", Version: []string{"-version"}}, {Name: "ctr-remote"},
	{Name: "containerd", Version: []string{"--version"}}, {Name: "containerd-shim-runc-v2"}, {Name: "runc"},
	{Name: "nsenter"}, {Name: "setpriv"},
}

// Find returns an error that names the programs that PATH lacks.
func Find() error {
	var missing []string
	for _, p := range Programs {
		if _, err := exec.LookPath(p.Name); err != nil {
			missing = append(missing, p.Name)
		}
	}
	if missing != nil {
		return fmt.Errorf("PATH lacks %s: run scripts/stargz DIR, and add DIR to PATH", strings.Join(missing, ", "))
	}
	return nil
}

// Host is a containerd with a stargz-snapshotter. All their state lies in one
// directory. They have PID and mount namespaces of their own: when the first
// process in there ends, by Close or because this program has ended, the kernel
// kills all others, shims and containers included, and the FUSE mounts go with
// the last of them.
type Host struct {
	dir       string
	namespace string // containerd's; its control groups have the same name
	init      *exec.Cmd
	daemons   []*daemon
	runs      int
}

// daemon is a server of a Host. Its log is in a file.
type daemon struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// Start starts both servers with empty stores in dir, and returns once they
// listen. They speak plain HTTP to plainHTTP, HOST:PORT. All else that the
// snapshotter does is its default: it fetches what is marked for prefetching
// first, then what is read, and the rest when idle.
func Start(ctx context.Context, dir, plainHTTP string) (h *Host, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	h = &Host{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start stargz-snapshotter in %s: %w", dir, err), h.Close())
		}
	}()
	if err := h.configure(plainHTTP); err != nil {
		return h, err
	}
	if err := h.unshare(); err != nil {
		return h, err
	}
	h.namespace = fmt.Sprintf("thaw-bench-%d", h.init.Process.Pid)
	err = h.daemon(ctx, "stargz", "containerd-stargz-grpc", "--address", h.file("stargz.sock"),
		"--config", h.file("stargz.toml"), "--root", h.file("stargz"), "--log-level", "warn")
	if err != nil {
		return h, err
	}
	return h, h.daemon(ctx, "containerd", "containerd", "--config", h.file("containerd.toml"), "--log-level", "warn")
}

func (h *Host) file(name string) string { return filepath.Join(h.dir, name) }

func (h *Host) configure(plainHTTP string) error {
	// The plugins that are disabled need what a machine may lack, or are not
	// used here, such as the one for Kubernetes.
	containerd := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = %q
[proxy_plugins.stargz]
  type = "snapshot"
  address = %q
`, h.file("containerd"), h.file("state"), h.file("containerd.sock"), h.file("stargz.sock"))
	snapshotter := fmt.Sprintf("[[resolver.host.%[1]q.mirrors]]\nhost = %[1]q\ninsecure = true\n", plainHTTP)
	return errors.Join(os.WriteFile(h.file("containerd.toml"), []byte(containerd), 0o600),
		os.WriteFile(h.file("stargz.toml"), []byte(snapshotter), 0o600))
}

// firstProcess mounts /proc of its PID namespace, and its own /run/containerd,
// a path that shims have built in. Then it reaps orphans until it is killed.
const firstProcess = `set -e
mount -t proc proc /proc
mkdir -p /run/containerd
mount -t tmpfs tmpfs /run/containerd
echo ready
sleep infinity & wait`

func (h *Host) unshare() error {
	var stderr bytes.Buffer
	init := exec.Command("sh", "-c", firstProcess)
	init.Stderr = &stderr
	// Unshareflags also makes the mounts private: none spreads to the host.
	init.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := init.StdoutPipe()
	if err != nil {
		return err
	}
	if err := init.Start(); err != nil {
		return fmt.Errorf("create PID and mount namespaces: %w", err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		init.Process.Kill()
		init.Wait()
		return fmt.Errorf("mount in the new namespaces: %w\n%s", err, &stderr)
	}
	h.init = init
	return nil
}

// enter returns a command in the namespaces. It ends when its context or this
// program does.
func (h *Host) enter(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(h.init.Process.Pid), "--mount", "--pid", "--",
		// The program is a child of nsenter, and has to end when nsenter is killed.
		"setpriv", "--pdeathsig", "KILL", program,
	}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+h.dir)
	cmd.WaitDelay = 10 * time.Second // for a descendant that keeps the pipes open
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// daemon starts a server, and waits until it listens on its socket, NAME.sock.
func (h *Host) daemon(ctx context.Context, name, program string, args ...string) error {
	d := &daemon{cmd: h.enter(context.WithoutCancel(ctx), program, args...), log: h.file(name + ".log"), done: make(chan struct{})}
	log, err := os.Create(d.log)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd.Stderr = log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	h.daemons = append(h.daemons, d)
	go func() {
		d.cmd.Wait()
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		var dialer net.Dialer
		c, err := dialer.DialContext(ctx, "unix", h.file(name+".sock"))
		if err == nil {
			return c.Close()
		}
		select {
		case <-d.done:
			return fmt.Errorf("%s ended%s", program, h.Log())
		case <-ctx.Done():
			return fmt.Errorf("%s does not listen: %w%s", program, errors.Join(context.Cause(ctx), err), h.Log())
		case <-tick.C:
		}
	}
}

// Log returns the last lines of both servers' logs, for the end of an error. It
// starts with a line break unless it is empty.
func (h *Host) Log() string {
	const most = 4 << 10
	var all strings.Builder
	for _, d := range h.daemons {
		if log, err := os.ReadFile(d.log); err == nil && len(log) > 0 {
			fmt.Fprintf(&all, "\n%s: %s", filepath.Base(d.log), bytes.TrimSpace(log[max(0, len(log)-most):]))
		}
	}
	return all.String()
}

// Close kills everything that was started, which also unmounts what it mounted.
// After Close, dir can be removed.
func (h *Host) Close() error {
	if h.init == nil {
		return nil
	}
	h.init.Process.Kill() // fails only if it has ended
	h.init.Wait()         // returns after the last process in its PID namespace
	for _, d := range h.daemons {
		<-d.done
	}
	return removeControlGroups(h.namespace)
}

// removeControlGroups removes the control groups of containers that were killed,
// and their parent. cgroup v1 has them once per controller.
func removeControlGroups(namespace string) error {
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		for _, below := range []string{"*", ""} {
			groups, err := filepath.Glob(filepath.Join(pattern, namespace, below))
			if err != nil {
				return err
			}
			for _, g := range groups {
				if info, err := os.Stat(g); err != nil || !info.IsDir() {
					continue // a file of a group, or a group that was removed under another controller's name
				}
				if err := removeControlGroup(g); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// removeControlGroup waits up to five seconds for the group's last process to end.
func removeControlGroup(dir string) error {
	var err error
	for range 500 {
		if err = syscall.Rmdir(dir); err == nil || errors.Is(err, syscall.ENOENT) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("remove control group %s: %w", dir, err)
}
