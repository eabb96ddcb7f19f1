package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Machine describes where figures were measured.
type Machine struct {
	CPU    string
	Cores  int
	Memory int64 // bytes
	Kernel string
	Load   string // load average of the minute before the benchmark
	Date   time.Time
}

// ThisMachine describes the machine that this program runs on.
func ThisMachine() (Machine, error) {
	m := Machine{Cores: runtime.NumCPU(), Date: time.Now()}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	m.CPU = cpuModel(string(info))
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return m, err
	}
	if m.Memory, err = memTotal(string(mem)); err != nil {
		return m, err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return m, err
	}
	m.Load, _, _ = strings.Cut(string(load), " ")
	return m, nil
}

// cpuModel finds the processor in /proc/cpuinfo, which has a name for it on some
// architectures only.
func cpuModel(info string) string {
	values := make(map[string]string)
	for line := range strings.Lines(info) {
		k, v, _ := strings.Cut(line, ":")
		if k = strings.TrimSpace(k); values[k] == "" {
			values[k] = strings.TrimSpace(v)
		}
	}
	name := values["model name"]
	if name == "" {
		name = "unknown " + runtime.GOARCH
	}
	if values["cpu family"] != "" {
		name += fmt.Sprintf(" (family %s, model %s)", values["cpu family"], values["model"])
	}
	return name
}

func memTotal(info string) (int64, error) {
	for line := range strings.Lines(info) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "MemTotal:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/meminfo: %w", err)
			}
			return kb << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemTotal")
}

// Program is a program that a benchmark needs.
type Program struct {
	Name    string
	Package string   // Debian package that contains it
	Version []string // arguments that make it print its version; nil: it is not recorded
}

// Need returns an error that says what a benchmark lacks: root, or programs.
func Need(programs ...Program) error {
	if os.Geteuid() != 0 {
		return errors.New("this benchmark requires root: it unpacks and mounts images")
	}
	var missing, packages []string
	for _, p := range programs {
		if _, err := exec.LookPath(p.Name); err != nil {
			missing = append(missing, p.Name)
			packages = append(packages, p.Package)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("this benchmark requires %s: apt-get install %s", strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	return nil
}

// Versions returns the first line that each program prints about its version.
func Versions(ctx context.Context, programs ...Program) ([]Fact, error) {
	var facts []Fact
	for _, p := range programs {
		if p.Version == nil {
			continue
		}
		out, err := exec.CommandContext(ctx, p.Name, p.Version...).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("version of %s: %w", p.Name, err)
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		facts = append(facts, Fact{p.Name, line})
	}
	return facts, nil
}
