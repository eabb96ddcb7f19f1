package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"thaw/cmd/thaw/internal/host"
)

// The table of devices fits 80 columns, whatever clients call their devices, and is as
// wide as it must be where stdout is no terminal.
func TestDeviceTable(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	devices := []host.DeviceInfo{
		{ID: "1", Name: "registry.example.company.example/team/department/project/application:v1.2.3", Digest: digest, State: host.Ready, Permanent: true,
			Users: 2, Size: 10 << 30, Resident: 1000 << 20, Prefetch: &host.PrefetchInfo{State: "running", Chunks: 200, DoneChunks: 90}},
		{ID: "2", Name: "root", Digest: digest, State: host.Closing, Users: 12, Size: 64 << 20, Resident: 5 << 10, Prefetch: &host.PrefetchInfo{State: "ended", Chunks: 3, DoneChunks: 3}},
		{ID: "1234", Name: "evil\x1b[2J\r\nname\xff", State: host.Opening},
		{ID: "1235", Name: "x", State: host.Failed, Error: "no"},
		{ID: "1236", Name: "y", Digest: digest, State: host.Ready, Prefetch: &host.PrefetchInfo{State: "ended", Chunks: 3, DoneChunks: 2}},
		{ID: "1237", Name: "z", Digest: digest, State: host.Ready, Prefetch: &host.PrefetchInfo{State: "looking"}},
	}
	for _, width := range []int{80, 100, 200} {
		lines := deviceTable(devices, width)
		for _, l := range lines {
			if n := utf8.RuneCountInString(l); n > width || strings.ContainsAny(l, "\x1b\r\n") || !utf8.ValidString(l) {
				t.Errorf("%d columns instead of %d: %q", n, width, l)
			}
		}
	}
	narrow := strings.Join(deviceTable(devices, 80), "\n") + "\n"
	want := `
  id  name            digest          size  resident  state    users  prefetch
   1  …cation:v1.2.3  0123456789ab  10 GiB  1000 MiB  ready        2  45 %
   2  root            0123456789ab  64 MiB     5 KiB  closing     12  done
1234  …il\ufffd[2J\ufffd\ufffdname\ufffd  -                  -         -  opening      0  -
1235  x               -                  -         -  failed       0  -
1236  y               0123456789ab     0 B       0 B  ready        0  ended 66 %
1237  z               0123456789ab     0 B       0 B  ready        0  looking
`
	if want = strings.ReplaceAll(want[1:], `\ufffd`, "\ufffd"); narrow != want {
		t.Errorf("it is\n%s\ninstead of\n%s", narrow, want)
	}
	whole := strings.Join(deviceTable(devices, 0), "\n")
	if !strings.Contains(whole, devices[0].Name) || strings.Contains(whole, "\x1b") {
		t.Errorf("\n%s", whole)
	}
}

func TestDurationString(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0 s", 59 * time.Second: "59 s", 61 * time.Second: "1 min 1 s", 3*time.Hour + 12*time.Minute: "3 h 12 min", 50 * time.Hour: "2 d 2 h",
	} {
		if got := durationString(d); got != want {
			t.Errorf("%v: %q instead of %q", d, got, want)
		}
	}
}

// Where no server runs, both say so, and what to do.
func TestNoServer(t *testing.T) {
	dir := t.TempDir()
	for _, verb := range []string{"list", "status"} {
		for _, args := range [][]string{nil, {"--json"}} {
			out, stderr, code := thaw(t, append([]string{verb, "--cache", dir}, args...)...)
			if want := "thaw: no server uses the cache " + dir + ": start one with: thaw serve IMAGE --cache " + dir + "\n"; code != exitError || out != "" || stderr != want {
				t.Errorf("%s %v: exit %d\n%s%s", verb, args, code, out, stderr)
			}
		}
		if out, _, code := thaw(t, verb, "x"); code != exitUsage || out != "" {
			t.Errorf("%s with an argument: exit %d", verb, code)
		}
	}
	if _, stderr, code := thaw(t, "status", "--watch", "--cache", dir); code != exitError || !strings.Contains(stderr, "no server") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

// The devices and the status of a running server, in words and as JSON.
func TestListAndStatus(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir := filepath.Dir(socket(t))
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir, "--cache-size", "1G", "--trace", "auto")
	qemuRead(t, s.uri(), "read 0 4k")
	out := must(t, "list", "--cache", dir)
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	digest := inspectJSON(t, image).Digest
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "id  name") || !strings.Contains(lines[1], image+"  "+digest[7:19]+"  64 MiB") || !strings.Contains(lines[1], "ready") {
		t.Errorf("%s", out)
	}
	var d listedDevice
	if err := json.Unmarshal([]byte(must(t, "list", "--json", "--cache", dir)), &d); err != nil || d.Type != "device" || d.Name != image || d.Digest != digest ||
		d.Resident == 0 || d.State != host.Ready {
		t.Errorf("%+v, %v", d, err)
	}
	out = must(t, "status", "--cache", dir)
	for _, want := range []string{"server    serving for ", fmt.Sprint(", pid ", s.cmd.Process.Pid), "cache     " + dir + "\n", " of 1.0 GiB used, ", "registry  ",
		"clients   ", " reads, ", "devices   1 ready\n", "          0 complete; the others lack ", digest[7:19]} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("control sequences without a terminal: %q", out)
	}
	var st shownStatus
	if err := json.Unmarshal([]byte(must(t, "status", "--json", "--cache", dir)), &st); err != nil || st.Type != "status" || st.State != host.Serving ||
		st.Devices.Ready != 1 || st.Counts.NBD == nil || st.Counts.NBD.Hits+st.Counts.NBD.Misses == 0 || st.Quota != 1<<30 {
		t.Errorf("%+v, %v", st, err)
	}
	// One recording by the name of its device, which then has none.
	for _, want := range []string{"1 recording ended\n", "0 recordings ended\n"} {
		if got := must(t, "trace", "stop", "--device", image, "--cache", dir); got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
	if _, stderr, code := thaw(t, "trace", "stop", "--device", "none", "--cache", dir); code != exitError || !strings.Contains(stderr, "no device none") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	s.term()
}

// watching runs `thaw status --watch` as a process, with stdout at a file.
func watching(t *testing.T, stdout *os.File, args ...string) (cmd *exec.Cmd, stderr *syncBuffer, ended <-chan error) {
	t.Helper()
	stderr = new(syncBuffer)
	cmd = asProgram(append([]string{"status", "--watch"}, args...)...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	return cmd, stderr, done
}

// --watch goes on until it is interrupted, which is no failure, or until the server ends.
func TestWatch(t *testing.T) {
	image := layoutImage(t)
	dir := filepath.Dir(socket(t))
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir)
	frames := func(path, begin string) int {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(b, []byte(begin))
	}
	waitFor := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(atMost); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: not within 20 s", what)
			}
		}
	}
	for _, c := range []struct {
		begin string
		args  []string
		end   os.Signal
	}{{`{"type":"status"`, []string{"--json"}, os.Interrupt}, {"server    serving", nil, syscall.SIGTERM}} {
		path := filepath.Join(t.TempDir(), "out")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		cmd, stderr, ended := watching(t, f, append(c.args, "--cache", dir)...)
		f.Close()
		waitFor("three statuses", func() bool { return frames(path, c.begin) >= 3 })
		cmd.Process.Signal(c.end)
		if err := <-ended; err != nil || stderr.String() != "" {
			t.Errorf("%v: %v\n%s", c.args, err, stderr.String())
		}
		b, _ := os.ReadFile(path)
		if bytes.Contains(b, []byte("\x1b")) {
			t.Errorf("control sequences without a terminal: %q", b)
		}
		if c.args != nil {
			for line := range bytes.Lines(b) {
				if !json.Valid(line) {
					t.Errorf("not JSON: %q", line)
				}
			}
		}
	}

	// On a terminal, one status is drawn over the other.
	master, terminal := openTerminal(t, 80, 12)
	cmd, stderr, ended := watching(t, terminal, "--cache", dir)
	terminal.Close()
	var screen syncBuffer
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			screen.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	waitFor("three statuses on a terminal", func() bool { return strings.Count(screen.String(), "\x1b[H") >= 3 })
	cmd.Process.Signal(os.Interrupt)
	if err := <-ended; err != nil || stderr.String() != "" {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	for _, frame := range strings.Split(screen.String(), "\x1b[H")[1:] {
		frame, _, whole := strings.Cut(frame, "\x1b[J")
		lines := strings.Split(frame, "\r\n")
		if whole && (len(lines) > 12 || !strings.Contains(frame, "serving for")) {
			t.Errorf("%d lines: %q", len(lines), frame)
		}
		for _, l := range lines {
			if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\x1b[K")); n > 80 {
				t.Errorf("%d columns: %q", n, l)
			}
		}
	}

	// It ends with the server.
	file, err := os.Create(filepath.Join(t.TempDir(), "statuses"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, stderr, ended = watching(t, file, "--json", "--cache", dir)
	waitFor("a status", func() bool {
		fi, err := file.Stat()
		return err == nil && fi.Size() > 0
	})
	s.term()
	select {
	case err := <-ended:
		if cmd := new(exec.ExitError); !asExit(err, &cmd) || cmd.ExitCode() != exitError || stderr.String() != "thaw: the server has ended\n" {
			t.Errorf("%v\n%s", err, stderr.String())
		}
	case <-time.After(atMost):
		t.Error("it watches a server that is gone")
	}
}

func asExit(err error, to **exec.ExitError) (ok bool) {
	*to, ok = err.(*exec.ExitError)
	return ok
}

// openTerminal makes a terminal.
func openTerminal(t *testing.T, width, height uint16) (master, terminal *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there are no terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width}); err != nil {
		t.Fatal(err)
	}
	return master, terminal
}

// A server tells what it does while it starts and stops: it opens an image of a registry
// that does not answer, and then waits for nobody.
func TestStatusWhileStarting(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	lift := p.silence()
	defer lift()
	dir := filepath.Dir(socket(t))
	cmd := asProgram("serve", p.host()+"/team/app:v1", "--listen", "unix:"+socket(t), "--cache", dir)
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGTERM)
	for end := time.Now().Add(atMost); ; time.Sleep(10 * time.Millisecond) {
		out, stderr, _ := thaw(t, "status", "--cache", dir)
		if strings.Contains(out, "server    starting, up for") && strings.Contains(out, "devices   1 opening") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s%s", out, stderr)
		}
	}
	if out := must(t, "list", "--cache", dir); !strings.Contains(out, "opening") {
		t.Errorf("%s", out)
	}
}
