package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"thaw/bench"
)

// nbdkitArgs are the fastest of those in nbdkit's manual: one round trip gets a
// large block, which contains much of what is read next.
const nbdkitArgs = "--filter=cache curl cache-on-read=true cache-min-block-size=1M"

// startNBDKit starts from the flat image on an HTTP server.
func startNBDKit(ctx context.Context, b *benchmark, s *site, dir string, c *clock) (ms []bench.Measure, err error) {
	socket := filepath.Join(dir, "sock")
	c.start()
	stop, err := serveNBDKit(ctx, socket, strings.Fields(b.nbdkit), "http://"+s.wires.files.Addr().String()+"/flat")
	if err != nil {
		return nil, err
	}
	defer stop()
	c.mark(ready)
	root, err := bench.Mount(ctx, socket, dir, b.readAhead)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	c.mark(mounted)
	return s.answer(ctx, root, s.load, c)
}

// serveNBDKit starts nbdkit's curl plugin on a unix socket, and returns once it
// is ready.
func serveNBDKit(ctx context.Context, socket string, args []string, url string) (stop func(), err error) {
	var said bytes.Buffer
	pid := socket + ".pid"
	cmd := exec.Command(nbdkit.Name, append([]string{"-f", "-r", "-U", socket, "-P", pid}, append(args, "url="+url)...)...)
	cmd.Stderr = &said
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(socket))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	stop = func() {
		cmd.Process.Kill() // fails only if it has ended
		<-ended
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(pid); err == nil && len(b) > 0 {
			return stop, nil
		}
		select {
		case <-ended:
			return nil, fmt.Errorf("%s ended: %s", bench.Command(cmd), bytes.TrimSpace(said.Bytes()))
		case <-ctx.Done():
			stop()
			return nil, fmt.Errorf("%s: %w", bench.Command(cmd), ctx.Err())
		case <-tick.C:
		}
	}
}
