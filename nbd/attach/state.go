package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// State is what must be known to find a node again: for the process that goes on serving
// it after its server was killed, and for the one that removes it. It is small, and
// means the same after it was kept as JSON.
type State struct {
	Driver   Driver `json:"driver"`
	Path     string `json:"path"`    // /dev/ublkb0
	Number   uint32 `json:"number"`  // of the node among those of its driver
	PID      int    `json:"pid"`     // the process that served it last
	Started  uint64 `json:"started"` // when it began, in ticks since the boot: a later process may have its ID
	Boot     string `json:"boot"`    // of the machine: no node outlives it
	Token    string `json:"token"`   // tells the node from a later one with the same number
	Size     int64  `json:"size"`    // in bytes
	ReadOnly bool   `json:"readonly"`
	Queues   int    `json:"queues,omitempty"` // queues of ublk, connections of nbd
	Task     uint32 `json:"task,omitempty"`   // of a node of nbd by ioctl: the thread that holds it
}

// maxState bounds what ParseState reads.
const maxState = 4096

// ParseState reads what State.Encode has written, without trusting it.
func ParseState(text []byte) (State, error) {
	var s State
	if len(text) > maxState {
		return s, fmt.Errorf("state of a node: it has %d bytes, of at most %d", len(text), maxState)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return State{}, fmt.Errorf("state of a node: %w", err)
	}
	if d.More() {
		return State{}, errors.New("state of a node: something follows it")
	}
	return s, s.check()
}

// Encode returns s as one line of JSON.
func (s State) Encode() []byte {
	text, err := json.Marshal(s)
	if err != nil {
		panic(err) // it has only strings and numbers
	}
	return append(text, '\n')
}

// paths are where the nodes of the drivers are.
var paths = map[Driver]string{UBLK: "/dev/ublkb", NBD: "/dev/nbd", FUSE: "/dev/loop"}

func nodePath(d Driver, number uint32) string { return fmt.Sprint(paths[d], number) }

// check fails where s cannot be of a node.
func (s State) check() error {
	switch {
	case paths[s.Driver] == "":
		return fmt.Errorf("state of a node: unknown driver %q", s.Driver)
	case s.Number > 1<<20 || s.Path != nodePath(s.Driver, s.Number):
		return fmt.Errorf("state of a node: the path %q is not that of %s number %d", s.Path, s.Driver, s.Number)
	case s.Task != 0 && s.Driver != NBD:
		return fmt.Errorf("state of a node: a node of %s has no task", s.Driver)
	case s.Size <= 0 || s.PID <= 0 || s.Queues < 0 || s.Queues > maxUserQueue || len(s.Token) < 16 || len(s.Token) > 63 || s.Boot == "":
		return errors.New("state of a node: a value is missing or out of range")
	}
	return nil
}

// Outlives reports whether the node outlives its server: its readers and writers wait, and
// another process can go on serving it. The requests of the other nodes fail.
func (s State) Outlives() bool { return s.Driver == UBLK || s.Driver == NBD && s.Task == 0 }

// here fails with ErrGone where the machine has booted since.
func (s State) here() error {
	if err := s.check(); err != nil {
		return err
	}
	if s.Boot != bootID() {
		return fmt.Errorf("%s: the machine has booted since it was attached: %w", s.Path, ErrGone)
	}
	return nil
}

// bootID tells one boot of the machine from another.
func bootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown" // without /proc; the token and the process ID still protect
	}
	return strings.TrimSpace(string(text))
}

// serve makes this process the one that serves the node.
func (s *State) serve() {
	s.PID = os.Getpid()
	s.Started, _ = processStart(s.PID)
}

// served reports whether the process that served the node last is still there.
func (s State) served() bool {
	started, ok := processStart(s.PID)
	return ok && started == s.Started
}

// waitUnserved waits until the process that served the node last is gone.
func (s State) waitUnserved(ctx context.Context) error {
	for s.served() {
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// processStart is when a process began, in ticks since the boot; ok is false where it has
// ended. See proc_pid_stat(5).
func processStart(pid int) (ticks uint64, ok bool) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The name, in parentheses, can contain anything.
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	const state, start = 0, 19
	if len(f) <= start || f[state] == "Z" || f[state] == "X" {
		return 0, false
	}
	ticks, err = strconv.ParseUint(f[start], 10, 64)
	return ticks, err == nil
}
