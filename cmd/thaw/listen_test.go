package main

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The URIs that are printed work as they are, for each kind of listener.
func TestURIs(t *testing.T) {
	need(t, "nbdinfo", "qemu-img")
	image := layoutImage(t)
	dir := t.TempDir()
	caKey := newECDSA(t)
	ca := certificate(t, dir, "ca", "test authority", caKey, nil, nil)
	certificate(t, dir, "server", "localhost", newECDSA(t), ca, caKey)
	sockets, err := os.MkdirTemp("", "thaw uri+")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	t.Chdir(sockets)
	odd := "oci:" + filepath.Join(dir, "a b&c#d%e")
	if err := os.Rename(strings.TrimSuffix(strings.TrimPrefix(image, "oci:"), ":x"), strings.TrimPrefix(odd, "oci:")); err != nil {
		t.Fatal(err)
	}
	image = odd + ":x"
	size := func(uri string) {
		t.Helper()
		if out, err := exec.Command("nbdinfo", "--size", uri).CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "67108864" {
			t.Errorf("%s: %v\n%s", uri, err, out)
		}
	}
	for i, args := range [][]string{
		{"unix:plain", "unix:a b", "unix:./a+b&c=d%e#f?g", "unix:" + sockets + "/ü", "tcp:127.0.0.1:0", "tcp:[::1]:0"},
		{"tcp:0.0.0.0:0", "tcp:[::]:0", "tcp::0"},
	} {
		for _, two := range []bool{false, true} {
			serve := []string{image, "--cache", filepath.Join(dir, "cache"), "--allow-plaintext"}
			if two {
				serve = append(serve, image+"@"+inspectJSON(t, image).Digest)
			}
			for _, l := range args {
				serve = append(serve, "--listen", l)
			}
			s := serving(t, serve...)
			for _, e := range s.ready.Exports {
				if len(e.URIs) != len(args) || e.URI != e.URIs[0] {
					t.Errorf("%d: %+v", i, e)
				}
				for _, uri := range e.URIs {
					if strings.ContainsAny(strings.TrimPrefix(uri, "nbd+unix"), " +#") || strings.Contains(uri, "0.0.0.0") || strings.Contains(uri, "[::]") {
						t.Errorf("the URI %s", uri)
					}
					size(uri)
				}
			}
			s.term()
		}
	}
	s := serving(t, image, "--listen", "tcp:127.0.0.1:0", "--listen", "unix:tls", "--cache", filepath.Join(dir, "cache"),
		"--tls-cert", dir+"/server-cert.pem", "--tls-key", dir+"/server-key.pem")
	if e := s.ready.Exports[0]; !strings.HasPrefix(e.URIs[0], "nbds://127.0.0.1:") || !strings.HasPrefix(e.URIs[1], "nbds+unix:///?socket=/") {
		t.Errorf("%v", e.URIs)
	}
	size(s.uri() + "?tls-certificates=" + dir + "&tls-verify-peer=false")
	s.term()
	// The abstract namespace has no URI; qemu has a way.
	name := "thaw-test-" + filepath.Base(sockets)[9:]
	s = serving(t, image, "--listen", "unix:@"+name, "--cache", filepath.Join(dir, "cache"))
	if s.uri() != "unix:@"+name {
		t.Errorf("the address is %s", s.uri())
	}
	tool(t, "qemu-img", "info", "--image-opts", "driver=nbd,server.type=unix,server.abstract=on,server.path="+name)
	s.term()
}

// In words ready is one line, with what to pin.
func TestReadyInWords(t *testing.T) {
	image := layoutImage(t)
	cmd := asProgram("serve", image, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGTERM)
	b := make([]byte, 1000)
	n, err := out.Read(b)
	want := strings.TrimSuffix(image, ":x") + "@" + inspectJSON(t, image).Digest + "\n"
	if line := string(b[:n]); err != nil || !strings.HasPrefix(line, "ready: nbd+unix:///?socket=/") || !strings.HasSuffix(line, " "+want) {
		t.Errorf("%q, %v; want %q at the end", line, err, want)
	}
}

// --prefetch-wait ends by time, too, and at once where nothing more comes.
func TestPrefetchWaitIsBounded(t *testing.T) {
	t.Parallel()
	p, _, ref, _ := bundled(t, false)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100", "--prefetch-rate", "10K",
		"--prefetch-wait-for", "300ms", "--grace", "0s")
	if !s.said("less than asked for was prefetched") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.Header.Get("Range"), "bytes=") {
			http.NotFound(w, r)
			return false
		}
		return true
	})
	began := time.Now()
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100", "--prefetch-wait-for", "1h")
	if took := time.Since(began); took > 10*atMost || !s.said("less than asked for was prefetched") {
		t.Errorf("ready after %v\n%s", took, s.stderr.String())
	}
	s.term()
}

// Settings that make no sense are refused in a sentence.
func TestRefusedSettings(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--cache-size", "4M"}, "the least size is 16M"},
		{[]string{"--cache-size", "1"}, "the least size is 16M"},
		{[]string{"--grace", "-1s"}, "--grace"},
		{[]string{"--max-connections", "0"}, "at least 1"},
		{[]string{"--max-connections", "-1"}, "at least 1"},
		{[]string{"--max-in-flight", "1"}, "the least size is 128K"},
		{[]string{"--write-timeout", "-1s"}, "--write-timeout"},
		{[]string{"--idle-timeout", "-1s"}, "--idle-timeout"},
		{[]string{"--prefetch-wait-for", "-1s"}, "--prefetch-wait-for"},
		{[]string{"--allow", "registry.example/"}, "names no repository"},
		{[]string{"--allow", "https://registry.example/**"}, "without https://, as registry.example/**"},
		{[]string{"--allow", "oci-archive:/srv/**"}, "cannot open archives"},
	} {
		args := append([]string{"serve", "oci:/none", "--cache", t.TempDir()}, c.args...)
		if _, stderr, code := thaw(t, args...); code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, want %q\n%s", c.args, code, c.want, stderr)
		}
	}
	image := layoutImage(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--cache-size", "16M", "--write-timeout", "1m", "--idle-timeout", "1m")
	s.term()
}

// The control socket of a server that was killed is replaced, and what does not
// answer is not waited for.
func TestControlSocket(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir, err := os.MkdirTemp("", "thaw") // the path of a socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	stop := func() (string, int) {
		_, stderr, code := thaw(t, "trace", "stop", "--cache", dir)
		return stderr, code
	}
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir, "--record", dir+"/t")
	s.kill()
	if stderr, code := stop(); code != exitError || !strings.Contains(stderr, "no server uses the cache") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir, "--record", dir+"/t")
	qemuRead(t, s.uri(), "read 0 4k")
	if stderr, code := stop(); code != exitOK {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	traceIn(t, dir+"/t")
	s.freeze()
	began := time.Now()
	if stderr, code := stop(); code != exitError || !strings.Contains(stderr, "has not answered") || time.Since(began) > atMost {
		t.Errorf("after %v: exit %d\n%s", time.Since(began), code, stderr)
	}
	s.kill()
	// What somebody answers on is not taken away.
	if err := os.Remove(filepath.Join(dir, "control.sock")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir)
	if !s.said("will not reach this server") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
	if _, err := os.Lstat(filepath.Join(dir, "control.sock")); err != nil {
		t.Error("the socket of another program is gone")
	}
}

// What is announced has stable fields.
func TestAnnouncedFields(t *testing.T) {
	b, err := json.Marshal(announced{Type: "ready", Exports: []announceExport{{"n", "i", "d", 1, true, "u", []string{"u"}, "s"}}, Listen: []string{"l"}, Sockets: "v"})
	want := `{"type":"ready","exports":[{"name":"n","image":"i","digest":"d","bytes":1,"writable":true,"uri":"u","uris":["u"],"socket":"s"}],"listen":["l"],"vhost_user":"v"}`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
}
