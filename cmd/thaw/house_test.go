package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Imports go down only: blockmap imports nothing of ours, what stands on it imports
// it and its own parents, siblings do not import each other. host wires them to one
// host's thaw; cmd sits on top of host, and bench and scripts beside cmd. The imports
// are parsed here and now: what `go list` says comes from the test cache.
func TestImportsGoDown(t *testing.T) {
	root := filepath.Join("..", "..")
	seen := 0
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(file, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		dir := path.Dir(filepath.ToSlash(rel))
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			imported, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			ours, ok := strings.CutPrefix(imported, "thaw/")
			if !ok {
				continue
			}
			seen++
			if !mayImport(dir, ours, strings.HasSuffix(file, "_test.go")) {
				t.Errorf("%s imports %s", rel, imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen == 0 {
		t.Error("no import was found: this tests nothing")
	}
}

// The rule of the house in examples.
func TestMayImport(t *testing.T) {
	for _, c := range []struct {
		dir, ours  string
		test, want bool
	}{
		{"cmd/thaw", "cmd/thaw/internal/host", false, true},
		{"cmd/thaw", "tracefile/plot", false, true},
		{"cmd/thaw/internal/host", "nbd", false, true},
		{"cmd/thaw/internal/host", "fetcher/registry", false, true},
		{"cmd/thaw/internal/host", "nbd/attach", false, true},
		{"cmd/thaw/internal/host", "nbd/vhost", false, true},
		{"cmd/thaw/internal/host/api", "nbd/attach", false, false},
		{"nbd", "nbd/attach", false, false},
		{"nbd/vhost", "nbd/internal/lines", false, true},
		{"nbd/vhost", "nbd/internal/lifecycle", false, true},
		{"nbd/attach", "nbd/internal/inline", false, true},
		{"cmd/thaw/internal/host", "nbd/internal/lifecycle", false, false},
		{"cmd/thaw/internal/host", "cmd/thaw", false, false},
		{"cmd/thaw/internal/host", "bench", false, false},
		{"cmd/thaw/internal/host", "tracefile/plot", false, false},
		{"cmd/thaw/internal/host", "blockmap/ext4", false, false},
		{"cmd/thaw/internal/host", "blockmap/blocktest", false, false},
		{"cmd/thaw/internal/host", "blockmap/blocktest", true, true},
		{"cmd/thaw/internal/host/api", "cmd/thaw/internal/host", false, true},
		{"cmd/thaw/internal/host/api", "fetcher", false, false},
		{"cmd/thaw/internal/host/api", "cmd/thaw", false, false},
		{"cmd/thaw/internal/host", "cmd/thaw/internal/host/api", false, false},
		{"bench/cold", "cmd/thaw/internal/host", false, false},
		{"fetcher", "cmd/thaw/internal/host", false, false},
		{"fetcher", "nbd", false, false},
		{"fetcher/registry", "fetcher", false, true},
		{"fetcher/zone", "fetcher", false, true},
		{"fetcher/zone", "fetcher/registry", false, false},
		{"fetcher", "fetcher/zone", false, false},
		{"cmd/thaw/internal/host", "fetcher/zone", false, true},
		{"nbd", "blockmap", false, true},
		{"blockmap", "nbd", false, false},
		{"blockmap", "blockmap/uring", false, true},
		{"blockmap", "blockmap/race", false, true},
		{"tracefile", "blockmap/race", false, true},
		{"tracefile", "blockmap/flatten", false, false},
		{"blockmap/flatten", "blockmap/ext4", false, true},
	} {
		if got := mayImport(c.dir, c.ours, c.test); got != c.want {
			t.Errorf("%s may import %s (in a test: %v): %v", c.dir, c.ours, c.test, got)
		}
	}
}

// mayImport says whether a file in folder dir may import folder ours.
func mayImport(dir, ours string, test bool) bool {
	top, _, _ := strings.Cut(dir, "/")
	switch {
	case dir == "cmd/thaw/internal/host":
		return slices.Contains([]string{"blockmap", "blockmap/flatten", "fetcher", "fetcher/registry", "fetcher/zone", "tracefile", "nbd", "nbd/attach", "nbd/vhost"}, ours) ||
			test && ours == "blockmap/blocktest"
	case dir == "cmd/thaw/internal/host/api":
		return slices.Contains([]string{"cmd/thaw/internal/host", "fetcher/registry", "nbd"}, ours) ||
			test && (ours == "blockmap" || strings.HasPrefix(ours, "blockmap/") || ours == "tracefile")
	case dir == "cmd/thaw" && strings.HasPrefix(ours, "cmd/thaw/internal/"):
		return true
	case top == "cmd", top == "bench", top == "scripts":
		return !strings.HasPrefix(ours, "cmd/")
	}
	switch {
	case ours == "blockmap":
		return dir != "blockmap" || test
	case ours == "blockmap/blocktest":
		return test
	case ours == "blockmap/uring", ours == "blockmap/race":
		return true // they import nothing of ours, like golang.org/x/sys
	case strings.HasPrefix(ours, "nbd/internal/"):
		return top == "nbd" // they import blockmap at most
	}
	// A child may import its parent and, below blockmap, its sisters that
	// are less than it: flatten puts layers into an ext4.
	return strings.HasPrefix(dir, ours+"/") || dir == "blockmap/flatten" && ours == "blockmap/ext4" || dir == ours && test
}
