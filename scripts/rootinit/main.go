// Command rootinit is the first process of a virtual machine whose root is a container image. scripts/rootfs puts it into the
// image as /sbin/init, in a layer of its own, with the image's config beside it.
//
// It is one static program, so the image need not have a shell or a library. It mounts what a system has below /proc, /sys,
// /dev, /run and /tmp, sets the hostname, brings up the network, starts the command of the image as a service and a shell on
// each serial console, and collects the processes that end. When the service ends, or somebody wants the machine off, it stops
// all processes, unmounts, makes the root read-only, and powers off.
//
//	options    what the kernel command line says
//	service    the command of the image
//	account    whom it runs as
//	mounts     file systems, at the beginning and at the end
//	network    links, addresses and routes, by rtnetlink
//	dhcp       messages of DHCP; lease is what a server grants
//	console    shells
//	processes  what has been started, and how it ended
//
// As poweroff, reboot or halt, it asks the first process to do that, by the signals that busybox uses.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"thaw/scripts/rootinit/bootconfig"
)

// defaultPath is what a container engine sets where the image sets none.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// What each signal to the first process asks for. Busybox's poweroff, reboot and halt send the first three. SIGINT is what the
// kernel makes of ctrl-alt-del, which Firecracker sends to end a machine.
var signals = map[os.Signal]ending{
	syscall.SIGUSR2: powerOff,
	syscall.SIGTERM: reboot,
	syscall.SIGUSR1: halt,
	syscall.SIGINT:  reboot,
}

// ending is how the machine ends.
type ending string

const (
	powerOff ending = "poweroff"
	reboot   ending = "reboot"
	halt     ending = "halt"
)

func main() {
	if os.Getpid() != 1 {
		os.Exit(ask(filepath.Base(os.Args[0])))
	}
	m := &machine{log: func(format string, args ...any) { fmt.Printf("thaw-init: "+format+"\n", args...) }}
	m.end(m.run())
}

// ask has the first process end the machine.
func ask(name string) int {
	for s, e := range signals {
		if string(e) == name && s != syscall.SIGINT {
			if err := syscall.Kill(1, s.(syscall.Signal)); err != nil {
				fmt.Fprintf(os.Stderr, "%s: signal the first process: %v\n", name, err)
				return 1
			}
			return 0
		}
	}
	fmt.Fprintf(os.Stderr, "%s: this is the first process of a virtual machine; as poweroff, reboot or halt, it ends the machine\n", name)
	return 2
}

// A machine is the state of the first process.
type machine struct {
	log       func(format string, args ...any)
	options   options
	image     bootconfig.Config
	processes *processes
	network   *network
	service   *process // nil while none runs
}

// run returns when the machine is to end.
func (m *machine) run() ending {
	// Go's runtime exits on a signal that nobody wants, and the kernel would panic. What arrives here is dropped. To ignore the
	// signals would not do: children would ignore them, too.
	signal.Notify(make(chan os.Signal, 1))
	wanted := make(chan os.Signal, 8)
	for s := range signals {
		signal.Notify(wanted, s)
	}
	syscall.Umask(0o022)
	for _, err := range mountAll() {
		m.log("%v", err)
	}
	openConsole()
	// ctrl-alt-del is a signal to this process, and no reboot at once. In a container this is not allowed, and not needed.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)

	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		m.log("kernel command line: %v", err)
	}
	var unknown []string
	m.options, unknown = parseOptions(string(line))
	for _, s := range unknown {
		m.log("ignored: %s", s)
	}
	if !m.options.readOnly {
		if err := unix.Mount("", "/", "", unix.MS_REMOUNT, ""); err != nil {
			m.log("the root is read-only: %v", err)
		}
	}
	if m.image, err = readImage("/" + bootconfig.File); err != nil {
		m.log("%v", err)
	}
	m.setHostname()
	m.processes = newProcesses()
	m.network = newNetwork(m.options.address, m.log)
	m.network.start(networkPatience)

	s, err := m.chooseService()
	if err != nil {
		m.log("%v", err)
		s = nil
	}
	if s != nil && s.first {
		m.become(s) // and go on if that fails
	}
	consoles := m.startConsoles()
	if s == nil && consoles == 0 {
		m.log("there is neither a service nor a console")
		return powerOff
	}
	return m.supervise(s, wanted)
}

// supervise runs the service until the machine is to end. Without a service, it waits for a signal.
func (m *machine) supervise(s *service, wanted <-chan os.Signal) ending {
	var restart <-chan time.Time
	var ended <-chan struct{}
	pause := time.Second
	var began time.Time
	start := func() {
		restart, began = nil, time.Now()
		p, err := m.processes.start(s.command)
		if err != nil {
			m.log("%s: %v", s, err)
			p = failedProcess()
		}
		m.service, ended = p, p.ended
	}
	if s != nil {
		start()
	}
	for {
		select {
		case sig := <-wanted:
			m.log("%v: %s", sig, signals[sig])
			return signals[sig]
		case <-restart:
			start()
		case <-ended:
			m.log("%s ended: %s", s, m.service.status)
			m.service, ended = nil, nil
			switch s.after {
			case afterPowerOff:
				return powerOff
			case afterReboot:
				return reboot
			case afterRestart:
				// A service that fails at once is started after 1 s, 2 s, and so on up to 32 s.
				if time.Since(began) > time.Minute {
					pause = time.Second
				}
				restart = time.After(pause)
				pause = min(2*pause, 32*time.Second)
			case afterStay:
			}
		}
	}
}

// become makes the service the first process: some programs insist on it.
func (m *machine) become(s *service) {
	c := &s.command
	path, err := c.find()
	if err == nil {
		err = os.Chdir(c.dir)
	}
	if who := c.account; err == nil && who.uid != 0 {
		groups := make([]int, len(who.groups))
		for i, g := range who.groups {
			groups[i] = int(g)
		}
		err = errors.Join(syscall.Setgroups(groups), syscall.Setgid(int(who.gid)), syscall.Setuid(int(who.uid)))
	}
	if err == nil {
		err = syscall.Exec(path, c.args, c.env)
	}
	m.log("%s: %v", s, err)
}

// setHostname takes the name from the kernel command line, from scripts/rootfs, or from the image.
func (m *machine) setHostname() {
	name := m.options.hostname
	if name == "" {
		name = m.image.Hostname
	}
	if name == "" {
		if b, err := os.ReadFile("/etc/hostname"); err == nil {
			name = strings.TrimSpace(string(b))
		}
	}
	if !validHostname(name) {
		name = "localhost"
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		m.log("hostname %s: %v", name, err)
	}
	m.image.Hostname = name
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !os.IsNotExist(err) || name == "localhost" {
		return
	}
	if err := replaceFile("/etc/hosts", string(hosts)+"127.0.1.1\t"+name+"\n"); err != nil {
		m.log("%v", err)
	}
}

// validHostname reports whether the kernel and resolvers take a name.
func validHostname(s string) bool {
	if s == "" || len(s) > 64 || s[0] == '-' || s[0] == '.' {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.':
		default:
			return false
		}
	}
	return true
}

const (
	stopPatience    = 10 * time.Second // of the service after its stop signal, as of container engines
	endPatience     = 3 * time.Second  // of all other processes
	networkPatience = 10 * time.Second // of the start of the service
)

// end stops everything, makes what was written durable, and ends the machine. It does not return.
func (m *machine) end(how ending) {
	if m.processes != nil {
		if m.service != nil {
			m.service.signal(stopSignal(m.image.Stop))
			wait(m.service.ended, stopPatience)
		}
		m.processes.endAll(endPatience)
	}
	if m.network != nil {
		m.network.stop()
	}
	unix.Sync()
	for _, err := range unmountAll() {
		m.log("%v", err)
	}
	unix.Sync()
	m.log("%s", how)
	drained := make(chan struct{})
	go func() {
		drainConsole()
		close(drained)
	}()
	wait(drained, 2*time.Second) // a terminal that somebody has stopped by ctrl-S never is
	cmd := map[ending]int{powerOff: unix.LINUX_REBOOT_CMD_POWER_OFF, reboot: unix.LINUX_REBOOT_CMD_RESTART, halt: unix.LINUX_REBOOT_CMD_HALT}[how]
	if err := unix.Reboot(cmd); err != nil {
		m.log("%s: %v", how, err)
	}
	select {} // the kernel panics when the first process ends
}

// wait waits until c is closed, and reports whether it was in time.
func wait(c <-chan struct{}, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return false
	}
}
