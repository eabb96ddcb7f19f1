// Package benchtest has what the tests of benchmarks share: mounts that end with
// them, and an image that is small enough to start in no time.
package benchtest

import (
	"context"
	"fmt"
	"os"
	"testing"

	"thaw/bench"
)

// Main is the TestMain of a benchmark: as root its tests run where their mounts are
// seen by nobody else, as the benchmark itself does.
func Main(m *testing.M) {
	if os.Geteuid() == 0 {
		if code, done, err := bench.Isolate(context.Background()); done || err != nil {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}
