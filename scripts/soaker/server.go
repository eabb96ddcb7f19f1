package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// server is a `thaw serve` that is ended and started again.
type server struct {
	thaw, cache, socket, log string
	args                     []string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// start returns once the server is ready.
func (s *server) start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	s.cmd = exec.Command(s.thaw, append([]string{"serve", "--listen", "unix:" + s.socket, "--cache", s.cache, "--json"}, s.args...)...)
	s.cmd.Stderr = f
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	ready := make(chan error, 1)
	go func() {
		_, err := bufio.NewReader(out).ReadBytes('\n')
		ready <- err
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	select {
	case err = <-ready:
	case <-time.After(5 * time.Minute):
		err = fmt.Errorf("not ready in five minutes")
	}
	if err != nil {
		s.cmd.Process.Kill()
		return fmt.Errorf("start thaw serve: %w", err)
	}
	return nil
}

func (s *server) signal(sig syscall.Signal) (done chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cmd.Process.Signal(sig)
	return s.done
}

func (s *server) kill() { <-s.signal(syscall.SIGKILL) }

// stop ends the server with SIGTERM. If the registry hangs, requests can still be in
// flight at the end of the grace period: then the exit code is 1.
func (s *server) stop(calm bool) error {
	done := s.signal(syscall.SIGTERM)
	select {
	case <-done:
	case <-time.After(time.Minute):
		s.signal(syscall.SIGQUIT)
		<-done
		return fmt.Errorf("thaw serve has not ended a minute after SIGTERM, with a grace of 3 s")
	}
	if s.err != nil && (calm || s.cmd.ProcessState.ExitCode() != 1) {
		return fmt.Errorf("thaw serve after SIGTERM: %w", s.err)
	}
	return nil
}

// torment kills, stops and reloads the server at random. It fails if the server ends
// by itself.
func (s *server) torment(ctx context.Context, rng *rand.Rand, t *tally) error {
	for {
		s.mu.Lock()
		done := s.done
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-done:
			return fmt.Errorf("thaw serve ended by itself: %s", s.cmd.ProcessState)
		case <-time.After(time.Duration(1000+rng.IntN(9000)) * time.Millisecond):
		}
		switch rng.IntN(5) {
		case 0, 1:
			s.kill()
			t.kills.Add(1)
		case 2:
			if err := s.stop(false); err != nil {
				return err
			}
			t.stops.Add(1)
		default:
			s.signal(syscall.SIGHUP)
			t.hups.Add(1)
			continue
		}
		if err := s.start(); err != nil {
			return err
		}
	}
}

// level is what a process uses.
type level struct{ goroutines, descriptors, mappings, kib int }

func (l *level) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %d mappings, %d MiB of memory", l.goroutines, l.descriptors, l.mappings, l.kib>>10)
}

// measure asks the server, and reads /proc.
func (s *server) measure() (*level, error) {
	c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(s.cache, "control.sock"))
	}}}
	resp, err := c.Get("http://thaw/v1/status")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Counts struct {
			Goroutines int `json:"goroutines"`
		} `json:"counts"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || answer.Counts.Goroutines == 0 {
		return nil, fmt.Errorf("the server does not tell its goroutines: %s", resp.Status)
	}
	l := &level{goroutines: answer.Counts.Goroutines}
	proc := filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid))
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return nil, err
	}
	l.descriptors = len(fds)
	maps, err := os.ReadFile(filepath.Join(proc, "maps"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(maps)) { // only those of the cache: the Go runtime's vary
		if strings.Contains(line, s.cache) {
			l.mappings++
		}
	}
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			if _, err := fmt.Sscan(rest, &l.kib); err != nil {
				return nil, fmt.Errorf("VmRSS of thaw serve: %w", err)
			}
		}
	}
	return l, nil
}

// settle waits until the server uses no more than before. If before is nil, it waits
// until the server has no mappings and then some seconds, and returns the baseline.
func (s *server) settle(ctx context.Context, before *level) (*level, error) {
	limit := &level{goroutines: 1 << 20, descriptors: 1 << 20, mappings: 0, kib: 1 << 30}
	if before != nil {
		// As much as before, give or take what pools keep.
		limit = &level{before.goroutines + 4, before.descriptors + 4, before.mappings, before.kib + 200<<10}
	}
	var l *level
	var err error
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end) && ctx.Err() == nil; {
		if l, err = s.measure(); err != nil {
			return nil, err
		}
		if l.goroutines <= limit.goroutines && l.descriptors <= limit.descriptors && l.mappings <= limit.mappings && l.kib <= limit.kib {
			if before != nil {
				return l, nil
			}
			// The baseline contains connections to the registry, which stay idle for a
			// minute and a half before they are closed.
			select {
			case <-time.After(8 * time.Second):
			case <-ctx.Done():
			}
			return s.measure()
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	s.signal(syscall.SIGQUIT) // prints its goroutines to the log
	return nil, fmt.Errorf("after five idle minutes the server has %v; the baseline is %v", l, before)
}

// showLog prints the end of the log.
func (s *server) showLog() {
	b, _ := os.ReadFile(s.log)
	log.Printf("the end of the log of thaw serve:\n%s", b[max(0, len(b)-20_000):])
}

// checkLog looks for panics, data races and the like.
func (s *server) checkLog() error {
	b, err := os.ReadFile(s.log)
	if err != nil {
		return err
	}
	for _, bad := range []string{"panic:", "fatal error:", "DATA RACE", "SIGBUS", "goroutine 1 ["} {
		if i := bytes.Index(b, []byte(bad)); i >= 0 {
			return fmt.Errorf("the log of thaw serve has %q:\n%s", bad, b[i:min(len(b), i+4000)])
		}
	}
	return nil
}
