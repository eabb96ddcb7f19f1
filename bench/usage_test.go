package bench

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestRun(t *testing.T) {
	// The usage contains that of a grandchild, which keeps 32 MiB.
	u, err := Run(exec.Command("sh", "-c", `sh -c 'x=$(head -c 33554432 /dev/zero | tr "\0" x); : ${#x}'; :`))
	if err != nil {
		t.Fatal(err)
	}
	if u.Wall <= 0 || u.User+u.Sys <= 0 || u.Others < 0 {
		t.Errorf("usage %+v", u)
	}
	if u.PeakRSS < 32<<20 {
		t.Errorf("peak RSS %d, although a process kept 32 MiB", u.PeakRSS)
	}
}

func TestRunFails(t *testing.T) {
	_, err := Run(exec.Command("sh", "-c", "echo what went wrong >&2; exit 3"))
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"sh -c 'echo", "exit status 3", "\nwhat went wrong"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
}

func TestThen(t *testing.T) {
	got := Usage{1, 2, 3, 40, 5}.Then(Usage{10, 20, 30, 4, 50})
	if want := (Usage{11, 22, 33, 40, 55}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestCommand(t *testing.T) {
	if got, want := Command(exec.Command("/usr/bin/x", "a b", "it's", "-c", "")), `x 'a b' 'it'\''s' -c ''`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseBusy(t *testing.T) {
	got, err := parseBusy("cpu  100 20 30 1000 500 4 6 77 88 99")
	if want := 1600 * time.Millisecond; err != nil || got != want {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4 5 6 7", "cpu 1 2 x 4 5 6 7"} {
		if _, err := parseBusy(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestTail(t *testing.T) {
	var b tail
	for range 1000 {
		b.Write([]byte("0123456789"))
	}
	b.Write([]byte("end"))
	if len(b.b) != tailBytes || !strings.HasSuffix(b.lines(), "end") {
		t.Errorf("%d bytes, %q", len(b.b), b.lines())
	}
}

func TestMachine(t *testing.T) {
	m, err := ThisMachine()
	if err != nil || m.CPU == "" || m.Cores < 1 || m.Memory < 1<<20 || m.Kernel == "" || m.Load == "" {
		t.Errorf("%+v, %v", m, err)
	}
	if got, want := cpuModel("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 167\nmodel name\t: X\nmodel\t\t: 1\n"), "X (family 6, model 167)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNeed(t *testing.T) {
	err := Need(Program{Name: "sh"}, Program{Name: "no-such-program", Package: "a-package"})
	if err == nil || !strings.Contains(err.Error(), "root") && !strings.Contains(err.Error(), "requires no-such-program: apt-get install a-package") {
		t.Error(err)
	}
}
