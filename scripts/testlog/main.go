// Command testlog reads what `go test -json` prints, and shows what a person needs:
//
//	go test -json ./... | testlog          a line per package, what failed, and counts at the end
//	testlog -cost <LOG                     what each package took, the longest first, with its three longest tests
//	testlog -skipped <LOG                  each test that was skipped, and why
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	cost := flag.Bool("cost", false, "show what each package took, and nothing else")
	skipped := flag.Bool("skipped", false, "list the skipped tests, and nothing else")
	flag.Parse()
	l := &log{output: make(map[string][]string), longest: make(map[string][]event), w: os.Stdout}
	if *cost || *skipped {
		l.w = io.Discard
	}
	if err := l.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testlog:", err)
		os.Exit(1)
	}
	switch {
	case *cost:
		l.writeCost(os.Stdout)
	case *skipped:
		for _, s := range l.skipped {
			fmt.Println(s)
		}
	default:
		fmt.Printf("%d passed, %d failed, %d skipped\n", l.passed, l.failed, len(l.skipped))
	}
}

// event is a line of `go test -json`; see `go doc test2json`.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// log is what has been read.
type log struct {
	output         map[string][]string // of tests that run, by package and test
	packages       []event             // that ended
	longest        map[string][]event  // tests by package, the longest first
	passed, failed int
	skipped        []string
	w              io.Writer // for the line per package
}

func (l *log) read(r io.Reader) error {
	in := bufio.NewScanner(r)
	in.Buffer(nil, 64<<20)
	for in.Scan() {
		var e event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			fmt.Fprintln(l.w, in.Text()) // a build error is not JSON
			continue
		}
		l.add(e)
	}
	return in.Err()
}

func (l *log) add(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		l.output[key] = append(l.output[key], e.Output)
		return
	case "pass":
		if e.Test != "" {
			l.passed++
		} else {
			fmt.Fprintf(l.w, "ok    %7.1fs  %s\n", e.Elapsed, e.Package)
		}
	case "skip":
		if e.Test != "" { // otherwise a package without tests
			l.skipped = append(l.skipped, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(l.output[key])))
		}
	case "fail", "build-fail":
		if e.Test != "" {
			l.failed++
		}
		fmt.Fprintf(l.w, "FAIL  %7.1fs  %s\n%s", e.Elapsed, key, strings.Join(l.output[key], ""))
	default:
		return
	}
	delete(l.output, key)
	switch {
	case e.Test == "" && e.Action != "skip" && e.Action != "build-fail":
		// A package can run twice: with the race detector, and without.
		if i := slices.IndexFunc(l.packages, func(p event) bool { return p.Package == e.Package }); i >= 0 {
			l.packages[i].Elapsed += e.Elapsed
		} else {
			l.packages = append(l.packages, e)
		}
	case e.Test != "" && !strings.Contains(e.Test, "/"): // a subtest is part of its test
		l.longest[e.Package] = append(l.longest[e.Package], e)
	}
}

// shown is how many tests of a package writeCost names, if they took a second or more.
const shown = 3

func (l *log) writeCost(w io.Writer) {
	slices.SortFunc(l.packages, longer)
	for _, p := range l.packages {
		fmt.Fprintf(w, "%7.1fs  %-28s", p.Elapsed, p.Package)
		tests := l.longest[p.Package]
		slices.SortFunc(tests, longer)
		for _, t := range tests[:min(len(tests), shown)] {
			if t.Elapsed >= 1 {
				fmt.Fprintf(w, "  %s %.0fs", t.Test, t.Elapsed)
			}
		}
		fmt.Fprintln(w)
	}
}

func longer(a, b event) int { return cmp.Compare(b.Elapsed, a.Elapsed) }

// reason is what the test gave t.Skip.
func reason(lines []string) string {
	for _, l := range lines {
		if _, text, ok := strings.Cut(strings.TrimSpace(l), ".go:"); ok {
			if _, text, ok = strings.Cut(text, ": "); ok {
				return text
			}
		}
	}
	return "no reason given"
}
