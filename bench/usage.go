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

// Usage is what a process used, with the children that it waited for.
type Usage struct {
	Wall, User, Sys time.Duration
	// PeakRSS is the largest resident set of any process of the tree, in bytes.
	// It is at least that of this process when it started the other: Linux also
	// counts what a process had before exec.
	PeakRSS int64
	// Others is the processor time that the rest of the machine used meanwhile.
	// A round with much of it is suspect.
	Others time.Duration
}

// Units of the measures of a Usage.
const (
	Wall   = "ns/op"
	User   = "user-ns"
	Sys    = "sys-ns"
	CPU    = "cpu-ns" // user and system
	RSS    = "peak-RSS-B"
	Others = "others-cpu-ns"
)

// Measures returns u for a [Recorder].
func (u Usage) Measures() []Measure {
	return []Measure{
		{float64(u.Wall), Wall}, {float64(u.User), User}, {float64(u.Sys), Sys}, {float64(u.User + u.Sys), CPU},
		{float64(u.PeakRSS), RSS}, {float64(u.Others), Others},
	}
}

// Then returns the usage of u followed by v.
func (u Usage) Then(v Usage) Usage {
	return Usage{u.Wall + v.Wall, u.User + v.User, u.Sys + v.Sys, max(u.PeakRSS, v.PeakRSS), u.Others + v.Others}
}

// Run runs a command to its end. Its error contains the end of stderr, unless
// cmd.Stderr is set.
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

// usageOf returns what the kernel counted for a process that has ended.
func usageOf(p *os.ProcessState, wall time.Duration) Usage {
	u := Usage{Wall: wall, User: p.UserTime(), Sys: p.SystemTime()}
	if r, ok := p.SysUsage().(*syscall.Rusage); ok {
		u.PeakRSS = r.Maxrss << 10
	}
	return u
}

// Output runs a command to its end, and returns its stdout without leading and
// trailing space.
func Output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout = &out
	_, err := Run(cmd)
	return strings.TrimSpace(out.String()), err
}

// Command formats a command as a shell would accept it.
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

// dieWithUs makes the kernel kill the child when this process ends.
func dieWithUs(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}

// busyTime returns the processor time that the machine has used so far; see
// proc(5).
func busyTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return parseBusy(line)
}

// parseBusy sums user, nice, system, irq and softirq of a line of /proc/stat. It
// leaves out idle, iowait and steal, and guest, which user contains.
func parseBusy(line string) (time.Duration, error) {
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat: the first line is %q, not the one of all processors", line)
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

// tail keeps the last tailBytes that were written to it.
type tail struct{ b []byte }

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - tailBytes; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

// lines returns the bytes for the end of an error: after a line break, or empty.
func (t *tail) lines() string {
	if s := strings.TrimSpace(string(t.b)); s != "" {
		return "\n" + s
	}
	return ""
}
