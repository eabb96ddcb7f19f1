package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// layoutImage is a small block image in a layout.
func layoutImage(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", imageOf(t, layerOf(t, files(1, "a", 20)...)))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	return image
}

// Whoever reads the log, or the line that says ready, goes away: the server lives on.
func TestServerOutlivesItsReaders(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	for _, c := range []string{"closed", "stopped"} {
		sock := socket(t)
		cmd := asProgram("serve", image, "--allow", "**", "--listen", "unix:"+sock, "--cache", t.TempDir(), "--verbose", "--grace", "5s")
		outR, outW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		errR, errW, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout, cmd.Stderr = outW, errW
		if err := startWithUs(cmd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		outW.Close()
		errW.Close()
		// Stdout is gone before anything is said, stderr with what it has said, or it
		// is full and nobody takes anything out of it.
		outR.Close()
		if c == "closed" {
			errR.Close()
		} else {
			defer errR.Close()
		}
		for end := time.Now().Add(atMost); ; time.Sleep(10 * time.Millisecond) {
			if _, err := os.Stat(sock); err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal("it does not listen")
			}
		}
		// Each of these leaves lines in the log: a pipe takes 64 KiB.
		for range 600 {
			nc, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			nc.SetDeadline(time.Now().Add(atMost))
			// A handshake of no kind, and an export of no registry.
			name := strings.Repeat("X", 200)
			io.WriteString(nc, "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\xc8"+name)
			io.ReadAll(nc)
			nc.Close()
		}
		qemuRead(t, "nbd+unix:///?socket="+sock, "read 0 1M")
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", c, err)
			}
		case <-time.After(atMost):
			t.Errorf("%s: it does not end", c)
		}
	}
}

// Results that nobody takes end a command, not with success and without a word.
func TestResultsToAClosedPipe(t *testing.T) {
	image := layoutImage(t)
	for _, args := range [][]string{
		{"inspect", image}, {"inspect", "--json", image}, {"verify", image}, {"--help"}, {"build", image[:len(image)-2] + ":x", "oci:" + t.TempDir() + "/o:y"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		cmd := asProgram(args...)
		var stderr strings.Builder
		cmd.Stdout, cmd.Stderr = w, &stderr
		err = cmd.Run()
		w.Close()
		if args[0] == "build" { // fails, and says why
			if err == nil || !strings.Contains(stderr.String(), "is a block image already") {
				t.Errorf("%v: %v\n%s", args, err, stderr.String())
			}
			continue
		}
		if code := cmd.ProcessState.ExitCode(); code != exitError || stderr.Len() > 0 {
			t.Errorf("%v: exit %d (%v)\n%s", args, code, err, stderr.String())
		}
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	cmd := asProgram("inspect", image)
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = full, &stderr
	if err := cmd.Run(); err == nil || !strings.Contains(stderr.String(), "write the results") {
		t.Errorf("to a full disk: %v\n%s", err, stderr.String())
	}
}

// SIGHUP ends other commands in order.
func TestHangupEndsABuild(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	temp := t.TempDir()
	asked := make(chan struct{}, 100)
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut || r.Method == http.MethodPatch {
			asked <- struct{}{}
			io.Copy(io.Discard, r.Body) // or else nobody notices that the client goes
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}
		return true
	})
	cmd := asProgram("build", ref, "--temp", temp)
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	select {
	case <-asked:
	case <-time.After(atMost):
		t.Fatal("it pushes nothing")
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != exitError || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// serial is that of the certificate that a server shows.
func serial(t testing.TB, addr string) string {
	t.Helper()
	nc, err := net.DialTimeout("tcp", addr, atMost)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(atMost))
	r := bufio.NewReader(nc)
	// Fixed newstyle, STARTTLS.
	if _, err := io.CopyN(io.Discard, r, 18); err != nil {
		t.Fatal(err)
	}
	io.WriteString(nc, "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00")
	if _, err := io.CopyN(io.Discard, r, 20); err != nil {
		t.Fatal(err)
	}
	c := tls.Client(nc, &tls.Config{InsecureSkipVerify: true})
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// Certificates that are renewed are shown without a restart, in whatever way the
// files change; those that cannot be used are not. SIGHUP ends nothing.
func TestRenewedCertificates(t *testing.T) {
	image := layoutImage(t)
	dir := t.TempDir()
	caKey := newECDSA(t)
	ca := certificate(t, dir, "ca", "test authority", caKey, nil, nil)
	renew := func(dir string) string {
		t.Helper()
		return certificate(t, dir, "server", "localhost", newECDSA(t), ca, caKey).SerialNumber.String()
	}
	// As in a mounted secret: links to links that are swapped.
	for _, d := range []string{"one", "two"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	now := renew(filepath.Join(dir, "one"))
	for link, to := range map[string]string{"..data": "one", "server-cert.pem": "..data/server-cert.pem", "server-key.pem": "..data/server-key.pem"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	s := serving(t, image, "--listen", "tcp:127.0.0.1:0", "--cache", dir+"/cache", "--tls-cert", dir+"/server-cert.pem", "--tls-key", dir+"/server-key.pem")
	addr := strings.TrimPrefix(s.ready.Listen[0], "tcp:")
	show := func(how, want string) {
		t.Helper()
		if got := serial(t, addr); got != want {
			t.Errorf("%s: the certificate is %s, want %s\n%s", how, got, want, s.stderr.String())
		}
	}
	// The server looks at the files every few seconds as well: it does not while they are written.
	unseen := func(write func()) {
		t.Helper()
		s.freeze()
		write()
		check(t, s.cmd.Process.Signal(syscall.SIGCONT))
	}
	show("at first", now)
	unseen(func() { now = renew(filepath.Join(dir, "one")) })
	show("written over", now)
	fresh := renew(filepath.Join(dir, "two"))
	if err := os.Symlink("two", filepath.Join(dir, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	now = fresh
	show("by a link", now)
	renamed := t.TempDir()
	fresh = renew(renamed)
	// The certificate first: for a moment it does not go with the key.
	for i, f := range []string{"server-cert.pem", "server-key.pem"} {
		if err := os.Rename(filepath.Join(renamed, f), filepath.Join(dir, "two", f)); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			show("halfway", now)
		}
	}
	now = fresh
	show("by rename", now)
	unseen(func() {
		check(t, os.WriteFile(filepath.Join(dir, "two", "server-cert.pem"), []byte("nonsense"), 0o600))
	})
	show("broken", now)
	if !s.said("cannot be read again") {
		t.Errorf("%s", s.stderr.String())
	}
	if err := os.Remove(filepath.Join(dir, "two", "server-key.pem")); err != nil {
		t.Fatal(err)
	}
	show("gone", now)
	show("gone", now)
	unseen(func() { now = renew(filepath.Join(dir, "two")) })
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	// It has read them three times before: written over, by a link, by rename.
	for end := time.Now().Add(atMost); s.lines("read the TLS certificates again") < 4; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("SIGHUP does not make it read them:\n%s", s.stderr.String())
		}
	}
	// All lines from before have come by then.
	if n := s.lines("cannot be read again"); n != 3 {
		t.Errorf("%d warnings, of certificates halfway, broken and gone:\n%s", n, s.stderr.String())
	}
	show("after SIGHUP", now)
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// Client authorities are read again as well.
func TestRenewedClientAuthority(t *testing.T) {
	need(t, "nbdinfo")
	image := layoutImage(t)
	dir := t.TempDir()
	keys := []*ecdsa.PrivateKey{newECDSA(t).(*ecdsa.PrivateKey), newECDSA(t).(*ecdsa.PrivateKey)}
	ca := certificate(t, dir, "ca", "authority one", keys[0], nil, nil)
	other := certificate(t, dir, "other", "authority two", keys[1], nil, nil)
	certificate(t, dir, "server", "localhost", newECDSA(t), ca, keys[0])
	client := t.TempDir()
	certificate(t, client, "client", "host", newECDSA(t), other, keys[1])
	pemOf := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	if err := os.WriteFile(client+"/ca-cert.pem", pemOf(ca.Raw), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serving(t, image, "--listen", "tcp:127.0.0.1:0", "--cache", dir+"/cache", "--tls-cert", dir+"/server-cert.pem", "--tls-key", dir+"/server-key.pem",
		"--tls-client-ca", dir+"/ca-cert.pem")
	if !strings.HasPrefix(s.uri(), "nbds://") {
		t.Errorf("the URI of a server that requires TLS is %s", s.uri())
	}
	with := func() error {
		return exec.Command("nbdinfo", "--size", s.uri()+"?tls-certificates="+client).Run()
	}
	if with() == nil {
		t.Error("a client of another authority is served")
	}
	if err := os.WriteFile(dir+"/ca-cert.pem", append(pemOf(ca.Raw), pemOf(other.Raw)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := with(); err != nil {
		t.Errorf("a client of an authority that was added is not served: %v\n%s", err, s.stderr.String())
	}
	s.term()
}

// Mirrors are as the hosts file says now, for images that are opened from then on.
func TestHostsAreReadAgain(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo")
	reg := startRegistry(t, "", t.TempDir(), "")
	mirror := startProxy(t, reg.addr)
	ref := reg.addr + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", ref)
	dir := t.TempDir()
	hosts := filepath.Join(dir, "hosts")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(hosts+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(hosts+".new", hosts); err != nil {
			t.Fatal(err)
		}
	}
	write("# none\n")
	s := serving(t, "--allow", reg.addr+"/**", "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--hosts", hosts)
	open := func() int {
		t.Helper()
		mirror.take()
		qemuRead(t, "nbd+unix:///"+ref+"?socket="+strings.TrimPrefix(s.ready.Listen[0], "unix:"), "read 0 4k")
		return len(mirror.take())
	}
	if n := open(); n != 0 {
		t.Errorf("%d requests to a mirror that nobody knows", n)
	}
	write(reg.addr + "\n") // a line that means nothing
	if !s.said("the hosts file cannot be read again") {
		t.Errorf("%s", s.stderr.String())
	}
	write(reg.addr + " http://" + mirror.host() + "\n")
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if !s.said("read the hosts file again") {
		t.Errorf("%s", s.stderr.String())
	}
	mirror.take()
	qemuRead(t, "nbd+unix:///"+ref+"?socket="+strings.TrimPrefix(s.ready.Listen[0], "unix:"), "read 20M 8M")
	if len(mirror.take()) == 0 {
		t.Error("the mirror is not asked")
	}
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// A server that is not ready yet ends as soon as it is told to.
func TestTermBeforeReady(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	p.silence()
	cmd := asProgram("serve", p.host()+"/team/app:v1", "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--grace", "1h")
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	var asked []string
	until(t, "it asks for something", func() bool { asked = append(asked, p.take()...); return len(asked) > 0 })
	began := time.Now()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != exitError || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	// A registry that says nothing is given up after 8 s, and asked again.
	asked = append(asked, p.take()...)
	slices.Sort(asked)
	if took := time.Since(began); took > atMost || len(slices.Compact(slices.Clone(asked))) < len(asked) {
		t.Errorf("it was gone after %v, and has asked for %q", took, asked)
	}
}

// What sends a signal to a process and to its group means it once: the recording
// is kept. A later one ends what hangs.
func TestSignalSentTwice(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	image := layoutImage(t)
	for range 10 {
		file := t.TempDir() + "/trace"
		s := launch(t, []string{asThaw + "=deaf"}, image, "--record", file, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
		s.mustBeReady()
		tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", s.uri())
		for range 2 { // the second may find it gone
			if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
		if summary, code := s.stopped(); summary == nil || code != exitOK {
			t.Fatalf("it ended with %d: %v", code, s.err)
		}
		if _, err := os.Stat(file); err != nil {
			t.Fatal(err)
		}
	}

	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	buildOf(t, ref)
	asked := make(chan struct{}, 1000)
	s := serving(t, "--allow", p.host()+"/**", "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--grace", "1m")
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		asked <- struct{}{}
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	})
	read := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", "nbd+unix:///"+ref+"?socket="+strings.TrimPrefix(s.ready.Listen[0], "unix:"))
	if err := startWithUs(read); err != nil {
		t.Fatal(err)
	}
	defer read.Wait()
	select {
	case <-asked:
	case <-time.After(atMost):
		t.Fatal("nothing hangs")
	}
	for end := time.Now().Add(atMost); ; {
		s.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.done:
			return
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(end) {
			t.Fatal("no second signal ends it")
		}
	}
}

// A FIFO that nobody writes to, wherever a file is named, does not outlive SIGTERM;
// and what is written to one is read as from a file.
func TestFIFOForAFile(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	image := layoutImage(t)
	dir := t.TempDir()
	src := strings.TrimSuffix(strings.TrimPrefix(image, "oci:"), "/dst:x") + "/src.tar"
	fifo := dir + "/fifo"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"trace", "show", fifo}, {"trace", "plot", fifo, "-o", dir + "/x.svg"}, {"trace", "push", image, fifo}, {"trace", "pack", image, fifo},
		{"trace", "export", fifo, "--format", "fio"}, {"build", "--size", "64M", "docker-archive:" + src, "oci:" + dir + "/o:x", "--trace", fifo}, {"inspect", image, "--hosts", fifo},
		{"serve", image, "--hosts", fifo, "--grace", "1m"}, {"serve", image, "--tls-cert", fifo, "--tls-key", fifo, "--grace", "1m"},
		{"serve", image, "--trace", fifo, "--grace", "1m"},
	} {
		if args[0] == "serve" {
			args = append(args, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
		}
		cmd := asProgram(args...)
		var stderr syncBuffer
		cmd.Stderr = &stderr
		if err := startWithUs(cmd); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		for end := time.Now().Add(atMost); !waitsForFIFO(cmd.Process.Pid); time.Sleep(10 * time.Millisecond) {
			select {
			case <-ended:
				t.Fatalf("%v: %v\n%s", args, cmd.ProcessState, stderr.String())
			default:
			}
			if time.Now().After(end) {
				t.Fatalf("%v does not open the FIFO\n%s", args, stderr.String())
			}
		}
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			if cmd.ProcessState.ExitCode() < 0 {
				t.Errorf("%v: %v", args, cmd.ProcessState)
			}
		case <-time.After(atMost):
			cmd.Process.Kill()
			<-ended
			t.Errorf("%v: SIGTERM does not end it", args)
		}
	}

	file := dir + "/trace"
	s := serving(t, image, "--record", file, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", s.uri())
	s.term()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	go func() { wrote <- os.WriteFile(fifo, raw, 0) }()
	must(t, "trace", "push", image, fifo)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}

// waitsForFIFO says whether a thread of the process is in the open of a FIFO that
// nobody writes to.
func waitsForFIFO(pid int) bool {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/wchan", pid))
	for _, path := range tasks {
		if b, err := os.ReadFile(path); err == nil && string(b) == "wait_for_partner" {
			return true
		}
	}
	return false
}

// Whatever hangs, a server is gone about a second after its grace.
func TestGraceIsTheEnd(t *testing.T) {
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	b := buildOf(t, ref)
	const grace = 500 * time.Millisecond
	// How long the end takes on this machine when nothing hangs.
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
	began := time.Now()
	s.term()
	idle := time.Since(began)
	is := func(parts ...string) func(*http.Request) bool {
		return func(r *http.Request) bool {
			for _, part := range parts {
				if !strings.Contains(r.Method+" "+r.URL.Path+" "+r.Header.Get("Range"), part) {
					return false
				}
			}
			return true
		}
	}
	for _, c := range []struct {
		what  string
		args  []string
		hangs func(*http.Request) bool
		name  string // of the export; "": the default
		read  string
		wait  bool // until something hangs
	}{
		{"a read", []string{ref, "--fetch-ahead", "none"}, is("GET", "bytes="), "", "read 0 4k", true},
		{"an open", []string{"--allow", p.host() + "/**"}, is("GET", "/manifests/v1"), ref, "read 0 4k", true},
		{"an index", []string{"--allow", p.host() + "/**"}, is("GET", "/blobs/"), ref, "read 0 4k", true},
		{"a prefetch", []string{ref}, is("GET", "bytes="), "", "", true},
		{"what is beside", []string{ref, "--trace", "auto"}, is("GET", "/referrers/"+b.Digest), "", "", false},
		{"a trace's way", []string{ref, "--trace", "auto", "--trace-push", "--fetch-ahead", "none"}, is("POST", "/uploads/"), "", "read 0 4k", false},
		{"a trace of a client's image", []string{"--allow", p.host() + "/**", "--trace", "auto", "--trace-push"}, is("POST", "/uploads/"), ref, "read 0 4k", true},
	} {
		t.Run(c.what, func(t *testing.T) {
			hangs := make(chan struct{}, 1000)
			p.set(func(_ http.ResponseWriter, r *http.Request) bool {
				if !c.hangs(r) {
					return true
				}
				hangs <- struct{}{}
				io.Copy(io.Discard, r.Body) // or else nobody notices that the client goes
				<-r.Context().Done()
				panic(http.ErrAbortHandler)
			})
			s := serving(t, append(c.args, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--grace", grace.String())...)
			if c.read != "" {
				uri := "nbd+unix:///" + c.name + "?socket=" + strings.TrimPrefix(s.ready.Listen[0], "unix:")
				read := exec.Command("qemu-io", "-r", "-f", "raw", "-c", c.read, uri)
				if err := startWithUs(read); err != nil {
					t.Fatal(err)
				}
				defer read.Wait()
				if !c.wait {
					read.Wait()
				}
			}
			if c.wait {
				select {
				case <-hangs:
				case <-time.After(atMost):
					t.Fatalf("nothing hangs:\n%s", s.stderr.String())
				}
			}
			began := time.Now()
			s.term()
			if took := time.Since(began); took > grace+3*time.Second/2+10*idle {
				t.Errorf("it was gone after %v, and after %v when nothing hung:\n%s", took, idle, s.stderr.String())
			}
			for line := range strings.Lines(s.stderr.String()) {
				var m struct{ Msg, File string }
				if json.Unmarshal([]byte(line), &m) == nil && strings.Contains(m.Msg, "could not be stored") {
					if _, err := os.Stat(m.File); err != nil {
						t.Errorf("the recording is lost: %v", err)
					}
				}
			}
		})
	}
}
