package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// StargzPrograms are containerd with its stargz-snapshotter: what starts images
// of the eStargz format before they are here, and so a peer of thaw.
type StargzPrograms struct {
	containerd, snapshotter, ctr string
	path                         string // where they find what they run in turn
}

// FindStargz looks for the programs in PATH, and where administrators' ones are.
func FindStargz() (*StargzPrograms, error) {
	p := &StargzPrograms{path: os.Getenv("PATH") + ":/usr/sbin:/sbin"}
	var missing []string
	look := func(name string) string {
		for _, dir := range filepath.SplitList(p.path) {
			file := filepath.Join(dir, name)
			if info, err := os.Stat(file); filepath.IsAbs(file) && err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return file
			}
		}
		missing = append(missing, name)
		return ""
	}
	p.containerd, p.snapshotter, p.ctr = look("containerd"), look("containerd-stargz-grpc"), look("ctr-remote")
	for _, name := range []string{"containerd-shim-runc-v2", "runc", "nsenter", "setpriv"} {
		look(name)
	}
	if missing != nil {
		return nil, fmt.Errorf("stargz-snapshotter: there is no %s; run scripts/stargz DIR, and put DIR into PATH", strings.Join(missing, ", no "))
	}
	return p, nil
}

// Version is that of the snapshotter, with containerd's.
func (p *StargzPrograms) Version(ctx context.Context) (string, error) {
	var all []string
	for _, command := range [][]string{{p.snapshotter, "-version"}, {p.containerd, "--version"}} {
		out, err := Output(exec.CommandContext(ctx, command[0], command[1:]...))
		if err != nil {
			return "", err
		}
		name, version := filepath.Base(command[0]), ""
		for _, word := range strings.Fields(out) {
			if digits := strings.TrimPrefix(word, "v"); digits != "" && digits[0] >= '0' && digits[0] <= '9' {
				version = digits
				break
			}
		}
		all = append(all, name+" "+version)
	}
	return strings.Join(all, ", "), nil
}

// Stargz is a containerd with a stargz-snapshotter, whose state is all in one
// directory and which nobody else sees: they have namespaces of their own for
// processes and mounts. So when the first process in there ends, by Close or
// because this program has ended, the kernel ends all others, shims and
// containers too, and with the last one go the FUSE mounts.
type Stargz struct {
	p        *StargzPrograms
	dir      string
	space    string // containerd's namespace, and the name of its control groups
	registry string

	init    *exec.Cmd // the first process
	leash   io.Closer // which lives until this is closed
	daemons []*daemon
	runs    int
}

// daemon is a server that is to run until the end.
type daemon struct {
	cmd  *exec.Cmd
	said tail
	done chan struct{}
}

// Start starts both with nothing in their stores, which it makes in dir, and
// returns when they listen. They speak plain HTTP to plainHTTP, HOST:PORT. The
// snapshotter is configured by its defaults for all else: so it fetches
// what has been prefetched for it first, what is read when it is read, and all
// the rest when it is idle. Start needs root.
func (p *StargzPrograms) Start(ctx context.Context, dir, plainHTTP string) (s *Stargz, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	s = &Stargz{p: p, dir: dir, registry: plainHTTP}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start stargz-snapshotter: %w", err), s.Close())
		}
	}()
	if err := s.configure(); err != nil {
		return s, err
	}
	if err := s.unshare(); err != nil {
		return s, err
	}
	s.space = fmt.Sprintf("thaw-bench-%d", s.init.Process.Pid)
	err = s.daemon(ctx, s.file("stargz.sock"), p.snapshotter,
		"--address", s.file("stargz.sock"), "--config", s.file("stargz.toml"), "--root", s.file("stargz"), "--log-level", "warn")
	if err != nil {
		return s, err
	}
	return s, s.daemon(ctx, s.file("containerd.sock"), p.containerd, "--config", s.file("containerd.toml"), "--log-level", "warn")
}

func (s *Stargz) file(name string) string { return filepath.Join(s.dir, name) }

func (s *Stargz) configure() error {
	for name, text := range map[string]string{
		// What is left out needs what a machine may lack, or what is not
		// wanted, such as Kubernetes.
		"containerd.toml": fmt.Sprintf(`version = 2
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
`, s.file("containerd"), s.file("state"), s.file("containerd.sock"), s.file("stargz.sock")),
		"stargz.toml": fmt.Sprintf(`[[resolver.host.%[1]q.mirrors]]
host = %[1]q
insecure = true
`, s.registry),
	} {
		if err := os.WriteFile(s.file(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// firstProcess mounts a /proc of its namespace, and a /run/containerd, whose
// name shims have built in. Then it waits for the end of its input, and so for
// ours, meanwhile taking leave of orphans, as a first process must.
const firstProcess = `set -e
mount -t proc proc /proc
mkdir -p /run/containerd
mount -t tmpfs tmpfs /run/containerd
echo ready
cat >/dev/null`

func (s *Stargz) unshare() error {
	init := exec.Command("sh", "-c", firstProcess)
	// Unshare makes the mounts private too, so none spreads to the host.
	init.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS}
	dieWithUs(init)
	var said tail
	init.Stderr = &said
	leash, err := init.StdinPipe()
	if err != nil {
		return err
	}
	out, err := init.StdoutPipe()
	if err != nil {
		return errors.Join(err, leash.Close())
	}
	if err := init.Start(); err != nil {
		return fmt.Errorf("in namespaces of its own: %w", errors.Join(err, leash.Close()))
	}
	s.init, s.leash = init, leash
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		s.end()
		return fmt.Errorf("mount in namespaces of its own: %w%s", err, said.lines())
	}
	return nil
}

// enter is a command in the namespaces. It ends when its context does, or this
// program.
func (s *Stargz) enter(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", strconv.Itoa(s.init.Process.Pid), "--mount", "--pid", "--",
		// nsenter has a child in there, which is to end when nsenter is killed.
		"setpriv", "--pdeathsig", "KILL", program,
	}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+s.p.path, "DOCKER_CONFIG="+s.dir)
	cmd.WaitDelay = 10 * time.Second // for what holds its pipes still
	dieWithUs(cmd)
	return cmd
}

// daemon starts a server and waits until somebody listens on its socket.
func (s *Stargz) daemon(ctx context.Context, socket, program string, args ...string) error {
	d := &daemon{cmd: s.enter(context.WithoutCancel(ctx), program, args...), done: make(chan struct{})}
	d.cmd.Stderr = &d.said
	if err := d.cmd.Start(); err != nil {
		return err
	}
	s.daemons = append(s.daemons, d)
	go func() {
		d.cmd.Wait()
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		var dialer net.Dialer
		c, err := dialer.DialContext(ctx, "unix", socket)
		if err == nil {
			return c.Close()
		}
		select {
		case <-d.done:
			return fmt.Errorf("%s ended%s", filepath.Base(program), d.said.lines())
		default:
		}
		if e := sleep(ctx, 2*time.Millisecond); e != nil {
			return fmt.Errorf("%s does not listen: %w", filepath.Base(program), errors.Join(e, err))
		}
	}
}

// control runs containerd's client with stargz's commands, and returns what it
// prints.
func (s *Stargz) control(ctx context.Context, args ...string) (out string, err error) {
	var stdout, stderr bytes.Buffer
	cmd := s.enter(ctx, s.p.ctr, append([]string{"--address", s.file("containerd.sock"), "--namespace", s.space}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if _, err := Run(cmd); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(err, context.Cause(ctx))
		}
		return "", fmt.Errorf("%w\n%s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// Convert makes an eStargz image of one in the registry, and pushes it. None of
// its files is marked to be prefetched.
func (s *Stargz) Convert(ctx context.Context, from, to string) error {
	return s.convert(ctx, from, to, "image", "convert", "--oci", "--estargz", from, to)
}

// Optimize is Convert after a start of the program, to its end: the files that
// it reads come first in their layers, and are prefetched when these are
// mounted. It is to stargz what a trace is to thaw.
func (s *Stargz) Optimize(ctx context.Context, from, to string, program ...string) error {
	words, err := json.Marshal(program)
	if err != nil {
		return err
	}
	// The period only bounds it: it is over when the program is.
	return s.convert(ctx, from, to, "image", "optimize", "--oci", "--net-host", "--period", "120",
		"--env", environment[0], "--env", environment[1], "--entrypoint", string(words), "--args", "[]", from, to)
}

func (s *Stargz) convert(ctx context.Context, from, to string, command ...string) error {
	for _, command := range [][]string{
		{"content", "fetch", "--plain-http", from},
		command,
		{"images", "push", "--plain-http", to},
	} {
		if _, err := s.control(ctx, command...); err != nil {
			return fmt.Errorf("make an eStargz of %s: %w", from, err)
		}
	}
	return nil
}

// Pull makes an image ready to run: its layers are mounted, what is in them
// comes later.
func (s *Stargz) Pull(ctx context.Context, ref string) error {
	_, err := s.control(ctx, "images", "rpull", "--plain-http", ref)
	return err
}

// environment is that of a [Root.Run], but for the PATH, which is the image's.
var environment = []string{"HOME=/tmp", "LANG=C.UTF-8"}

// Exec runs a program of an image that was pulled, to its end, in a container
// with the host's network and a /tmp in memory, and returns what it prints.
func (s *Stargz) Exec(ctx context.Context, ref string, program ...string) (out string, err error) {
	s.runs++
	id := fmt.Sprintf("run-%d", s.runs)
	args := []string{"run", "--rm", "--snapshotter", "stargz", "--net-host"}
	for _, at := range []string{"/tmp", "/var/tmp"} {
		args = append(args, "--mount", "type=tmpfs,src=tmpfs,dst="+at+",options=mode=1777")
	}
	for _, e := range environment {
		args = append(args, "--env", e)
	}
	out, err = s.control(ctx, append(append(args, ref, id), program...)...)
	if err != nil {
		// Where the client was killed, the container is there still. What
		// these say does not matter: they fail where it is not.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		s.control(ctx, "tasks", "rm", "--force", id)
		s.control(ctx, "containers", "rm", id)
	}
	return out, err
}

// Run is Pull and Exec: a start of an image that is not here.
func (s *Stargz) Run(ctx context.Context, ref string, program ...string) (out string, err error) {
	if err := s.Pull(ctx, ref); err != nil {
		return "", err
	}
	return s.Exec(ctx, ref, program...)
}

// Said is the last of both logs, for the end of an error.
func (s *Stargz) Said() string {
	var all string
	for _, d := range s.daemons {
		select {
		case <-d.done:
			all += d.said.lines()
		default: // it is written to still
		}
	}
	return all
}

// Close ends everything that was started, and with it the mounts. After it the
// directory can be removed.
func (s *Stargz) Close() error {
	if s.init == nil {
		return nil
	}
	s.end()
	for _, d := range s.daemons {
		<-d.done
	}
	return removeGroups(s.space)
}

// end ends the first process, and so all in its namespace: a wait for it
// returns when they have ended.
func (s *Stargz) end() {
	s.leash.Close() // of a pipe: it cannot fail
	s.init.Process.Kill()
	s.init.Wait()
}

// removeGroups removes the control groups that containers had, which stay
// when a container was killed, and their parent, which stays always. They are
// in one hierarchy, or in one for each controller.
func removeGroups(space string) error {
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		for _, below := range []string{"*", ""} {
			groups, err := filepath.Glob(filepath.Join(pattern, space, below))
			if err != nil {
				return err
			}
			for _, g := range groups {
				if info, err := os.Stat(g); err != nil || !info.IsDir() {
					continue // a file of the group, or a group that another name of its hierarchy has had removed
				}
				if err := removeGroup(g); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// removeGroup waits for the last process to be gone from it, for a while.
func removeGroup(dir string) error {
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
	return fmt.Errorf("remove the control group %s: %w", dir, err)
}
