package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"thaw/scripts/rootinit/bootconfig"
)

func readImage(file string) (bootconfig.Config, error) {
	var c bootconfig.Config
	raw, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(raw, &c)
	}
	if err != nil {
		return bootconfig.Config{}, fmt.Errorf("read the image's config: %w", err)
	}
	return c, nil
}

// stopSignal parses the StopSignal of an image, a name or a number. It is SIGTERM where there is none.
func stopSignal(s string) syscall.Signal {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n)
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if known := unix.SignalNum(name); known != 0 {
		return known
	}
	// systemd has SIGRTMIN+3.
	if base, offset, ok := strings.Cut(name, "+"); ok && base == "SIGRTMIN" {
		if n, err := strconv.Atoi(offset); err == nil && n >= 0 && n <= 30 {
			return syscall.Signal(34 + n)
		}
	}
	return syscall.SIGTERM
}

// A service is what the machine runs besides shells on consoles.
type service struct {
	command command
	after   after
	first   bool // it insists on being the first process
}

func (s *service) String() string { return strings.Join(s.command.args, " ") }

// A command is a program with everything that it starts with.
type command struct {
	args, env []string
	dir       string
	account   account
	tty       *os.File // its controlling terminal; nil for a service
}

// shells are commands that only make sense on a terminal when they have no argument.
var shells = []string{"sh", "ash", "bash", "dash", "ksh", "zsh", "fish"}

// chooseService returns nil if the machine has no service: the image has no command, or only a shell, which the console has
// anyway.
func (m *machine) chooseService() (*service, error) {
	s := &service{after: m.options.after}
	if s.after == "" {
		s.after = afterPowerOff
	}
	args := m.image.Args
	switch {
	case m.options.exec != "":
		args = byShell(m.options.exec)
	case m.options.noServe || len(args) == 0:
		return nil, nil
	case len(args) == 1 && slices.Contains(shells, path.Base(args[0])) && m.options.console == consoleShell:
		return nil, nil
	default:
		// s6-overlay's /init, and systemd.
		base := path.Base(args[0])
		s.first = base == "init" || base == "systemd"
	}
	if len(args) == 0 {
		return nil, errors.New("thaw.exec names no command")
	}
	who, err := lookUp("/etc", m.image.User)
	if err != nil {
		return nil, fmt.Errorf("user %s of the image: %w", m.image.User, err)
	}
	dir := path.Join("/", m.image.Dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("working directory of the image: %w", err)
	}
	s.command = command{args: args, env: m.environment(who, m.image.Env), dir: dir, account: who}
	return s, nil
}

// byShell returns the command that has a shell run a line. Without a shell, words are separated by spaces.
func byShell(line string) []string {
	if sh := findShell(); sh != nil {
		return append(sh, "-c", line)
	}
	return strings.Fields(line)
}

// findShell returns the command of a shell, or nil. scripts/rootfs --busybox adds /bin/busybox to an image that has none.
func findShell() []string {
	for _, sh := range []string{"/bin/bash", "/bin/sh"} {
		if executable(sh) == nil {
			return []string{sh}
		}
	}
	if executable("/bin/busybox") == nil {
		return []string{"/bin/busybox", "sh"}
	}
	return nil
}

// environment adds what a container engine adds to the variables of an image.
func (m *machine) environment(who account, env []string) []string {
	has := func(name string) bool {
		return slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
	}
	env = slices.Clip(env)
	if !has("PATH") {
		env = append(env, defaultPath)
	}
	if !has("HOME") {
		env = append(env, "HOME="+who.home)
	}
	if !has("HOSTNAME") {
		env = append(env, "HOSTNAME="+m.image.Hostname)
	}
	return env
}

// find returns the path of the program: its name may be one that PATH has.
func (c *command) find() (string, error) {
	name := c.args[0]
	if strings.Contains(name, "/") {
		return join(c.dir, name), nil
	}
	for _, v := range c.env {
		list, ok := strings.CutPrefix(v, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range strings.Split(list, ":") {
			if file := path.Join(join(c.dir, dir), name); executable(file) == nil {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("%s is in no directory of PATH", name)
}

// join is where a name leads from the working directory.
func join(dir, name string) string {
	if path.IsAbs(name) {
		return name
	}
	return path.Join(dir, name)
}

func executable(file string) error {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return err
	case info.IsDir() || info.Mode()&0o111 == 0:
		return errors.New("it is not executable")
	}
	return nil
}
