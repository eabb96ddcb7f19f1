package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Usage is what a process took, with the children that it waited for.
type Usage struct {
	Wall, User, Sys time.Duration
	// PeakRSS is the most bytes that one process of the tree had resident. It
	// is at least what this process itself had when it started the other:
	// Linux counts what a process was before exec.
	PeakRSS int64
	// Others is processor time that everything else on the machine took
	// meanwhile: what makes a round suspect.
	Others time.Duration
}

// Units of the measures that a Usage has.
const (
	Wall   = "ns/op"
	User   = "user-ns"
	Sys    = "sys-ns"
	CPU    = "cpu-ns" // user and system
	RSS    = "peak-RSS-B"
	Others = "others-cpu-ns"
)

// Measures are for a [Recorder].
func (u Usage) Measures() []Measure {
	return []Measure{
		{float64(u.Wall), Wall}, {float64(u.User), User}, {float64(u.Sys), Sys}, {float64(u.User + u.Sys), CPU},
		{float64(u.PeakRSS), RSS}, {float64(u.Others), Others},
	}
}

// Then is the usage of u followed by v.
func (u Usage) Then(v Usage) Usage {
	return Usage{u.Wall + v.Wall, u.User + v.User, u.Sys + v.Sys, max(u.PeakRSS, v.PeakRSS), u.Others + v.Others}
}

// Run runs a command to its end. The error of one that fails has what it
// said last on stderr, unless that goes elsewhere.
func Run(cmd *exec.Cmd) (Usage, error) {
	var said tail
	if cmd.Stderr == nil {
		cmd.Stderr = &said
	}
	dieWithUs(cmd)
	busy, err := busyTime()
	if err != nil {
		return Usage{}, err
	}
	self, err := selfTime()
	if err != nil {
		return Usage{}, err
	}
	began := time.Now()
	err = cmd.Run()
	wall := time.Since(began)
	if err != nil {
		return Usage{}, fmt.Errorf("%s: %w%s", Command(cmd), err, said.lines())
	}
	u := usageOf(cmd.ProcessState, wall)
	busyAfter, err := busyTime()
	if err != nil {
		return Usage{}, err
	}
	selfAfter, err := selfTime()
	if err != nil {
		return Usage{}, err
	}
	u.Others = max(0, busyAfter-busy-(selfAfter-self)-u.User-u.Sys)
	return u, nil
}

// usageOf reads what the kernel says of a process that has ended.
func usageOf(p *os.ProcessState, wall time.Duration) Usage {
	u := Usage{Wall: wall, User: p.UserTime(), Sys: p.SystemTime()}
	if r, ok := p.SysUsage().(*syscall.Rusage); ok {
		u.PeakRSS = r.Maxrss << 10
	}
	return u
}

// Output runs a command to its end and returns its stdout without space at
// the ends.
func Output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout = &out
	_, err := Run(cmd)
	return strings.TrimSpace(out.String()), err
}

// Command is a command as one would type it.
func Command(cmd *exec.Cmd) string {
	words := make([]string, len(cmd.Args))
	for i, a := range cmd.Args {
		words[i] = a
		if i == 0 {
			words[i] = filepath.Base(a)
		} else if a == "" || strings.ContainsAny(a, " \t\n'\"\\$&|;<>*?(){}[]#~`!") {
			words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

// dieWithUs makes a child end when this process is killed.
func dieWithUs(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}

// busyTime is the processor time that the machine has spent on anything,
// proc(5).
func busyTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return parseBusy(line)
}

// parseBusy sums user, nice, system, irq and softirq of a line of /proc/stat:
// not idle, iowait, what was stolen, nor guest, which user has already.
func parseBusy(line string) (time.Duration, error) {
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(fields[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / userHz), nil
}

// userHz is the unit of times in /proc on every Linux that Go runs on.
const userHz = 100

func selfTime() (time.Duration, error) {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0, err
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), nil
}

// tail keeps the last of what is written to it.
type tail struct{ b []byte }

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - tailBytes; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

// lines is what was said, for the end of an error.
func (t *tail) lines() string {
	if s := strings.TrimSpace(string(t.b)); s != "" {
		return "\n" + s
	}
	return ""
}
