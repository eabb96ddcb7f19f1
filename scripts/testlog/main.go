// Command testlog reads what `go test -json` prints and shows a person what
// matters of it: a line a package, the output of what failed, and at the end
// how many tests passed, failed and were skipped. With -skipped it lists the
// tests that did not run, with the reason that each gave.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

func main() {
	onlySkipped := flag.Bool("skipped", false, "list the skipped tests and nothing else")
	flag.Parse()
	output := make(map[string][]string) // by package and test
	passed, failed, skipped := 0, 0, 0
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 64<<20)
	for in.Scan() {
		var e event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			fmt.Println(in.Text()) // a build error is no JSON
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			output[key] = append(output[key], e.Output)
		case "pass":
			if e.Test != "" {
				passed++
			} else if !*onlySkipped {
				fmt.Printf("ok    %7.1fs  %s\n", e.Elapsed, e.Package)
			}
			delete(output, key)
		case "skip":
			if e.Test == "" {
				continue // a package without tests
			}
			skipped++
			if *onlySkipped {
				fmt.Printf("%s %s: %s\n", e.Package, e.Test, reason(output[key]))
			}
		case "fail", "build-fail":
			if e.Test != "" {
				failed++
			}
			if !*onlySkipped {
				fmt.Printf("FAIL  %7.1fs  %s\n%s", e.Elapsed, key, strings.Join(output[key], ""))
			}
		}
	}
	if !*onlySkipped {
		fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	}
}

// reason is what t.Skip was given.
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
