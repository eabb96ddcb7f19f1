package main

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// A flag's help names what it takes, such as DIR; the name of a Go type says nothing.
func TestFlagsNameTheirValues(t *testing.T) {
	root := rootCommand(&app{})
	for _, c := range commands(root) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			name, _ := pflag.UnquoteUsage(f)
			if f.Value.Type() != "bool" && name != strings.ToUpper(name) {
				t.Errorf("%s --%s takes a %q: name the value in the usage, in backquotes and capitals", c.CommandPath(), f.Name, name)
			}
		})
	}
}

// The commands and flags that the documents show are there.
func TestDocumentsShowWhatExists(t *testing.T) {
	root := rootCommand(&app{})
	known := map[string]bool{"version": true, "help": true}
	for _, c := range commands(root) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) { known[f.Name] = true })
	}
	for _, file := range []string{"README.md", filepath.Join("..", "..", "README.md")} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		checkDocument(t, root, known, string(b))
	}
}

func checkDocument(t *testing.T, root *cobra.Command, known map[string]bool, text string) {
	for _, m := range regexp.MustCompile("`--([a-z-]+)").FindAllStringSubmatch(text, -1) {
		if !known[m[1]] {
			t.Errorf("there is no --%s", m[1])
		}
	}
	var fenced []string
	for i, part := range strings.Split(text, "\n```") {
		if i%2 == 1 {
			fenced = append(fenced, part)
		}
	}
	for _, m := range regexp.MustCompile("(?m)^thaw .*").FindAllString(strings.Join(fenced, "\n"), -1) {
		line, _, _ := strings.Cut(m, "#")
		c, args, err := root.Find(strings.Fields(line)[1:])
		if err != nil || c == root {
			t.Errorf("%s: there is no such command: %v", line, err)
			continue
		}
		checkFlags(t, c, line, args)
	}
}

// checkFlags checks that c has the flags of a line.
func checkFlags(t *testing.T, c *cobra.Command, line string, args []string) {
	for _, a := range args {
		name, long := strings.CutPrefix(a, "--")
		if name, _, _ = strings.Cut(name, "="); long && c.Flags().Lookup(name) == nil && c.InheritedFlags().Lookup(name) == nil {
			t.Errorf("%s: %s has no %s", line, c.CommandPath(), a)
		}
	}
}

// Links in documents lead to files and headings that there are.
func TestLinksLeadSomewhere(t *testing.T) {
	root := filepath.Join("..", "..")
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == ".git" {
			return filepath.SkipDir
		}
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".md" {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) < 6 {
		t.Fatalf("%d documents: %v", len(files), err)
	}
	links := 0
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(string(b), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			if err := follow(file, m[1]); err != nil {
				t.Errorf("%s: (%s): %v", file, m[1], err)
			}
		}
	}
	if links == 0 {
		t.Error("no document has a link")
	}
}

// follow checks a link of a document to a file, a heading, or both.
func follow(file, link string) error {
	path, anchor, _ := strings.Cut(link, "#")
	if path == "" {
		path = file
	} else {
		path = filepath.Join(filepath.Dir(file), path)
	}
	if _, err := os.Stat(path); err != nil || anchor == "" {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	headings := make(map[string]bool)
	for _, h := range regexp.MustCompile(`(?m)^#+ +(.*)$`).FindAllStringSubmatch(string(b), -1) {
		// As GitHub makes anchors of headings.
		h := strings.ReplaceAll(strings.ToLower(strings.TrimSpace(h[1])), " ", "-")
		headings[regexp.MustCompile(`[^\p{L}\p{N}_-]`).ReplaceAllString(h, "")] = true
	}
	if !headings[anchor] {
		return fmt.Errorf("there is no such heading, but: %s", strings.Join(slices.Sorted(maps.Keys(headings)), " "))
	}
	return nil
}
