package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"thaw/cmd/thaw/internal/host/api"
)

// This file starts a server in the background for commands that need one. It serves nodes
// only, and ends when nobody has used it for a short while: nobody has to stop it.

const (
	serverLog = "serve.log"  // its log, in the cache directory
	startLock = "start.lock" // held by the command that starts a server
	maxLog    = 4 << 20      // a longer log is renamed to serve.log.old before a start
	// startTime bounds the start of a server, and the wait for one that is ending.
	startTime = 45 * time.Second
)

// exitUnused is when a server ends that nobody uses. Tests lower it.
var exitUnused = 2 * time.Second

// withServer calls do with a client of the server that uses a cache directory, and starts a
// server if there is none. do may be called again if that server was about to end.
func (a *app) withServer(ctx context.Context, cache string, zone *zoneFlags, do func(*api.Client) error) error {
	log, err := a.log()
	if err != nil {
		return err
	}
	client, err := control(cache)
	if err != nil {
		return err
	}
	defer client.Close()
	started := false
	for end := time.Now().Add(startTime); ; {
		st, err := client.Status(ctx)
		if err == nil {
			if !started && (len(a.insecure) > 0 || a.hosts != "" || a.platform != defaultPlatform || zone.set()) {
				log.Warn("a server runs already: it uses its own --plain-http, --hosts, --platform and --zone", "pid", st.PID)
			}
			err = do(client)
			if api.Unknown(err) {
				return fmt.Errorf("the server with the cache %s (process %d) is thaw %s, which attaches no nodes: stop it, or pass another --cache", client.Dir(), st.PID, st.Version)
			}
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, api.ErrNoServer):
			if err := a.startServer(ctx, client, zone); err != nil {
				return err
			}
			started = true
		case api.IsStopping(err):
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return err
			}
		default:
			return err
		}
		if time.Now().After(end) {
			return err
		}
	}
}

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// startServer starts a server in the background, unless another command does, and returns
// when a server answers.
func (a *app) startServer(ctx context.Context, client *api.Client, zone *zoneFlags) error {
	log, err := a.log()
	if err != nil {
		return err
	}
	cache := client.Dir()
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return fmt.Errorf("start a server: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(cache, startLock))
	if err != nil {
		return fmt.Errorf("start a server: %w", err)
	}
	defer unlock()
	if _, err := client.Status(ctx); !errors.Is(err, api.ErrNoServer) {
		return nil // another command has started one, or withServer says what is wrong
	}
	pid, err := a.spawnServer(ctx, cache, zone)
	if err == nil {
		log.Info("started a server in the background, which ends with its last node", "pid", pid, "log", filepath.Join(cache, serverLog))
		return nil
	}
	// A server that somebody else has started is not ready yet, or one is ending.
	if strings.Contains(err.Error(), "in use by another process") {
		for end := time.Now().Add(startTime); time.Now().Before(end); {
			if _, e := client.Status(ctx); !errors.Is(e, api.ErrNoServer) {
				return nil
			}
			if pid, e := a.spawnServer(ctx, cache, zone); e == nil {
				log.Info("started a server in the background, which ends with its last node", "pid", pid, "log", filepath.Join(cache, serverLog))
				return nil
			}
			if err := sleep(ctx, 200*time.Millisecond); err != nil {
				return err
			}
		}
	}
	return err
}

// lockFile waits for the lock on a file.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(startTime); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR || time.Now().After(end) {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			f.Close()
			return nil, err
		}
	}
}

// spawnServer starts a server in a process of its own, and returns when it is ready.
func (a *app) spawnServer(ctx context.Context, cache string, zone *zoneFlags) (pid int, err error) {
	exe, err := os.Executable()
	if err != nil {
		return 0, fmt.Errorf("start a server: %w", err)
	}
	args, err := a.serverArgs(cache, zone)
	if err != nil {
		return 0, err
	}
	logged, begin, err := openServerLog(filepath.Join(cache, serverLog))
	if err != nil {
		return 0, fmt.Errorf("log of the server: %w", err)
	}
	defer logged.Close()
	ready, w, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("start a server: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command(exe, args...)
	cmd.Dir = "/" // so that it keeps no directory from being unmounted
	cmd.Stdout, cmd.Stderr = w, logged
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "LISTEN_")
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no signal of this terminal reaches it
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, fmt.Errorf("start a server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })
	defer stop()
	_ = ready.SetReadDeadline(time.Now().Add(startTime))
	line, err := bufio.NewReader(ready).ReadString('\n')
	if err == nil && strings.HasPrefix(line, "ready:") {
		pid := cmd.Process.Pid
		return pid, cmd.Process.Release()
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return 0, fmt.Errorf("start a server: %s; see %s", lastLine(logged, begin), logged.Name())
}

// serverArgs are the arguments of a server in the background: the flags of this command
// that are about registries, the zone and logs are its own.
func (a *app) serverArgs(cache string, zone *zoneFlags) ([]string, error) {
	args := []string{"serve", "--nodes-only", "--exit-unused", exitUnused.String(), "--cache", cache, "--log-format", a.logFormat, "--platform", a.platform}
	if a.verbose {
		args = append(args, "--verbose")
	}
	for _, h := range a.insecure {
		args = append(args, "--plain-http", h)
	}
	if a.hosts != "" {
		hosts, err := filepath.Abs(a.hosts)
		if err != nil {
			return nil, err
		}
		args = append(args, "--hosts", hosts)
	}
	more, err := zone.args()
	if err != nil {
		return nil, err
	}
	return append(args, more...), nil
}

// openServerLog opens the log of a server to append to it, at begin.
func openServerLog(path string) (f *os.File, begin int64, err error) {
	if fi, err := os.Lstat(path); err == nil && fi.Size() > maxLog {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, 0, err
		}
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// lastLine is why a server has ended: the last line of its log that says so.
func lastLine(f *os.File, begin int64) string {
	text, err := io.ReadAll(io.NewSectionReader(f, begin, maxLog))
	if err != nil {
		return err.Error()
	}
	last := "it has ended without a word"
	for line := range bytes.Lines(text) {
		if s := strings.TrimSpace(string(line)); s != "" && !strings.HasPrefix(s, "See '") {
			last = strings.TrimPrefix(s, "thaw: ")
		}
	}
	return last
}
