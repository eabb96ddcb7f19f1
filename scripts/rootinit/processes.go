package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// processes are those that this process has started, and all others that have lost their parent: the first process is told when
// they end.
type processes struct {
	mu struct {
		sync.Mutex
		running map[int]*process
		changed chan struct{} // closed, and made anew, when children have ended
		ending  bool          // no more processes are started
	}
}

// A process is one that was started here.
type process struct {
	pid    int
	ended  chan struct{}
	status string // valid when ended is closed
}

func newProcesses() *processes {
	ps := &processes{}
	ps.mu.running = make(map[int]*process)
	ps.mu.changed = make(chan struct{})
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGCHLD)
	go func() {
		for range c {
			ps.collect()
		}
	}()
	return ps
}

// collect takes note of all that have ended. One signal may stand for several of them. It reports whether none is left.
func (ps *processes) collect() bool {
	ps.mu.Lock() // a process that is being started has its entry first
	defer ps.mu.Unlock()
	defer func() {
		close(ps.mu.changed)
		ps.mu.changed = make(chan struct{})
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return err == syscall.ECHILD
		}
		if p := ps.mu.running[pid]; p != nil {
			delete(ps.mu.running, pid)
			p.status = describe(status)
			close(p.ended)
		}
	}
}

func describe(s syscall.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("signal %d (%v)", int(s.Signal()), s.Signal())
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}

// failedProcess stands for one that could not be started. Its status is that of a shell that finds no program.
func failedProcess() *process {
	p := &process{ended: make(chan struct{}), status: "exit status 127"}
	close(p.ended)
	return p
}

var errEnding = errors.New("the machine ends")

// start starts a command in a session of its own.
func (ps *processes) start(c command) (*process, error) {
	path, err := c.find()
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{Dir: c.dir, Env: c.env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{
		Setsid:     true,
		Credential: &syscall.Credential{Uid: c.account.uid, Gid: c.account.gid, Groups: c.account.groups},
	}}
	if c.tty != nil {
		fd := c.tty.Fd()
		attr.Files = []uintptr{fd, fd, fd}
		attr.Sys.Setctty = true // it is 0 in the child
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		defer null.Close()
		attr.Files[0] = null.Fd()
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.mu.ending {
		return nil, errEnding
	}
	pid, err := syscall.ForkExec(path, c.args, attr)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	p := &process{pid: pid, ended: make(chan struct{})}
	ps.mu.running[pid] = p
	return p, nil
}

// signal does nothing if p has ended.
func (p *process) signal(s syscall.Signal) {
	select {
	case <-p.ended:
	default:
		_ = syscall.Kill(p.pid, s)
	}
}

// endAll asks all processes to end, and kills those that have not after limit. Shells ignore SIGTERM, and end with their
// terminal.
func (ps *processes) endAll(limit time.Duration) {
	ps.mu.Lock()
	ps.mu.ending = true
	ps.mu.Unlock()
	_ = syscall.Kill(-1, syscall.SIGTERM)
	_ = syscall.Kill(-1, syscall.SIGHUP)
	_ = syscall.Kill(-1, syscall.SIGCONT)
	if !ps.gone(limit) {
		_ = syscall.Kill(-1, syscall.SIGKILL)
		ps.gone(limit)
	}
}

func (ps *processes) areEnding() bool {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.mu.ending
}

// gone waits until no process is left, and reports whether that was in time.
func (ps *processes) gone(limit time.Duration) bool {
	end := time.Now().Add(limit)
	for !ps.collect() {
		ps.mu.Lock()
		changed := ps.mu.changed
		ps.mu.Unlock()
		// One that has ended before changed was read is seen by the next collect.
		if !wait(changed, min(time.Until(end), 100*time.Millisecond)) && time.Now().After(end) {
			return false
		}
	}
	return true
}
