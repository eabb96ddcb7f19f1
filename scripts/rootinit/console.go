package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// openConsole makes /dev/console the standard input and output. The kernel has done that only if the root or the initramfs had
// it when the kernel started the first process.
func openConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_APPEND, 0)
	if err != nil {
		return // a machine without a console
	}
	for i := range 3 {
		if fd != i {
			_ = unix.Dup3(fd, i, 0)
		}
	}
	if fd > 2 {
		unix.Close(fd)
	}
}

// drainConsole waits until the console has sent everything.
func drainConsole() { _ = unix.IoctlSetInt(1, unix.TCSBRK, 1) }

// startConsoles has a shell run on each serial console of the kernel, and returns how many these are.
func (m *machine) startConsoles() int {
	if m.options.console == consoleOff {
		return 0
	}
	active, err := os.ReadFile("/sys/class/tty/console/active")
	if err != nil {
		m.log("consoles: %v", err)
		return 0
	}
	args := findShell()
	if m.options.console == consoleLogin {
		args = []string{"/bin/login"}
		if err := executable(args[0]); err != nil {
			m.log("%s: %v", args[0], err)
			return 0
		}
	}
	if args == nil {
		m.log("the image has no shell for the console: scripts/rootfs --busybox adds one")
		return 0
	}
	n := 0
	for _, name := range serial(string(active)) {
		device := filepath.Join("/dev", name)
		if tty, err := os.OpenFile(device, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0); err != nil {
			m.log("%v", err)
			continue
		} else {
			tty.Close()
		}
		n++
		go m.serveConsole(device, args)
	}
	return n
}

// serial returns the consoles that are no screens. "tty0" is the screen.
func serial(active string) []string {
	var all []string
	for _, name := range strings.Fields(active) {
		for _, kind := range []string{"ttyS", "ttyAMA", "hvc"} {
			if strings.HasPrefix(name, kind) && !strings.Contains(name, "/") {
				all = append(all, name)
			}
		}
	}
	return all
}

// serveConsole starts a shell whenever there is none.
func (m *machine) serveConsole(device string, args []string) {
	who, err := lookUp("/etc", "")
	if err != nil {
		who = account{home: "/"}
	}
	c := command{args: args, env: append(m.environment(who, nil), "TERM=vt100", "USER=root", "LOGNAME=root"), dir: "/", account: who}
	if info, err := os.Stat(who.home); err == nil && info.IsDir() {
		c.dir = who.home
	}
	for {
		began := time.Now()
		err := m.console(device, c)
		if errors.Is(err, errEnding) {
			return
		}
		if err != nil {
			m.log("console %s: %v", device, err)
		}
		// A shell that ends at once is started every two seconds.
		time.Sleep(2*time.Second - time.Since(began))
	}
}

// console returns when the shell has ended.
func (m *machine) console(device string, c command) error {
	if m.processes.areEnding() {
		return errEnding
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	c.tty = os.NewFile(uintptr(fd), device)
	defer c.tty.Close()
	fmt.Fprintf(c.tty, "%s on %s: %s\n", m.image.Hostname, filepath.Base(device), strings.Join(c.args, " "))
	p, err := m.processes.start(c)
	if err != nil {
		return err
	}
	<-p.ended
	return nil
}
