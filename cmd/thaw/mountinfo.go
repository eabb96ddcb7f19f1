package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// mountPoint is a mount of the mount namespace of this process, see proc_pid_mountinfo(5).
type mountPoint struct {
	dir    string
	source string // such as /dev/loop0
	device string // MAJOR:MINOR
	fsType string
}

// mountedAt returns the uppermost mount at a path, which is absolute and clean. It does not
// touch the path, which may be that of a mount whose reads fail or wait.
func mountedAt(dir string) (m mountPoint, ok bool, err error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return m, false, fmt.Errorf("list the mounts: %w", err)
	}
	for _, x := range parseMountInfo(text) {
		if x.dir == dir {
			m, ok = x, true // later mounts are on top
		}
	}
	return m, ok, nil
}

// parseMountInfo reads the lines that it understands.
func parseMountInfo(text []byte) (all []mountPoint) {
	for line := range bytes.Lines(text) {
		before, after, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		f, g := strings.Split(before, " "), strings.Split(after, " ")
		if !ok || len(f) < 6 || len(g) < 2 {
			continue
		}
		all = append(all, mountPoint{dir: unescapeMount(f[4]), source: unescapeMount(g[1]), device: f[2], fsType: g[0]})
	}
	return all
}

// unescapeMount undoes what the kernel does to spaces, tabs, newlines and backslashes.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1:i+4]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '7' {
			return false
		}
	}
	return s[0] <= '3'
}
