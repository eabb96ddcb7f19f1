package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Imports go down only: blockmap imports nothing of ours, what stands on it
// imports it and its own children's parents, siblings do not know each other,
// and cmd and bench wire. The imports are parsed here and now: what `go list`
// says comes from the test cache.
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

// mayImport says whether a file in folder dir may import folder ours.
func mayImport(dir, ours string, test bool) bool {
	top, _, _ := strings.Cut(dir, "/")
	switch top {
	case "cmd", "bench", "scripts":
		return !strings.HasPrefix(ours, "cmd/")
	}
	switch {
	case ours == "blockmap":
		return dir != "blockmap" || test
	case ours == "blockmap/blocktest":
		return test
	}
	// A child may import its parent and, below blockmap, its sisters that
	// are less than it: flatten puts layers into an ext4.
	return strings.HasPrefix(dir, ours+"/") || dir == "blockmap/flatten" && ours == "blockmap/ext4" || dir == ours && test
}
