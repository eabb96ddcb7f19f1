package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The number of recordings without a file named by the user is bounded: the oldest are
// removed.
func TestKeptRecordings(t *testing.T) {
	kept := recordDir{t.TempDir()}
	if err := os.MkdirAll(kept.path(), 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(kept.path(), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("20261126T101112.000000-0123.trace")
	put("something else")
	for i := range 2 * keptRecords {
		put(fmt.Sprintf("2000%04d-x.trace", i))
	}
	kept.prune()
	entries, err := os.ReadDir(kept.path())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".trace") {
			names = append(names, e.Name())
		}
	}
	if len(names) != keptRecords || len(entries) != keptRecords+1 || !strings.HasPrefix(names[len(names)-1], "2026") || names[0] != fmt.Sprintf("2000%04d-x.trace", keptRecords+1) {
		t.Errorf("%d are kept: %v", len(names), names)
	}
}
