package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup bounds the memory of programs, including what the page cache keeps of the files
// that they read first.
type Cgroup struct{ dir string }

// NewCgroup makes a cgroup with a limit of that many bytes of memory, of version 2 where
// the kernel has its memory controller there, otherwise of version 1.
func NewCgroup(name string, limit int64) (*Cgroup, error) {
	return newCgroup("/sys/fs/cgroup", name, limit)
}

func newCgroup(root, name string, limit int64) (*Cgroup, error) {
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	v2 := err == nil && strings.Contains(" "+strings.TrimSpace(string(controllers))+" ", " memory ")
	g := &Cgroup{dir: filepath.Join(root, "memory", name)}
	settings := [][2]string{{"memory.limit_in_bytes", strconv.FormatInt(limit, 10)}}
	if v2 {
		g.dir = filepath.Join(root, name)
		settings = [][2]string{{"memory.max", strconv.FormatInt(limit, 10)}, {"memory.swap.max", "0"}}
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", name, err)
		}
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("no cgroup with a memory controller: %w", err)
	}
	for _, s := range settings {
		err := os.WriteFile(filepath.Join(g.dir, s[0]), []byte(s[1]), 0)
		if errors.Is(err, os.ErrNotExist) && s[0] == "memory.swap.max" {
			continue // a kernel without swap
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("cgroup %s: %w", name, err), os.Remove(g.dir))
		}
	}
	return g, nil
}

// Args returns the arguments that start a program within the cgroup. The process is the
// program's own. A nil cgroup bounds nothing.
func (g *Cgroup) Args(args ...string) []string {
	if g == nil {
		return args
	}
	return append([]string{"sh", "-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(g.dir, "cgroup.procs")}, args...)
}

// Close removes the cgroup, in which no process is left.
func (g *Cgroup) Close() error {
	if g == nil {
		return nil
	}
	err := error(unix.EBUSY) // while the kernel cleans up behind a process
	for end := time.Now().Add(time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		err = os.Remove(g.dir)
	}
	return err
}

// DropCaches empties the kernel's page cache, as far as nobody has its pages mapped.
func DropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
