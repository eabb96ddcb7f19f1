// Package benchtest has what the tests of the benchmarks share: a private mount
// namespace, and a small image.
package benchtest

import (
	"context"
	"fmt"
	"os"
	"testing"

	"thaw/bench"
)

// Main is the TestMain of a benchmark. As root it runs the tests in a mount
// namespace of their own, as the benchmark itself does.
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
