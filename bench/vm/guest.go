package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// guest is a virtual machine that runs a script from its root.
type guest struct {
	dir   string   // with vmlinuz, initrd and root.ext4, as scripts/guest-vhost makes them
	disks []string // arguments of qemu, in the order of the disks: the first one is /dev/vdc
}

// run boots the guest with a script, and calls line with each line that the script prints after
// the word "guest". The script ends with finish. Where the kernel does not start, as happens
// to emulated ones, run tries again.
func (g *guest) run(ctx context.Context, script string, line func(string) error) error {
	for range 3 {
		booted, err := g.boot(ctx, script, line)
		if err == nil || booted || ctx.Err() != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "the guest's kernel does not start; trying again:", err)
	}
	return errors.New("the guest's kernel has not started, three times")
}

// bootTime is how long the kernel may take to run the script.
const bootTime = time.Minute

func (g *guest) boot(ctx context.Context, script string, line func(string) error) (booted bool, err error) {
	run, err := os.MkdirTemp("", "bench-vm-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(run)
	task := filepath.Join(run, "task")
	text := ". /prelude\n" + script
	if err := os.WriteFile(task, append([]byte(text), make([]byte, 64<<10-len(text))...), 0o600); err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	args := []string{
		"-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1024", "-smp", "2", "-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-no-reboot",
		"-object", "memory-backend-memfd,id=mem,size=1024M,share=on", "-machine", "memory-backend=mem",
		"-drive", "id=root,file=" + filepath.Join(g.dir, "root.ext4") + ",format=raw,if=none,snapshot=on", "-device", "virtio-blk-pci,drive=root,serial=root",
		"-drive", "id=task,file=" + task + ",format=raw,if=none,readonly=on", "-device", "virtio-blk-pci,drive=task,serial=task",
		"-kernel", filepath.Join(g.dir, "vmlinuz"), "-initrd", filepath.Join(g.dir, "initrd"), "-append", "console=ttyS0 reboot=t panic=-1 quiet",
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(args, g.disks...)...)
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
	done := false
	var last []string
	in := bufio.NewScanner(out)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		text := strings.TrimRight(in.Text(), "\r")
		if last = append(last, text); len(last) > 30 {
			last = last[1:]
		}
		word, rest, _ := strings.Cut(text, " ")
		if word != "guest" {
			continue
		}
		_, rest, _ = strings.Cut(rest, " ") // the time
		switch {
		case strings.HasPrefix(rest, "booted"):
			continue
		case strings.HasPrefix(rest, "failed"):
			err = errors.New(rest)
		case rest == "done":
			done = true
		default:
			booted = true
			late.Stop()
			err = line(rest)
		}
		if err != nil {
			cancel(err)
			break
		}
	}
	_, _ = io.Copy(io.Discard, out)
	waited := cmd.Wait()
	switch {
	case err != nil:
		return booted, fmt.Errorf("guest: %w\n%s", err, strings.Join(last, "\n"))
	case context.Cause(ctx) != nil:
		return booted, context.Cause(ctx)
	case !done:
		return booted, fmt.Errorf("the guest ended early: %w\n%s", errors.Join(waited, errors.New("its last lines follow")), strings.Join(last, "\n"))
	}
	return true, nil
}
