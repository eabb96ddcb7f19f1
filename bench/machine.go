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

// Machine is what figures come from.
type Machine struct {
	CPU    string
	Cores  int
	Memory int64 // bytes
	Kernel string
	Load   string // average of the last minute, before the benchmark began
	Date   time.Time
}

// ThisMachine looks.
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

// cpuModel finds the processor in /proc/cpuinfo, which names it on some
// architectures and numbers it on all.
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
	Package string   // that has it in Debian
	Version []string // arguments that make it say its version; nil: it is not asked
}

// Need says in one sentence what a benchmark lacks to run: root, or programs.
func Need(programs ...Program) error {
	if os.Geteuid() != 0 {
		return errors.New("this benchmark needs root: it unpacks and mounts images")
	}
	var missing, packages []string
	for _, p := range programs {
		if _, err := exec.LookPath(p.Name); err != nil {
			missing = append(missing, p.Name)
			packages = append(packages, p.Package)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("this benchmark lacks %s: apt-get install %s", strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	return nil
}

// Versions are facts for a header: what the programs say that they are.
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
