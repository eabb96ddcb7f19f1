// Package guest runs benchmarks in virtual machines, because a host may lack the kernel
// that they need, or the modules. A [Machine] boots an ordinary kernel by qemu, with
// programs of this host, and hears what the guest says on its console. It takes hardware
// virtualisation where that works, and emulates otherwise: then ratios mean more than
// figures.
//
// scripts/guestlib, which makes the guests of the tests as well, fetches the kernel, and
// makes the initramfs. Root is required.
package guest

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

// Machine is a virtual machine that runs a shell script from an initramfs.
type Machine struct {
	// Script has the functions of scripts/guestlib: say, end, fail and disk. It ends
	// with "end done".
	Script   string
	Programs []bench.Program // of this host, which the script can run
	Files    string          // directory whose content is in the root, too; empty: none
	Modules  []string        // of the kernel, that are loaded
	Memory   int             // in MiB
	Args     []string        // of qemu, for disks

	vmlinuz, initrd string
	accel           []string
}

// Prepare makes what Run boots, in a directory that exists until Run has ended.
func (m *Machine) Prepare(ctx context.Context, dir string) error {
	module, err := bench.Output(exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}"))
	if err != nil {
		return err
	}
	files := m.Files
	if files == "" {
		if files, err = os.MkdirTemp(dir, "files"); err != nil {
			return err
		}
	}
	programs := make([]string, len(m.Programs))
	for i, p := range m.Programs {
		programs[i] = p.Name + "=" + p.Package
	}
	cmd := exec.CommandContext(ctx, "bash", "-c", prepare, "prepare.sh", dir, files, strings.Join(programs, " "), strings.Join(m.Modules, " "))
	cmd.Dir = module
	cmd.Stdin = strings.NewReader("dmesg -n 1\n" + m.Script) // no line of the kernel in one of the script
	out, err := bench.Output(cmd)
	if err != nil {
		return fmt.Errorf("prepare a guest: %w", err)
	}
	lines := strings.Split(out, "\n")
	if len(lines) < 3 {
		return fmt.Errorf("prepare a guest: the script says %q", out)
	}
	m.vmlinuz, m.accel, m.initrd = lines[0], lines[1:], filepath.Join(dir, "initrd")
	return nil
}

//go:embed prepare.sh
var prepare string

// Facts say what the figures of a guest depend on.
func (m *Machine) Facts() []bench.Fact {
	return []bench.Fact{{Key: "guest", Value: fmt.Sprintf("Linux %s, %d processors, %d MiB, %s", filepath.Base(filepath.Dir(m.vmlinuz)), processors, m.Memory, strings.Join(m.accel, " "))}}
}

const processors = 2

// Run boots the machine, and calls line with each line that its script says. A kernel in
// many hangs before its script begins, when emulated on a busy host: Run boots it again.
func (m *Machine) Run(ctx context.Context, line func(string) error) error {
	for range 3 {
		booted, err := m.boot(ctx, line)
		if err == nil || booted || ctx.Err() != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "the guest's kernel does not start; trying again:", err)
	}
	return errors.New("the guest's kernel has not started, three times")
}

// bootTime is how long the kernel may take to run the script.
const bootTime = 3 * time.Minute

func (m *Machine) boot(ctx context.Context, line func(string) error) (booted bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	size := strconv.Itoa(m.Memory) + "M"
	args := append(append([]string{}, m.accel...),
		"-M", "q35", "-m", size, "-smp", strconv.Itoa(processors), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-object", "memory-backend-memfd,id=mem,size="+size+",share=on", "-machine", "memory-backend=mem", // what vhost-user requires
		"-kernel", m.vmlinuz, "-initrd", m.initrd, "-append", "console=ttyS0 reboot=t panic=-1 quiet")
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(args, m.Args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	late := time.AfterFunc(bootTime, func() { cancel(fmt.Errorf("nothing for %v", bootTime)) })
	defer late.Stop()
	c := console{line: line}
	err = c.read(out, func() { booted = true; late.Stop() })
	if err != nil {
		cancel(err)
	}
	_, _ = io.Copy(io.Discard, out)
	waited := cmd.Wait()
	switch {
	case err != nil:
		return booted, fmt.Errorf("guest: %w%s", err, c.tail())
	case context.Cause(ctx) != nil:
		return booted, fmt.Errorf("guest: %w%s", context.Cause(ctx), c.tail())
	case !c.done:
		return booted, fmt.Errorf("the guest has ended early: %w%s", errors.Join(waited, errors.New("it has not said that it is done")), c.tail())
	}
	return true, nil
}

// console is what a guest says.
type console struct {
	line func(string) error
	last []string
	done bool
}

// read reads the lines "guest TIME TEXT" until the end or an error. It calls booted when
// the script begins.
func (c *console) read(from io.Reader, booted func()) error {
	in := bufio.NewScanner(from)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		text := strings.TrimRight(in.Text(), "\r")
		if c.last = append(c.last, text); len(c.last) > 30 {
			c.last = c.last[1:]
		}
		word, rest, _ := strings.Cut(text, " ")
		if word != "guest" {
			continue
		}
		_, rest, _ = strings.Cut(rest, " ") // the time
		switch {
		case strings.HasPrefix(rest, "booted"):
			booted()
		case strings.HasPrefix(rest, "failed"):
			return errors.New(rest)
		case rest == "done":
			c.done = true
		default:
			if err := c.line(rest); err != nil {
				return err
			}
		}
	}
	return in.Err()
}

// tail is the end of the console, for the end of an error.
func (c *console) tail() string { return "\n" + strings.Join(c.last, "\n") }
