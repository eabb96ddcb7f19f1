//go:build race

package race

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// asRacer has the test binary use a buffer from two goroutines.
const asRacer = "THAW_TEST_RACES"

func TestMain(m *testing.M) {
	calls := map[string]func([]byte){"read": Read, "write": Write}
	first, second, ok := strings.Cut(os.Getenv(asRacer), ",")
	if !ok {
		os.Exit(m.Run())
	}
	p := make([]byte, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		calls[first](p[100:200])
	}()
	calls[second](p[150:300])
	<-done
}

// The detector reports a buffer that is written while another goroutine uses it, and none that
// is only read.
func TestReported(t *testing.T) {
	for uses, want := range map[string]bool{"write,read": true, "read,write": true, "write,write": true, "read,read": false} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asRacer+"="+uses, "GORACE=atexit_sleep_ms=0")
		out, err := cmd.CombinedOutput()
		if reported := err != nil && strings.Contains(string(out), "DATA RACE"); reported != want {
			t.Errorf("%s: reported: %v, %v\n%s", uses, reported, err, out)
		}
	}
}
