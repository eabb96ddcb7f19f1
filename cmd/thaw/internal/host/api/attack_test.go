package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/cmd/thaw/internal/host"
)

// curl asks as another program, and another process, does.
func (b *bed) curl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), atMost)
	defer cancel()
	args = append([]string{"-sS", "--max-time", "50", "--unix-socket", filepath.Join(b.dir, socketName)}, args...)
	out, err := exec.CommandContext(ctx, "curl", args...).CombinedOutput()
	return string(out), err
}

func needCurl(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
}

// A foreign client adds, describes and removes a device. Nobody else can connect.
func TestCurl(t *testing.T) {
	needCurl(t)
	b := newBed(t, host.Options{})
	image := b.push("team/app:v1", blocktest.NewImage(t, 1, 100))
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"http://thaw/v1/status"}, `"state":"starting","version":"v1.2.3"`},
		{[]string{"-d", fmt.Sprintf(`{"name":"root","image":%q}`, image), "http://thaw/v1/devices"}, `{"id":"1","name":"root"`},
		{[]string{"http://localhost/v1/devices/1"}, `"state":"ready"`},
		{[]string{"-X", "POST", "http://thaw/v1/traces/stop"}, `{"stopped":0}`},
		{[]string{"-d", "{", "-o", "-", "-w", "%{http_code}", "http://thaw/v1/devices"}, "400"},
		{[]string{"-X", "DELETE", "-w", "%{http_code}", "http://thaw/v1/devices/1"}, "204"},
		{[]string{"-I", "http://thaw/v1/devices"}, "200 OK"},
		{[]string{"http://thaw/v1/openapi.yaml"}, "openapi: 3.1.0"},
	} {
		if out, err := b.curl(c.args...); err != nil || !strings.Contains(out, c.want) {
			t.Errorf("curl %v: %v\n%s", c.args, err, out)
		}
	}
	if fi, err := os.Stat(filepath.Join(b.dir, socketName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", fi.Mode(), err)
	}
	b.server.Stop(t.Context())
	if _, err := os.Stat(filepath.Join(b.dir, socketName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket of a stopped server: %v", err)
	}
	if _, err := b.client.Status(t.Context()); !errors.Is(err, ErrNoServer) || !strings.Contains(err.Error(), "thaw serve IMAGE --cache "+b.dir) {
		t.Errorf("ask a stopped server: %v", err)
	}
}

// Clients that say nothing, that send one byte a second, or that never read, cost others
// nothing, and are disconnected.
func TestSlowClients(t *testing.T) {
	needCurl(t)
	b := newBed(t, host.Options{})
	open := func() int {
		b.server.conns.mu.Lock()
		defer b.server.conns.mu.Unlock()
		return len(b.server.conns.open)
	}
	// Whoever is answered does not owe that to the time that the slow ones have.
	b.restart(bounds{header: time.Hour, body: time.Hour, write: time.Hour, idle: time.Hour})
	for i := range 3 * maxConns {
		b.slow(i)
		if i%16 == 0 {
			if out, err := b.curl("http://thaw/v1/status"); err != nil || !strings.Contains(out, `"state"`) {
				t.Fatalf("with %d slow clients: %v\n%s", i, err, out)
			}
		}
	}
	if n := open(); n > maxConnsProcess+1 {
		t.Errorf("%d connections are open", n)
	}
	// Each has a bounded time: also those that read nothing, and stay.
	b.restart(defaultBounds)
	for i := range maxConnsProcess {
		b.slow(i)
	}
	if out, err := b.curl("http://thaw/v1/status"); err != nil { // they are accepted before
		t.Errorf("%v\n%s", err, out)
	}
	await(t, "all are disconnected", func() bool { return open() == 0 })
}

// slow connects as a slow client of some kind.
func (b *bed) slow(kind int) {
	b.t.Helper()
	c := b.dial()
	switch kind % 4 {
	case 1:
		fmt.Fprintf(c, "GET /v1/status HTTP/1.1\r\nHost: th") // and no more of the header
	case 2:
		fmt.Fprintf(c, "POST /v1/traces/stop HTTP/1.1\r\nHost: thaw\r\nContent-Length: 100\r\n\r\n{") // nor of the body
	case 3:
		for range 100 {
			fmt.Fprintf(c, "GET /v1/openapi.yaml HTTP/1.1\r\nHost: thaw\r\n\r\n") // and reads no answer
		}
	}
}

// Requests that wait are bounded for each process, and do not hold up others.
func TestManyWaits(t *testing.T) {
	needCurl(t)
	b := newBed(t, host.Options{})
	b.silent()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var busy atomic.Int64
	var wg sync.WaitGroup
	for i := range 3 * maxWaitsProcess {
		wg.Go(func() {
			_, err := b.client.AddDevice(ctx, host.Spec{Name: fmt.Sprint("d", i), Image: fmt.Sprintf("%s/team/app:v%d", b.registry, i)})
			var answer *Error
			if errors.As(err, &answer) && answer.Code == http.StatusServiceUnavailable {
				busy.Add(1)
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("add: %v", err)
			}
		})
	}
	await(t, "the rest is refused", func() bool { return busy.Load() == 2*maxWaitsProcess })
	if out, err := b.curl("-X", "POST", "http://thaw/v1/traces/stop"); err != nil || !strings.Contains(out, `{"stopped":0}`) {
		t.Errorf("another process: %v\n%s", err, out)
	}
	// A request that waits is counted before its device is there.
	await(t, "the others open their devices", func() bool {
		st, err := b.client.Status(t.Context())
		if err != nil || st.Devices.Opening > maxWaitsProcess || st.State != host.Starting {
			t.Fatalf("%+v, %v", st, err)
		}
		return st.Devices.Opening == maxWaitsProcess
	})
	// Clients that leave take their devices with them.
	leave()
	wg.Wait()
	await(t, "nothing is being opened", func() bool { return len(b.host.Devices()) == 0 })
	await(t, "nothing waits", func() bool {
		b.server.conns.mu.Lock()
		defer b.server.conns.mu.Unlock()
		for _, c := range b.server.conns.open {
			if c.busy {
				return false
			}
		}
		return true
	})
}

// A body that is too large is refused before it is read, whatever its client claims.
func TestHugeRequests(t *testing.T) {
	b := newBed(t, host.Options{})
	for what, request := range map[string]string{
		"413 length":  "POST /v1/devices HTTP/1.1\r\nHost: thaw\r\nContent-Length: 9000000000000000\r\n\r\n{",
		"413 expect":  "POST /v1/devices HTTP/1.1\r\nHost: thaw\r\nExpect: 100-continue\r\nContent-Length: 100000\r\n\r\n",
		"413 chunked": "POST /v1/devices HTTP/1.1\r\nHost: thaw\r\nTransfer-Encoding: chunked\r\n\r\n20000\r\n" + strings.Repeat(" ", 0x20000) + "\r\n0\r\n\r\n",
		"413 get":     "GET /v1/status HTTP/1.1\r\nHost: thaw\r\nContent-Length: 100000\r\n\r\n",
		"431 header":  "GET /v1/status HTTP/1.1\r\nHost: thaw\r\nX: " + strings.Repeat("x", 20000) + "\r\n\r\n",
		"400 no HTTP": "\x00\x01\x02\r\n\r\n",
		"400 both":    "POST /v1/devices HTTP/1.1\r\nHost: thaw\r\nContent-Length: -1\r\n\r\n",
	} {
		c := b.dial()
		go io.WriteString(c, request)
		c.SetReadDeadline(time.Now().Add(atMost))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if want, _, _ := strings.Cut(what, " "); fmt.Sprint(resp.StatusCode) != want {
			t.Errorf("%s: %s", what, resp.Status)
		}
		resp.Body.Close()
		c.Close()
	}
	if _, err := b.client.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// One of many that add a device of one name at once has it, and it is opened once. Of
// many that remove it, each hears that it is gone.
func TestOneNameAtOnce(t *testing.T) {
	b := newBed(t, host.Options{})
	image := b.push("team/app:v1", blocktest.NewImage(t, 1, 100))
	for range 5 {
		var added, conflicts atomic.Int64
		var wg sync.WaitGroup
		for range maxWaitsProcess {
			wg.Go(func() {
				_, err := b.client.AddDevice(t.Context(), host.Spec{Name: "root", Image: image})
				var answer *Error
				switch {
				case err == nil:
					added.Add(1)
				case errors.As(err, &answer) && answer.Code == http.StatusConflict:
					conflicts.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		devices, err := b.client.Devices(t.Context())
		if err != nil || len(devices) != 1 || added.Load() != 1 || conflicts.Load() != maxWaitsProcess-1 {
			t.Fatalf("%d have added it, %d were refused: %+v, %v", added.Load(), conflicts.Load(), devices, err)
		}
		var removed atomic.Int64
		for range maxWaitsProcess {
			wg.Go(func() {
				closed, err := b.client.RemoveDevice(t.Context(), devices[0].ID, false)
				var answer *Error
				if closed {
					removed.Add(1)
				} else if !errors.As(err, &answer) || answer.Code != http.StatusNotFound && answer.Code != http.StatusConflict {
					t.Errorf("%v, %v", closed, err)
				}
			})
		}
		wg.Wait()
		if removed.Load() != 1 {
			t.Errorf("%d have removed it", removed.Load())
		}
	}
}

// A device that a client reads is not taken from it, and a device that is being opened
// can be removed.
func TestRemoveInUse(t *testing.T) {
	b := newBed(t, host.Options{})
	m := blocktest.NewImage(t, 1, 300)
	b.add("root", b.push("team/app:v1", m))
	d, release, err := b.host.Acquire(t.Context(), "root", nil)
	if err != nil {
		t.Fatal(err)
	}
	var answer *Error
	if _, err := b.client.RemoveDevice(t.Context(), d.ID(), false); !errors.As(err, &answer) || answer.Code != http.StatusConflict || !strings.Contains(err.Error(), "1 clients") {
		t.Errorf("remove: %v", err)
	}
	if in, err := b.client.Device(t.Context(), d.ID()); err != nil || in.State != host.Ready || !in.Permanent || in.Users != 1 {
		t.Errorf("%+v, %v", in, err)
	}
	if closed, err := b.client.RemoveDevice(t.Context(), d.ID(), true); closed || err != nil {
		t.Errorf("drain: %v, %v", closed, err)
	}
	got := make([]byte, len(m.Content))
	if err := blockmap.ReadInto(t.Context(), d.Block(), blockmap.Extent{End: int64(len(got))}, got); err != nil || string(got) != string(m.Content) {
		t.Errorf("read it after: %v", err)
	}
	release()
	await(t, "it is closed", func() bool { return len(b.host.Devices()) == 0 })

	b.silent()
	failed := make(chan error, 1)
	go func() {
		_, err := b.client.AddDevice(t.Context(), host.Spec{Name: "slow", Image: b.registry + "/team/slow:v1"})
		failed <- err
	}()
	await(t, "it is being opened", func() bool { return len(b.host.Devices()) == 1 })
	if closed, err := b.client.RemoveDevice(t.Context(), b.host.Devices()[0].ID(), false); !closed || err != nil {
		t.Errorf("remove what is being opened: %v, %v", closed, err)
	}
	if err := <-failed; !errors.As(err, &answer) || answer.Code != http.StatusConflict {
		t.Errorf("add what is removed: %v", err)
	}
}

// A server that stops answers requests that wait, says what it is at, and opens nothing.
func TestStopDuringRequests(t *testing.T) {
	b := newBed(t, host.Options{})
	b.restart(bounds{header: atMost, body: atMost, write: atMost, idle: atMost, stop: atMost, add: atMost})
	image := b.push("team/app:v1", blocktest.NewImage(t, 1, 100))
	d := b.add("root", image)
	_, release, err := b.host.Acquire(t.Context(), "root", nil)
	if err != nil {
		t.Fatal(err)
	}
	b.host.SetServing()
	b.silent()
	waiting := make(chan error, 1)
	go func() {
		_, err := b.client.AddDevice(t.Context(), host.Spec{Image: b.registry + "/team/slow:v1"})
		waiting <- err
	}()
	await(t, "it is being opened", func() bool { return len(b.host.Devices()) == 2 })
	b.host.SetStopping()
	st, err := b.client.Status(t.Context())
	if err != nil || st.State != host.Stopping || st.Devices.Ready != 1 || st.Devices.Opening != 1 {
		t.Errorf("%+v, %v", st, err)
	}
	var answer *Error
	if _, err := b.client.AddDevice(t.Context(), host.Spec{Name: "other", Image: image}); !errors.As(err, &answer) || answer.Code != http.StatusServiceUnavailable {
		t.Errorf("add: %v", err)
	}
	draining := make(chan error, 1)
	go func() {
		_, err := b.client.RemoveDevice(t.Context(), d.ID, true)
		draining <- err
	}()
	await(t, "it is closing", func() bool { return !b.host.Device(d.ID).Info().Permanent })
	b.server.Stop(t.Context())
	if err := <-waiting; !errors.As(err, &answer) || answer.Code != http.StatusServiceUnavailable {
		t.Errorf("the request that waited: %v", err)
	}
	if err := <-draining; err != nil {
		t.Errorf("the removal that waited: %v", err)
	}
	release()
}

// What the server tells is what happens, also while a registry is slow.
func TestStatusOfSlowOrigin(t *testing.T) {
	b := newBed(t, host.Options{})
	m := blocktest.NewImage(t, 1, 4000)
	image := b.push("team/app:v1", m)
	var stored int64
	for _, blob := range m.Blobs {
		stored += int64(len(blob))
	}
	pass := make(chan struct{})
	var passed atomic.Int64
	b.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
			select { // one request at a time, when the test says so
			case <-pass:
				passed.Add(1)
			case <-r.Context().Done():
				return false
			}
		}
		return true
	})
	d := b.add("root", image)
	if d.State != host.Ready || d.Resident != 0 || d.Stored != stored || d.Digest == "" {
		t.Errorf("%+v", d)
	}
	_, release, err := b.host.Acquire(t.Context(), "root", nil)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		defer release()
		got := make([]byte, len(m.Content))
		read <- blockmap.ReadInto(t.Context(), b.host.Device(d.ID).Block(), blockmap.Extent{End: int64(len(got))}, got)
	}()
	status := func() host.Status {
		t.Helper()
		st, err := b.client.Status(t.Context()) // which the registry could hold up for ever
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	await(t, "requests hang", func() bool { return status().Counts.InFlight > 0 })
	if st := status(); st.Counts.Bytes != 0 || st.Rates.Fetched != 0 || st.Counts.Chunks != 0 {
		t.Errorf("nothing has come: %+v", st)
	}
	select {
	case pass <- struct{}{}:
	case <-time.After(atMost):
		t.Fatal("no request")
	}
	await(t, "some of it has come", func() bool { return status().Counts.Chunks > 0 })
	st := status()
	in, err := b.client.Device(t.Context(), d.ID)
	if err != nil || in.Users != 1 || in.Resident == 0 || in.Resident > in.Content {
		t.Errorf("%+v, %v", in, err)
	}
	if per := st.Rates.Fetched * st.Rates.Seconds; st.Rates.Fetched <= 0 || per > float64(st.Counts.Bytes)*1.01 {
		t.Errorf("a rate of %v for %v s, of %d bytes", st.Rates.Fetched, st.Rates.Seconds, st.Counts.Bytes)
	}
	close(pass)
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if in, err = b.client.Device(t.Context(), d.ID); err != nil || in.Resident != in.Content {
		t.Errorf("all was read: %+v, %v", in, err)
	}
	await(t, "no request is in flight", func() bool { return status().Counts.InFlight == 0 })
	var chunks int64
	for i := range m.Index.Streams {
		chunks += int64(len(m.Index.Streams[i].Chunks))
	}
	// A chunk that is late on a busy machine is requested once more.
	if st := status(); st.Counts.Bytes > stored && st.Counts.Extra == 0 || st.Counts.Chunks+st.Counts.Local != chunks || st.Counts.Failed != 0 {
		t.Errorf("all %d chunks of %d bytes were read: %+v", chunks, stored, st)
	}
}

// Requests of any kind get an answer that openapi.yaml has. The host has stopped, so
// that no registry is asked.
func FuzzRequests(f *testing.F) {
	for _, s := range []string{"", "{}", `{"image":"a/b:c"}`, `{"name":"x","image":"registry.example/a:1"}`, `{"device":"1"}`, "[1", "\xff"} {
		for _, target := range []string{"/v1/devices", "/v1/devices/1?drain=true", "/v1/traces/stop", "/v1/status", "/%2e", "*"} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				f.Add(method, target, s)
			}
		}
	}
	b := newBed(f, host.Options{})
	b.host.Stop(f.Context())
	f.Fuzz(func(t *testing.T, method, target, body string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(
			method + " " + target + " HTTP/1.1\r\nHost: thaw\r\nContent-Length: " + fmt.Sprint(len(body)) + "\r\n\r\n" + body)))
		if err != nil {
			return
		}
		w := &recorder{header: make(http.Header)}
		b.server.answer(w, r)
		checker := &bed{t: t, doc: b.doc, answers: make(map[string]bool)}
		checker.check(r, &http.Response{StatusCode: w.code, Header: w.header}, []byte(w.body.String()))
	})
}

type recorder struct {
	header http.Header
	code   int
	body   strings.Builder
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(code int)        { r.code = code }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// JSON would change what is not UTF-8, and the server would make an overlay in another
// directory than the one that was named.
func TestClientSendsNamesAsTheyAre(t *testing.T) {
	b := newBed(t, host.Options{})
	image := b.push("team/app:v1", blocktest.NewImage(t, 1, 5))
	dir := t.TempDir()
	for name, utf8 := range map[string]bool{"a\xffb": false, `a\ufffdb`: true, "a\ufffdb": true} {
		spec := host.NodeSpec{Image: image, Overlay: filepath.Join(dir, name), Driver: "floppy"} // refused before anything is made
		if _, err := b.client.Attach(t.Context(), spec); err == nil || strings.Contains(err.Error(), "UTF-8") == utf8 {
			t.Errorf("%q: %v", name, err)
		}
	}
}
