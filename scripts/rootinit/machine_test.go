package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/scripts/rootinit/bootconfig"
)

// Variables that make the test binary something else than a test.
const (
	machineDir = "ROOTINIT_MACHINE" // the first process of a PID namespace, which becomes /sbin/init
	leaseDir   = "ROOTINIT_LEASE"   // a DHCP client in a network namespace
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(machineDir); dir != "" {
		if err := becomeMachine(dir); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(99)
		}
	}
	if dir := os.Getenv(leaseDir); dir != "" {
		if err := leaseInside(dir); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(99)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// forgetMounts detaches the copies of mounts that this process's namespace has of disks which
// other programs have made. A test that unmounts such a disk waits for the end of all copies, or
// finds that it cannot be mounted anew.
func forgetMounts() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 2 || !strings.HasPrefix(f[0], "/dev/loop") && !strings.HasPrefix(f[0], "/dev/nbd") && !strings.HasPrefix(f[0], "/dev/ublk") {
			continue
		}
		if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("detach the copy of the mount at %s: %w", f[1], err)
		}
	}
	return nil
}

// becomeMachine has dir/root as its root, a copy in a tmpfs of its own: the first process makes the whole file system read-only.
// What a kernel would have is in files of dir: cmdline, active (the consoles), console, and tty, the name of a terminal.
func becomeMachine(dir string) error {
	root := filepath.Join(dir, "mnt")
	at := func(name string) string { return filepath.Join(root, name) }
	from := func(name string) string { return filepath.Join(dir, name) }
	tty, err := os.ReadFile(from("tty"))
	if err != nil {
		return err
	}
	steps := []func() error{
		forgetMounts,
		func() error { return unix.Mount("tmpfs", root, "tmpfs", 0, "") },
		func() error { return os.CopyFS(root, os.DirFS(from("root"))) },
		func() error { return os.Symlink("busybox", at("bin/sh")) },
		func() error { return os.Symlink("init", at("sbin/poweroff")) },
		func() error { return os.Symlink("init", at("sbin/reboot")) },
		func() error { return unix.Mount("proc", at("proc"), "proc", 0, "") },
		func() error { return unix.Mount(from("cmdline"), at("proc/cmdline"), "", unix.MS_BIND, "") },
		func() error { return unix.Mount("sysfs", at("sys"), "sysfs", 0, "") },
		func() error {
			return unix.Mount(from("active"), at("sys/class/tty/console/active"), "", unix.MS_BIND, "")
		},
		func() error { return unix.Mount("tmpfs", at("dev"), "tmpfs", 0, "") },
		func() error { return os.WriteFile(at("dev/console"), nil, 0o600) },
		func() error { return os.WriteFile(at("dev/ttyS9"), nil, 0o600) },
		func() error { return unix.Mknod(at("dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) },
		func() error { return unix.Mount(from("console"), at("dev/console"), "", unix.MS_BIND, "") },
		func() error { return unix.Mount(string(tty), at("dev/ttyS9"), "", unix.MS_BIND, "") },
		func() error {
			if _, err := os.Stat(from("readonly")); err != nil {
				return nil
			}
			return unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		},
		func() error { return unix.Chroot(root) },
		func() error { return os.Chdir("/") },
		func() error { return syscall.Exec("/sbin/init", []string{"/sbin/init"}, nil) },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// A testMachine is the first process in namespaces of its own.
type testMachine struct {
	t        *testing.T
	cmd      *exec.Cmd
	began    time.Time
	dir      string
	terminal *os.File // the other end of its serial console
	ended    chan struct{}

	mu    sync.Mutex
	typed bytes.Buffer // what the serial console has shown
}

var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "rootinit-test.")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "init"), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.New(string(out))
	}
	b, err := os.ReadFile(filepath.Join(dir, "init"))
	os.RemoveAll(dir)
	return string(b), err
})

// boot boots a root of busybox. prepare, if not nil, changes the machine's files before.
func boot(t *testing.T, cmdline string, config bootconfig.Config, prepare func(dir string)) *testMachine {
	t.Helper()
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("namespaces require root")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is not installed")
	}
	if err := exec.Command("ldd", busybox).Run(); err == nil {
		t.Skip("busybox is not static: install busybox-static")
	}
	init, err := program()
	if err != nil {
		t.Fatal(err)
	}
	m := &testMachine{t: t, dir: t.TempDir(), ended: make(chan struct{})}
	for _, dir := range []string{"mnt", "root/bin", "root/dev", "root/etc", "root/proc", "root/run", "root/sbin", "root/sys", "root/tmp", "root/root"} {
		os.MkdirAll(filepath.Join(m.dir, dir), 0o755)
	}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	master, slave := terminal(t)
	m.terminal = master
	for name, content := range map[string]string{
		"cmdline": cmdline + "\n", "active": "tty0 ttyS9\n", "console": "", "tty": slave,
		"root/etc/passwd": "root:x:0:0::/root:/bin/sh\nwww:x:33:34::/srv:\n", "root/etc/group": "extra:x:50:www\n",
		"root/etc/hosts": "127.0.0.1\tlocalhost\n", "root/etc/resolv.conf": "", "root/etc/hostname": "from-image\n",
		"root/" + bootconfig.File: string(raw), "root/sbin/init": init, "root/bin/busybox": string(program),
	} {
		mode := os.FileMode(0o644)
		if strings.Contains(name, "bin/") {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	if prepare != nil {
		prepare(m.dir)
	}
	m.cmd = exec.Command("/proc/self/exe")
	m.cmd.Env = []string{machineDir + "=" + m.dir}
	m.cmd.Stderr = os.Stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Unshareflags: unix.CLONE_NEWNS, // and nothing that it mounts reaches the host
	}
	m.began = time.Now()
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // until the terminal is closed
		b := make([]byte, 4096)
		for {
			n, err := m.terminal.Read(b)
			m.mu.Lock()
			m.typed.Write(b[:n])
			m.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	go func() {
		m.cmd.Wait()
		close(m.ended)
	}()
	t.Cleanup(func() {
		m.cmd.Process.Kill()
		<-m.ended
		if t.Failed() {
			t.Logf("console:\n%s", m.console())
		}
	})
	return m
}

// terminal returns the ends of a pseudo-terminal.
func terminal(t *testing.T) (master *os.File, slave string) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	slave = filepath.Join("/dev/pts", strconv.Itoa(n))
	// A terminal that nobody has open reports an error to its reader.
	keep, err := os.OpenFile(slave, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keep.Close() })
	return master, slave
}

// console is what the kernel's console and the serial console have shown.
func (m *testMachine) console() string {
	b, err := os.ReadFile(filepath.Join(m.dir, "console"))
	if err != nil {
		m.t.Error(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(b) + m.typed.String()
}

// await waits until the console shows a text.
func (m *testMachine) await(text string) {
	m.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if strings.Contains(m.console(), text) {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("the console does not show %q", text)
		}
	}
}

// end waits for the end of the machine, which is to be by a power-off or a reboot, and returns what the console has shown. A PID
// namespace that calls reboot(2) ends by a signal.
func (m *testMachine) end(how ending) string {
	m.t.Helper()
	if !wait(m.ended, 2*time.Minute) {
		m.t.Fatal("the machine does not end")
	}
	want := map[ending]syscall.Signal{powerOff: syscall.SIGINT, halt: syscall.SIGINT, reboot: syscall.SIGHUP}[how]
	if s := m.cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != want {
		m.t.Errorf("the machine ends by %v, want %s", m.cmd.ProcessState, how)
	}
	return m.console()
}

func contains(t *testing.T, console string, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !strings.Contains(console, s) {
			t.Errorf("the console does not show %q", s)
		}
	}
}

func TestService(t *testing.T) {
	m := boot(t, "quiet", bootconfig.Config{
		Args: []string{"sh", "-c", `echo "ids $(id -u) $(id -g) $(id -G), in $(pwd), $GREETING, home $HOME, host $HOSTNAME $(hostname)"
cat /etc/hosts; grep -c ' /[^ ]* ' /proc/mounts; touch /tmp/a /dev/shm/b && echo "can write"; ls -ld /dev/fd /dev/pts/ptmx; read line || echo "no input"; exit 3`},
		Env: []string{"GREETING=hello  there", "PATH=/bin"}, User: "www", Dir: "/work/new", Hostname: "box",
	}, nil)
	console := m.end(powerOff)
	contains(t, console, "ids 33 34 34 50, in /work/new, hello  there, home /srv, host box box\n", "127.0.0.1\tlocalhost\n127.0.1.1\tbox\n",
		"can write", "/dev/fd -> /proc/self/fd", "/dev/pts/ptmx", "no input", "ended: exit status 3", "thaw-init: poweroff\n")
	if strings.Contains(console, "unmount") || strings.Contains(console, "read-only") {
		t.Error("something was not unmounted")
	}
}

func TestExec(t *testing.T) {
	m := boot(t, `thaw.exec="echo one  two; kill -9 $$" thaw.hostname=cmdline thaw.after=reboot thaw.nonsense`,
		bootconfig.Config{Args: []string{"sh", "-c", "echo the service"}}, nil)
	console := m.end(reboot)
	contains(t, console, "one two\n", "ended: signal 9", "ignored: thaw.nonsense: there is no such option", "thaw-init: reboot\n")
	if strings.Contains(console, "the service\n") {
		t.Error("the service runs, too")
	}
}

func TestConsole(t *testing.T) {
	m := boot(t, "", bootconfig.Config{Args: []string{"/bin/sh"}}, nil)
	m.await("from-image on ttyS9: ")
	type step struct{ typed, shown string }
	for _, s := range []step{
		{"echo $((6 * 7)) $(tty) $HOME $TERM; stty -echo", "42 /dev/ttyS9 /root vt100"},
		{"sleep 1000 & echo $((7 * 7)); exit", "49"}, // and another shell comes
		{"echo $((8 * 8))", "64"},
		{"poweroff", "poweroff"},
	} {
		m.terminal.WriteString(s.typed + "\n")
		m.await(s.shown)
	}
	contains(t, m.end(powerOff), "user defined signal 2: poweroff")
}

func TestConsoleOff(t *testing.T) {
	m := boot(t, "thaw.console=off", bootconfig.Config{}, nil)
	contains(t, m.end(powerOff), "there is neither a service nor a console")
}

// A service is asked to end by its own signal, and has time to do so.
func TestStop(t *testing.T) {
	m := boot(t, "thaw.console=off", bootconfig.Config{Stop: "SIGQUIT", Args: []string{"sh", "-c",
		`trap 'echo "has stopped"; exit 0' QUIT; trap 'echo "is killed"' TERM; echo runs; while :; do sleep 0.1; done`}}, nil)
	m.await("runs")
	m.cmd.Process.Signal(syscall.SIGTERM) // as busybox's reboot
	console := m.end(reboot)
	contains(t, console, "terminated: reboot", "has stopped")
	if strings.Contains(console, "is killed") {
		t.Error("the service gets SIGTERM first")
	}
}

// What ignores SIGTERM is killed, and does not keep the machine.
func TestStubborn(t *testing.T) {
	m := boot(t, "", bootconfig.Config{Args: []string{"sh", "-c", `trap '' TERM HUP; (while :; do sleep 1; done) & echo started`}}, nil)
	m.end(powerOff)
	if d := time.Since(m.began); d < endPatience {
		t.Errorf("the machine has ended after %v, without waiting", d)
	}
}

func TestRestart(t *testing.T) {
	m := boot(t, "thaw.after=restart", bootconfig.Config{Args: []string{"sh", "-c", "echo x >>/tmp/runs; echo run $(wc -l </tmp/runs)"}}, nil)
	m.await("run 2\n")
	m.cmd.Process.Signal(syscall.SIGUSR2)
	m.end(powerOff)
}

func TestStay(t *testing.T) {
	m := boot(t, "thaw.after=stay thaw.console=off", bootconfig.Config{Args: []string{"sh", "-c", "exit 4"}}, nil)
	m.await("exit status 4")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE, syscall.SIGALRM} {
		m.cmd.Process.Signal(sig) // nothing that ends it
	}
	if wait(m.ended, 300*time.Millisecond) {
		t.Fatal("the machine has ended")
	}
	m.cmd.Process.Signal(syscall.SIGINT)
	m.end(reboot)
}

// Processes without a parent are collected.
func TestOrphans(t *testing.T) {
	m := boot(t, "", bootconfig.Config{Args: []string{"sh", "-c",
		`for i in 1 2 3 4 5 6 7 8 9; do sh -c 'sleep 0.1 & sleep 0.1 &'; done; n=9; while [ $n != 0 ]; do n=$(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l)
sleep 0.1; done; ps | grep -c 'sleep 0.1$'; echo "no zombies"`}}, nil)
	contains(t, m.end(powerOff), "no zombies")
}

func TestReadOnlyRoot(t *testing.T) {
	m := boot(t, "ro", bootconfig.Config{Args: []string{"sh", "-c", "touch /new || echo cannot; cat /etc/hosts; touch /run/new && echo can"}, Hostname: "box"},
		func(dir string) { os.WriteFile(filepath.Join(dir, "readonly"), nil, 0o644) })
	contains(t, m.end(powerOff), "cannot", "127.0.1.1\tbox\n", "can\n")
}

// An image need not have a shell, or anything else.
func TestNothingElse(t *testing.T) {
	m := boot(t, "", bootconfig.Config{Args: []string{"/sbin/reboot"}}, func(dir string) {
		for _, name := range []string{"bin/busybox", "etc/passwd", "etc/group", "etc/hosts", "etc/hostname"} {
			os.Remove(filepath.Join(dir, "root", name))
		}
	})
	contains(t, m.end(reboot), "the image has no shell for the console", "terminated: reboot")
}

// A command that is called init is the first process itself.
func TestFirst(t *testing.T) {
	m := boot(t, "", bootconfig.Config{Args: []string{"/init", "argument"}}, func(dir string) {
		os.WriteFile(filepath.Join(dir, "root/init"), []byte("#!/bin/sh\necho process $$ $1\nexit 5\n"), 0o755)
	})
	if !wait(m.ended, 2*time.Minute) {
		t.Fatal("it does not end")
	}
	contains(t, m.console(), "process 1 argument\n")
	if c := m.cmd.ProcessState.ExitCode(); c != 5 {
		t.Errorf("exit status %d", c)
	}
}

func TestBadImages(t *testing.T) {
	for name, c := range map[string]struct {
		config bootconfig.Config
		shown  string
	}{
		"no such program": {bootconfig.Config{Args: []string{"/nothing", "x"}}, "/nothing x ended: exit status 127"},
		"not in PATH":     {bootconfig.Config{Args: []string{"nothing"}}, "nothing is in no directory of PATH"},
		"empty name":      {bootconfig.Config{Args: []string{""}}, "exit status 127"},
		"no such user":    {bootconfig.Config{Args: []string{"sh", "-c", "echo runs"}, User: "nobody"}, "user nobody of the image"},
		"bad directory":   {bootconfig.Config{Args: []string{"sh", "-c", "echo runs"}, Dir: "/etc/passwd"}, "working directory"},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t, "thaw.console=off", c.config, nil)
			contains(t, m.end(powerOff), c.shown)
		})
	}
}

func TestStopSignals(t *testing.T) {
	for s, want := range map[string]syscall.Signal{"": 15, "SIGQUIT": 3, "quit": 3, "9": 9, "SIGRTMIN+3": 37, "nonsense": 15, "0": 15, "-1": 15, "SIGRTMIN+99": 15} {
		if got := stopSignal(s); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}
