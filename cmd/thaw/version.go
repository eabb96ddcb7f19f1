package main

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// version is the module version of a release build, set by the linker:
// go build -ldflags '-X main.version=v1.2.3'. Empty: the build info has it.
var version string

// features are the parts of thaw that a build of it may lack, by the names that
// scripts can ask for.
var features = []string{"nbd"}

// versionInfo is what --json prints.
type versionInfo struct {
	Type       string   `json:"type"`
	Version    string   `json:"version"`
	Commit     string   `json:"commit,omitempty"`
	CommitTime string   `json:"commit_time,omitempty"`
	Modified   bool     `json:"modified"` // the working tree differed from the commit
	Go         string   `json:"go"`
	Platform   string   `json:"platform"`
	Features   []string `json:"features"`
}

// thisVersion describes this program.
func thisVersion() versionInfo {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	return versionOf(info, version)
}

// versionOf describes the program that was built as info says. release overrides
// the version of the module.
func versionOf(info *debug.BuildInfo, release string) versionInfo {
	v := versionInfo{
		Type: "version", Version: cmp.Or(release, info.Main.Version, "(devel)"),
		Go: cmp.Or(info.GoVersion, runtime.Version()), Platform: runtime.GOOS + "/" + runtime.GOARCH, Features: features,
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.time":
			v.CommitTime = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

// line is what --version prints.
func (v versionInfo) line() string {
	s := "thaw " + v.Version
	if v.Commit != "" {
		s += fmt.Sprintf(", commit %.12s", v.Commit)
		if v.Modified {
			s += " (modified)"
		}
	}
	return fmt.Sprintf("%s, %s, %s", s, v.Go, v.Platform)
}

// print prints what `thaw version` does.
func (v versionInfo) print(w io.Writer) {
	fmt.Fprintf(w, "thaw      %s\n", v.Version)
	if v.Commit != "" {
		fmt.Fprintf(w, "commit    %s", v.Commit)
		if v.CommitTime != "" {
			fmt.Fprintf(w, " of %s", v.CommitTime)
		}
		if v.Modified {
			fmt.Fprint(w, ", modified")
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "go        %s\n", v.Go)
	fmt.Fprintf(w, "platform  %s\n", v.Platform)
	fmt.Fprintf(w, "features  %s\n", strings.Join(v.Features, ", "))
}

// userAgent is how thaw introduces itself to registries: a product of RFC 9110,
// section 10.1.5, whose version is a token.
func (v versionInfo) userAgent() string {
	token := strings.Map(func(c rune) rune {
		if c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || strings.ContainsRune(".-_+~", c) {
			return c
		}
		return -1
	}, v.Version)
	return fmt.Sprintf("thaw/%s (%s)", cmp.Or(token, "unknown"), v.Platform)
}

func versionCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version of thaw",
		Long: `version prints which thaw this is: the version of its module, the commit that it
was built from and whether the working tree was modified, the version of Go, the
platform, and the features that were built in.`,
		Example: `  thaw version
  thaw version --json`,
		Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			v := thisVersion()
			if a.json {
				return a.printJSON(v)
			}
			v.print(a.stdout)
			return nil
		},
	}
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}
