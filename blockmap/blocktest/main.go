package blocktest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Main is the TestMain of a package whose tests leave no goroutine behind. It waits for those
// that are about to end: on a busy machine that takes longer than goleak waits.
func Main(m *testing.M) {
	code := m.Run()
	for end := time.Now().Add(time.Minute); code == 0; {
		err := goleak.Find() // which waits for a while itself
		if err == nil {
			break
		}
		if time.Now().After(end) {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
