package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"thaw/tracefile"
)

// traceIn reads a trace file that is to be whole and to have touched something.
func traceIn(t testing.TB, path string) *tracefile.Trace {
	t.Helper()
	x, _, err := readTrace(t.Context(), path)
	if err != nil {
		t.Error(err)
		return nil
	}
	if len(x.Touches) == 0 || x.Cut != nil {
		t.Errorf("%s: %d touches, cut: %v", path, len(x.Touches), x.Cut)
	}
	return x
}

// filesIn lists a directory, but for sockets.
func filesIn(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// An earlier recording is there until the next one is whole.
func TestEarlierRecordingStays(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "start.trace")
	cache := t.TempDir()
	record := func(args ...string) []string {
		return append([]string{image, "--cache", cache, "--record", file}, args...)
	}
	s := serving(t, record("--listen", "unix:"+socket(t))...)
	qemuRead(t, s.uri(), "read 0 1M")
	s.term()
	first := traceIn(t, file)
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	same := func(why string) {
		t.Helper()
		if x := traceIn(t, file); x == nil || len(x.Touches) != len(first.Touches) {
			t.Errorf("%s: the earlier recording is lost", why)
		}
	}
	// Starts that fail.
	l, err := net.Listen("tcp", "127.0.0.1:0") // taken
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, args := range [][]string{
		{"--listen", "tcp:" + l.Addr().String()}, {"--listen", "udp:1"}, {"--listen", "unix:" + socket(t), "--tls-cert", "/none"},
	} {
		if s := launch(t, nil, record(args...)...); s.isReady() {
			t.Fatal("it has started")
		} else {
			<-s.done
		}
		same(fmt.Sprint(args))
	}
	// A start that nobody reads from.
	s = serving(t, record("--listen", "unix:"+socket(t))...)
	s.term()
	same("nothing was read")
	if left := filesIn(t, dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	// A server that is killed leaves what it has, for the next one to keep.
	s = serving(t, record("--listen", "unix:"+socket(t))...)
	qemuRead(t, s.uri(), "read 0 2M")
	until(t, "it is written", func() bool { // a second later
		temp, err := filepath.Glob(filepath.Join(dir, ".start.trace.tmp-*"))
		if err != nil || len(temp) != 1 {
			t.Fatalf("%v, %v", temp, err)
		}
		x, _, err := readTrace(t.Context(), temp[0])
		return err == nil && len(x.Touches) > 0
	})
	s.kill()
	same("it was killed")
	s = serving(t, record("--listen", "unix:"+socket(t))...)
	if !s.said("an earlier recording was interrupted") {
		t.Errorf("%s", s.stderr.String())
	}
	if x, _, err := readTrace(t.Context(), file+".interrupted"); err != nil || len(x.Touches) == 0 {
		t.Errorf("what there was of the recording is lost: %v", err)
	}
	same("another one is under way")
	qemuRead(t, s.uri(), "read 8M 4k")
	// Another server does not record to the same file.
	other := launch(t, nil, image, "--cache", t.TempDir(), "--record", file, "--listen", "unix:"+socket(t))
	if other.isReady() {
		t.Error("two servers record to one file")
	} else if <-other.done; !other.said("another server is recording to it") {
		t.Errorf("%s", other.stderr.String())
	}
	// And SIGTERM ends a recording in order.
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	traceIn(t, file)
	if now, err := os.ReadFile(file); err != nil || bytes.Equal(now, was) {
		t.Errorf("the new recording is not there: %v", err)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if left := filesIn(t, dir); len(left) != 2 {
		t.Errorf("left behind: %v", left)
	}
}

// What is not a regular file is written to as it is, and links lead to the file.
func TestRecordToWhatIsNoFile(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	s := launch(t, nil, image, "--cache", dir+"/c", "--record", fifo, "--listen", "unix:"+socket(t))
	if s.isReady() {
		t.Error("it records to a FIFO that nobody reads")
	} else if <-s.done; !s.said("start its reader first") {
		t.Errorf("%s", s.stderr.String())
	}
	r, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s = serving(t, image, "--cache", dir+"/c", "--record", fifo, "--listen", "unix:"+socket(t))
	qemuRead(t, s.uri(), "read 0 1M")
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if x, err := tracefile.Read(bytes.NewReader(b)); err != nil || len(x.Touches) == 0 {
		t.Errorf("the FIFO has brought no trace: %v", err)
	}
	if fi, err := os.Lstat(fifo); err != nil || fi.Mode().Type() != os.ModeNamedPipe {
		t.Error("the FIFO is replaced")
	}

	if err := os.Symlink("to/file", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/to", 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // without the file and with it
		s = serving(t, image, "--cache", dir+"/c", "--record", dir+"/link", "--listen", "unix:"+socket(t))
		qemuRead(t, s.uri(), "read 0 1M")
		s.term()
		traceIn(t, dir+"/to/file")
		if fi, err := os.Lstat(dir + "/link"); err != nil || fi.Mode().Type() != os.ModeSymlink {
			t.Error("the link is replaced")
		}
	}
	for _, c := range []struct{ file, want string }{
		{dir, "is a directory"}, {dir + "/none/t", "no such file"}, {dir + "/fifo/t", "not a directory"},
	} {
		s := launch(t, nil, image, "--cache", dir+"/c", "--record", c.file, "--listen", "unix:"+socket(t))
		if s.isReady() {
			t.Errorf("it records to %s", c.file)
		} else if <-s.done; !s.said(c.want) {
			t.Errorf("%s:\n%s", c.file, s.stderr.String())
		}
	}
	s = serving(t, image, "--cache", dir+"/c", "--record", "/dev/full", "--listen", "unix:"+socket(t))
	qemuRead(t, s.uri(), "read 0 1M")
	if s.term(); !s.said("the recording is lost") {
		t.Errorf("%s", s.stderr.String())
	}
}

// A recording that the registry does not take is kept, where the log says.
func TestRefusedRecordingIsKept(t *testing.T) {
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	b := buildOf(t, ref)
	dir := t.TempDir()
	for _, args := range [][]string{{"--trace", "auto"}, {"--record", dir + "/t"}} {
		p.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPost {
				http.Error(w, "no", http.StatusForbidden)
				return false
			}
			return true
		})
		s := serving(t, append(args, ref, "--trace-push", "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--record-quiet", "100ms")...)
		qemuRead(t, s.uri(), "read 0 1M")
		if !s.said("could not be stored") {
			t.Fatalf("%s", s.stderr.String())
		}
		var m struct{ Msg, File, Remedy string }
		for line := range strings.Lines(s.stderr.String()) {
			if strings.Contains(line, "could not be stored") {
				if err := json.Unmarshal([]byte(line), &m); err != nil {
					t.Fatal(err)
				}
			}
		}
		traceIn(t, m.File)
		if want := fmt.Sprintf("thaw trace push %s %s", withDigest(ref, b.Digest), m.File); m.Remedy != want {
			t.Errorf("the remedy is %q, want %q", m.Remedy, want)
		}
		s.term()
		p.set(nil)
		must(t, strings.Fields(m.Remedy)[1:]...)
	}
}

// Without a directory for temporary files a start is recorded all the same; with no
// place at all it is served.
func TestNoPlaceToRecord(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir := t.TempDir()
	for i, temp := range []string{dir + "/none", "/proc"} {
		s := launch(t, []string{"TMPDIR=" + temp}, image, "--listen", "unix:"+socket(t), "--cache", fmt.Sprintf("%s/c%d", dir, i),
			"--trace", "auto", "--record-quiet", "100ms")
		if !s.isReady() {
			<-s.done
			t.Fatalf("TMPDIR=%s: %s", temp, s.stderr.String())
		}
		qemuRead(t, s.uri(), "read 0 1M")
		if !s.said("recorded a start") {
			t.Errorf("TMPDIR=%s: %s", temp, s.stderr.String())
		}
		s.term()
	}
	// Nor in the cache: something else has the name.
	if err := os.Mkdir(dir+"/c", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/c/traces", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := launch(t, []string{"TMPDIR=" + dir + "/none"}, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", "auto")
	if !s.isReady() {
		<-s.done
		t.Fatalf("%s", s.stderr.String())
	}
	qemuRead(t, s.uri(), "read 0 1M")
	if !s.said("the start is not recorded") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
	sock := socket(t)
	t.Setenv("TMPDIR", dir+"/none")
	s = serving(t, image, "--listen", "unix:"+sock, "--cache", dir+"/d", "--record", dir+"/t")
	qemuRead(t, s.uri(), "read 0 1M")
	s.term()
	if _, stderr, code := thaw(t, "trace", "pack", image, dir+"/t"); code != exitError || !strings.Contains(stderr, "--temp") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	if _, stderr, code := thaw(t, "trace", "pack", image, dir+"/t", "--temp", dir+"/gone"); code != exitError || !strings.Contains(stderr, "--temp") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	// What a killed pack has left goes, and nothing is left again.
	temp := t.TempDir()
	if err := os.MkdirAll(temp+"/thaw-bundle-1/x", 0o700); err != nil {
		t.Fatal(err)
	}
	must(t, "trace", "pack", image, dir+"/t", "--temp", temp)
	if left := filesIn(t, temp); len(left) > 0 {
		t.Errorf("it has left %q", left)
	}
}

// What a server that was killed was recording for --trace auto is kept as well.
func TestInterruptedAutoRecording(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	cache := t.TempDir()
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--trace", "auto")
	qemuRead(t, s.uri(), "read 0 1M")
	until(t, "it is written", func() bool {
		temp, err := filepath.Glob(filepath.Join(cache, "traces", ".*"))
		if err != nil || len(temp) != 1 {
			t.Fatalf("%v, %v", temp, err)
		}
		x, _, err := readTrace(t.Context(), temp[0])
		return err == nil && len(x.Touches) > 0
	})
	s.kill()
	if err := os.WriteFile(filepath.Join(cache, "traces", ".x.trace.tmp-y"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--trace", "auto")
	s.term()
	if left := filesIn(t, filepath.Join(cache, "traces")); len(left) != 1 || !strings.HasSuffix(left[0], ".trace.interrupted") {
		t.Errorf("%v\n%s", left, s.stderr.String())
	}
}

// Nothing is put where everybody may write.
func TestDefaultPlaces(t *testing.T) {
	for _, c := range []struct{ home, cache, runtime, wantCache, wantSocket string }{
		{"/home/x", "", "/run/user/1000", "/home/x/.cache/thaw", "/run/user/1000/thaw.sock"},
		{"", "/var/x", "", "/var/x/thaw", ""},
		{"", "", "run", "", ""},
	} {
		t.Setenv("HOME", c.home)
		t.Setenv("XDG_CACHE_HOME", c.cache)
		t.Setenv("XDG_RUNTIME_DIR", c.runtime)
		cache, err := defaultCache(1000)
		if cache != c.wantCache || c.wantCache == "" && (err == nil || !strings.Contains(err.Error(), "--cache")) {
			t.Errorf("%+v: the cache is %q, %v", c, cache, err)
		}
		sock, err := defaultSocket(1000)
		if sock != c.wantSocket || c.wantSocket == "" && (err == nil || !strings.Contains(err.Error(), "--listen")) {
			t.Errorf("%+v: the socket is %q, %v", c, sock, err)
		}
	}
}
