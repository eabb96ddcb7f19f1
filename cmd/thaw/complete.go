package main

import (
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// fixedValues are what flags of these names take.
var fixedValues = map[string][]string{
	"log-format":  {"text", "json"},
	"format":      {"fio", "blkparse"},
	"driver":      {"auto", "ublk", "nbd", "fuse"},
	"fetch-ahead": {"metadata", "readahead", "program", "none"},
	"platform":    {"linux/amd64", "linux/arm64", "linux/arm/v7", "linux/386", "linux/riscv64", "linux/ppc64le", "linux/s390x"},
	"listen":      {"unix:", "tcp:"},
	"zone-join":   {"dns:", "file:"},
}

// imageArgs are the commands whose arguments name images, and how many do; -1: all.
var imageArgs = map[string]int{
	"thaw build": 2, "thaw serve": -1, "thaw inspect": -1, "thaw verify": 1, "thaw attach": 1, "thaw mount": 1, "thaw trace push": 1, "thaw trace pack": 1,
}

// completions tells the shells what commands and flags below c take.
func completions(c *cobra.Command) {
	if n, ok := imageArgs[c.CommandPath()]; ok {
		c.ValidArgsFunction = func(c *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if n >= 0 && len(args) >= n {
				return nil, cobra.ShellCompDirectiveDefault // files, for trace push and pack
			}
			return completeImage(c, word)
		}
	}
	if c.Name() == "man" || c.Name() == "umount" {
		c.ValidArgsFunction = directories
	}
	add := func(f *pflag.Flag) {
		complete := func(c *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		values, fixed := fixedValues[f.Name]
		switch {
		case fixed:
			directive := cobra.ShellCompDirectiveNoFileComp
			if f.Name == "listen" || f.Name == "zone-join" {
				directive |= cobra.ShellCompDirectiveNoSpace
			}
			complete = cobra.FixedCompletions(values, directive)
		case f.Name == "image":
			complete = func(c *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
				return completeImage(c, word)
			}
		case f.Name == "cache" || f.Name == "temp" || f.Name == "vhost-user" || f.Name == "overlay" && c.Name() != "serve":
			complete = directories
		case f.Value.Type() == "bool" || takesFile[f.Name]:
			return
		}
		// It fails only for flags that c does not have, or that were registered.
		_ = c.RegisterFlagCompletionFunc(f.Name, complete)
	}
	c.LocalFlags().VisitAll(add)
	for _, sub := range c.Commands() {
		completions(sub)
	}
}

// takesFile are the flags whose value is or may be the name of a file.
var takesFile = map[string]bool{
	"hosts": true, "trace": true, "record": true, "output": true, "tls-cert": true, "tls-key": true, "tls-client-ca": true, "device": true,
	"zone-cert": true, "zone-key": true, "zone-ca": true, "zone-secret": true,
}

func directories(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// maxCompletions bounds the names that a shell is given.
const maxCompletions = 200

// completeImage completes the name of an image: one that the cache knows, or the
// path of a layout or an archive. It asks no registry.
func completeImage(c *cobra.Command, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	const stay = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	forms := []string{"oci:"}
	if c.Name() == "build" {
		forms = append(forms, "oci-archive:", "docker-archive:")
	}
	for _, form := range forms {
		if path, ok := strings.CutPrefix(word, form); ok {
			return completePath(form, path, form == "oci:"), stay
		}
	}
	var found []cobra.Completion
	for _, name := range cachedNames(c) {
		if strings.HasPrefix(name, word) && len(found) < maxCompletions {
			found = append(found, name)
		}
	}
	named := len(found) > 0
	for _, form := range forms {
		if strings.HasPrefix(form, word) {
			found = append(found, form)
		}
	}
	if named {
		return found, cobra.ShellCompDirectiveNoFileComp
	}
	return found, stay
}

// completePath completes a path behind the form of a reference.
func completePath(form, path string, onlyDirs bool) (found []cobra.Completion) {
	dir, begin := filepath.Split(path)
	entries, err := os.ReadDir(cmp.Or(dir, "."))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		name := e.Name()
		if !strings.HasPrefix(name, begin) || strings.HasPrefix(name, ".") && begin == "" || len(found) == maxCompletions {
			continue
		}
		fi, err := os.Stat(filepath.Join(dir, name))
		switch {
		case err != nil || onlyDirs && !fi.IsDir():
			continue
		case fi.IsDir():
			name += "/"
		}
		found = append(found, form+dir+name)
	}
	return found
}

// cachedNames are the names of images that the cache directory of c remembers, for
// any platform: it is read as it lies, since a server may have it.
func cachedNames(c *cobra.Command) (names []string) {
	dir := ""
	if f := c.Flags().Lookup("cache"); f != nil {
		dir = f.Value.String()
	}
	if dir == "" {
		var err error
		if dir, err = defaultCache(os.Getuid()); err != nil {
			return nil
		}
	}
	files, err := os.ReadDir(filepath.Join(dir, "refs"))
	if err != nil {
		return nil
	}
	for _, f := range files[:min(len(files), 10*maxCompletions)] {
		var kept struct {
			Name string `json:"name"`
		}
		b, err := os.ReadFile(filepath.Join(dir, "refs", f.Name()))
		if err == nil && len(b) < 64<<10 && json.Unmarshal(b, &kept) == nil && kept.Name != "" {
			names = append(names, kept.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
