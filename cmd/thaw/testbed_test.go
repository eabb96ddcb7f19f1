package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
)

// asThaw makes the test binary be the program, so that tests can kill it. With the value
// patient, the program does not give up on a registry that does not cancel its uploads, nor
// starts without an answer that it waits for. With the value deaf, a second signal is never
// another request.
const asThaw = "THAW_TEST_IS_THAW"

// atMost bounds what a test waits for: a machine may be slow and busy, and a test that hangs ends.
const atMost = time.Minute

// until waits until a condition holds.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(atMost); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, atMost)
		}
	}
}

func TestMain(m *testing.M) {
	settle = 50 * time.Millisecond
	exitUnused = 300 * time.Millisecond
	if as := os.Getenv(asThaw); as != "" {
		completeAfter = 0 // it would fetch what a test does not read if it is slow
		switch as {
		case "patient":
			cancelTime, startPatience = time.Hour, time.Hour
		case "deaf":
			sameSignal = time.Hour
		}
		main()
		return
	}
	code := m.Run()
	os.RemoveAll(bundledImage.dir)
	os.RemoveAll(siteImage.dir)
	os.RemoveAll(nodeImage.dir)
	os.RemoveAll(nodeLayout.dir)
	os.Exit(code)
}

// asProgram is the program in a process of its own, not started yet. Built with -race, a
// program sleeps for a second when it exits, so that goroutines that still run can show
// their races. thaw waits for its goroutines before it exits: the second shows nothing
// and would be most of what these tests take. Races before the exit are reported as ever.
func asProgram(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asThaw+"=1", "GORACE="+os.Getenv("GORACE")+" atexit_sleep_ms=0")
	return cmd
}

// need skips a test on a machine that lacks a program, and says which.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// thaw runs a verb to its end.
func thaw(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out bytes.Buffer
	var errOut syncBuffer // as a file, it takes lines of the log and of the progress at once
	ctx, cancel := context.WithTimeout(t.Context(), 5*atMost)
	defer cancel()
	code = run(ctx, args, &out, &errOut)
	return out.String(), errOut.String(), code
}

// must runs a verb that is to succeed.
func must(t testing.TB, args ...string) string {
	t.Helper()
	out, errOut, code := thaw(t, args...)
	if code != exitOK {
		t.Fatalf("thaw %s: exit %d\n%s", strings.Join(args, " "), code, errOut)
	}
	return out
}

// tool runs a foreign program that is to succeed, and returns its output.
func tool(t testing.TB, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*atMost)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// parent is the thread that starts what is to end with the tests.
var parent = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// startWithUs starts a child that is killed when the tests are. To Linux the
// parent is the thread that forked, prctl(2), and threads end before the tests
// do: the fetcher's, for one. Hence one that does not.
func startWithUs(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	parent() <- func() { started <- cmd.Start() }
	return <-started
}

// What the tests start lives on when the thread ends that was to start it.
func TestChildrenOutliveThreads(t *testing.T) {
	child := exec.Command("sleep", "600")
	thread := make(chan int)
	var start func()
	start = func() {
		runtime.LockOSThread() // and never unlocks, so the thread ends here
		if unix.Gettid() == unix.Getpid() {
			// But for the first of the process: held here, it is not the next.
			defer runtime.UnlockOSThread()
			var other sync.WaitGroup
			other.Go(start)
			other.Wait()
			return
		}
		if err := startWithUs(child); err != nil {
			t.Error(err)
		}
		thread <- unix.Gettid()
	}
	go start()
	t.Cleanup(func() { child.Process.Kill() })
	task := fmt.Sprintf("/proc/self/task/%d", <-thread)
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	until(t, "the thread ends", func() bool { _, err := os.Stat(task); return err != nil })
	if err := child.Process.Signal(syscall.Signal(0)); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		t.Errorf("the child ended with the thread: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
}

// server is `thaw serve` in a process of its own.
type server struct {
	t      testing.TB
	cmd    *exec.Cmd
	ready  announced
	stderr syncBuffer
	done   chan struct{}
	err    error
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

// launch runs `thaw serve` until it is ready or has ended.
func launch(t testing.TB, env []string, args ...string) *server {
	t.Helper()
	return launchWith(t, new(syscall.SysProcAttr), env, args...)
}

// launchWith is launch, with what the process has from its start.
func launchWith(t testing.TB, attr *syscall.SysProcAttr, env []string, args ...string) *server {
	t.Helper()
	s := &server{t: t, done: make(chan struct{})}
	// Without completion, which would fetch what a test does not read if it is slow.
	s.cmd = asProgram(append([]string{"serve", "--json", "--log-format", "json", "--complete", "off"}, args...)...)
	s.cmd.SysProcAttr = attr
	s.cmd.Env = append(s.cmd.Env, env...)
	s.cmd.Stderr = &s.stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := startWithUs(s.cmd); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadBytes('\n')
	if len(line) > 0 {
		if err := json.Unmarshal(line, &s.ready); err != nil {
			t.Errorf("%q: %v", line, err)
		}
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	t.Cleanup(func() { s.kill() })
	return s
}

func (s *server) isReady() bool { return s.ready.Type == "ready" }

// serving starts a server that is to become ready.
func serving(t testing.TB, args ...string) *server {
	t.Helper()
	s := launch(t, nil, args...)
	s.mustBeReady()
	return s
}

func (s *server) mustBeReady() {
	s.t.Helper()
	if !s.isReady() {
		<-s.done
		s.t.Fatalf("%s: %v\n%s", strings.Join(s.cmd.Args, " "), s.err, s.stderr.String())
	}
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// freeze stops the server until SIGCONT.
func (s *server) freeze() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
	// The signal is sent, and the process stops a moment later.
	until(s.t, "it stops", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
		if err != nil {
			s.t.Fatal(err)
		}
		return strings.Contains(string(stat), ") T ")
	})
}

// term ends the server in order, and returns what it says at its end.
func (s *server) term() (summary map[string]any, code int) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Error(err)
	}
	return s.stopped()
}

// stopped waits for the end of the server, and returns what it says then.
func (s *server) stopped() (summary map[string]any, code int) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(2 * atMost):
		s.t.Error("the server does not stop")
		s.kill()
	}
	for line := range strings.Lines(s.stderr.String()) {
		var m map[string]any
		if json.Unmarshal([]byte(line), &m) == nil && m["msg"] == "stopped" {
			summary = m
		}
	}
	code = s.cmd.ProcessState.ExitCode()
	if summary == nil && code == exitOK && s.isReady() {
		s.t.Fatalf("the server does not say what it has done:\n%s", s.stderr.String())
	}
	return summary, code
}

// said waits for a word in the server's log, which comes by a pipe.
func (s *server) said(word string) bool {
	for end := time.Now().Add(atMost); !strings.Contains(s.stderr.String(), word); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

func (s *server) uri() string { return s.ready.Exports[0].URI }

// registryProcess is Debian's docker-registry on a loopback port.
type registryProcess struct {
	addr string
	cmd  *exec.Cmd
}

// startRegistry runs a registry over storage until the test ends. With a
// password, only the user "thaw" may do anything.
func startRegistry(t testing.TB, addr, storage, htpasswd string) *registryProcess {
	t.Helper()
	if htpasswd != "" {
		htpasswd = fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s}}\n", htpasswd)
	}
	return runRegistry(t, addr, storage, htpasswd)
}

// startPullThrough runs docker-registry as a pull-through cache.
func startPullThrough(t testing.TB, addr, storage, upstream string) *registryProcess {
	t.Helper()
	return runRegistry(t, addr, storage, fmt.Sprintf("proxy: {remoteurl: %q}\n", upstream))
}

func runRegistry(t testing.TB, addr, storage, more string) *registryProcess {
	t.Helper()
	need(t, "docker-registry")
	if addr == "" {
		// On an address of its own: others of this machine get ports of 127.0.0.1 as well, also
		// while this registry is stopped and started again.
		l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 64+rand.IntN(128), rand.IntN(256), 1+rand.IntN(254)))
		if err != nil {
			t.Fatal(err)
		}
		addr = l.Addr().String()
		l.Close()
	}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\n%s", storage, addr, more)
	path := filepath.Join(t.TempDir(), "registry.yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &registryProcess{addr: addr, cmd: exec.Command("docker-registry", "serve", path)}
	if err := startWithUs(r.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	until(t, "the registry starts", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return r
}

func (r *registryProcess) stop() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

// proxy stands between thaw and a registry, counts, and does as it is told.
type proxy struct {
	*httptest.Server
	mu     sync.Mutex
	seen   []string // METHOD PATH [RANGE]
	active int      // requests that are being worked on
	bytes  int64    // of bodies of range requests
	before func(w http.ResponseWriter, r *http.Request) bool
}

func startProxy(t testing.TB, backend string) *proxy {
	t.Helper()
	p := &proxy{}
	target := &url.URL{Scheme: "http", Host: backend}
	rp := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // so that upload locations lead back here
		},
		ModifyResponse: func(resp *http.Response) error {
			if resp.StatusCode == http.StatusPartialContent {
				p.mu.Lock()
				p.bytes += resp.ContentLength
				p.mu.Unlock()
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.seen = append(p.seen, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range")))
		p.active++
		before := p.before
		p.mu.Unlock()
		defer func() {
			p.mu.Lock()
			p.active--
			p.mu.Unlock()
		}()
		if before == nil || before(w, r) {
			rp.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *proxy) host() string { return strings.TrimPrefix(p.URL, "http://") }

func (p *proxy) set(before func(http.ResponseWriter, *http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.before = before
}

// settle returns when no request is under way. What a server has sent at its end comes and is
// counted a moment later.
func (p *proxy) settle(t testing.TB) {
	t.Helper()
	// This connection is accepted after those that are there.
	if c, err := net.Dial("tcp", p.host()); err != nil {
		t.Error(err)
	} else {
		fmt.Fprintf(c, "-\r\n\r\n") // no request
		c.SetDeadline(time.Now().Add(atMost))
		io.Copy(io.Discard, c)
		c.Close()
	}
	until(t, "no request is under way", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.active == 0
	})
}

// take returns the requests since the last time.
func (p *proxy) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen
	p.seen = nil
	return seen
}

// fetched is how many bytes of ranges have gone through.
func (p *proxy) fetched() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes
}

// file is an entry of a made-up layer.
type file struct {
	name string
	data []byte
	link string
	mode int64 // 0644, and 0755 for a directory, if 0
}

// layerOf makes a layer.
func layerOf(t testing.TB, files ...file) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.data)), ModTime: time.Unix(1700000000, 0)}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if f.mode != 0 {
			h.Mode = f.mode
		}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeLink, f.link
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// imageOf makes an image of layers.
func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// push brings an image to a registry by other means than thaw's.
func push(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}

// random are n bytes that compress to three quarters.
//
//go:norace
func random(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		if i%4 != 0 {
			b[i] = byte(rng.Uint32())
		}
	}
	return b
}

// files are n files of up to 64 KiB in a directory.
func files(seed uint64, dir string, n int) []file {
	rng := rand.New(rand.NewPCG(seed, 2))
	fs := []file{{name: dir + "/"}}
	for i := range n {
		fs = append(fs, file{name: fmt.Sprintf("%s/%d", dir, i), data: random(seed*1000+uint64(i), rng.IntN(64<<10))})
	}
	return fs
}

func socket(t testing.TB) string {
	t.Helper()
	// Not t.TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "thaw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// copyLayout makes an OCI layout of an image by other means than thaw's.
func copyLayout(t testing.TB, dir, tag string, img v1.Image) {
	t.Helper()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
		t.Fatal(err)
	}
}
