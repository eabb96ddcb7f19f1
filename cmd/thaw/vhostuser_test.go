package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// sockets is a directory for sockets, whose paths are short.
func sockets(t testing.TB) string { return filepath.Join(cacheDir(t), "vm") }

// controlCall asks the control socket of a server.
func controlCall(t testing.TB, cache, method, path, body string) (code int, answer string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://thaw"+path, strings.NewReader(body))
	check(t, err)
	resp, err := (&http.Client{Timeout: 5 * atMost, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", cache+"/control.sock")
	}}}).Do(req)
	check(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	check(t, err)
	return resp.StatusCode, string(b)
}

// A virtual machine reads what NBD clients read, from a socket that is for this user only.
// Both kinds of clients are in the list and in the status. The socket goes with the server.
func TestVhostUserReadOnly(t *testing.T) {
	need(t, "nbdcopy")
	image := layoutImage(t)
	dir, cache := sockets(t), cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--vhost-user", dir, "--cache", cache)
	e := s.ready.Exports[0]
	path := filepath.Join(dir, "default.sock")
	if e.Socket != path || s.ready.Sockets != dir || e.URI == "" || e.Writable {
		t.Fatalf("%+v", s.ready)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode() != fs.ModeDir|0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	want, err := os.ReadFile(device(t, s.uri()))
	check(t, err)
	one, two := newMachine(t), newMachine(t)
	one.mustConnect(path)
	two.mustConnect(path)
	if one.size() != int64(len(want)) || one.features&featureRO == 0 {
		t.Errorf("the disk has %d bytes and features %#x", one.size(), one.features)
	}
	for off := 0; off < len(want); off += 3 << 20 {
		n := min(slotData, len(want)-off)
		for _, m := range []*machine{one, two} {
			if !bytes.Equal(m.read(int64(off), n), want[off:off+n]) {
				t.Fatalf("other bytes at %d", off)
			}
		}
	}
	if status := one.write(0, make([]byte, 4096)); status == 0 {
		t.Error("a write to a read-only disk succeeds")
	}
	if d := listed(t, cache, image); d.Users != 2 || d.Socket != path {
		t.Errorf("%+v", d)
	}
	st := decoded[shownStatus](t, must(t, "status", "--json", "--cache", cache))
	if v := st.Counts.VhostUser; v == nil || v.Conns != 2 || v.Hits+v.Misses < 2 || v.Read < 2*slotData || v.Errors != 1 || st.Rates.Reads == 0 {
		t.Errorf("%+v, %+v", v, st.Rates)
	}
	if out := must(t, "status", "--cache", cache); !strings.Contains(out, "connected by NBD, 2 virtual machines\n") || !strings.Contains(out, " read by virtual machines; ") {
		t.Errorf("%s", out)
	}
	if out := must(t, "list", "--cache", cache); !strings.Contains(out, "  socket\n") || !strings.HasSuffix(out, "  "+path+"\n") {
		t.Errorf("%s", out)
	}
	two.disconnect()
	for end := time.Now().Add(atMost); listed(t, cache, image).Users != 1; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a machine that has gone still counts")
		}
	}
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	if names := dirOf(t, dir); len(names) != 0 {
		t.Errorf("left behind: %q", names)
	}
}

// Without --listen there is no NBD, and the ready line names the socket.
func TestVhostUserAlone(t *testing.T) {
	image := layoutImage(t)
	dir := sockets(t)
	cmd := asProgram("serve", image, "--vhost-user", dir, "--cache", t.TempDir())
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, startWithUs(cmd))
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGTERM)
	b := make([]byte, 1000)
	n, err := out.Read(b)
	want := fmt.Sprintf("ready: vhost-user:%s/default.sock %s@%s\n", dir, strings.TrimSuffix(image, ":x"), inspectJSON(t, image).Digest)
	if err != nil || string(b[:n]) != want {
		t.Errorf("%q, %v, want %q", b[:n], err, want)
	}
	m := newMachine(t)
	m.mustConnect(dir + "/default.sock")
	m.read(0, 4096)
}

// An NBD client and a virtual machine share an overlay. One virtual machine has it at a time.
func TestVhostUserOverlay(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	image := layoutImage(t)
	dir, cache, overlay := sockets(t), cacheDir(t), filepath.Join(t.TempDir(), "o")
	args := []string{image, "--listen", "unix:" + socket(t), "--vhost-user", dir, "--cache", cache, "--overlay", overlay}
	s := serving(t, args...)
	path := s.ready.Exports[0].Socket
	m := newMachine(t)
	m.mustConnect(path)
	if m.features&(featureRO|featureFlush) != featureFlush {
		t.Errorf("features %#x", m.features)
	}
	if status := m.write(32<<20, bytes.Repeat([]byte{0x11}, slotData)); status != 0 {
		t.Fatalf("status %d", status)
	}
	qemuWrite(t, s.uri(), "read -P 0x11 32M 64k", "write -P 0x22 33M 64k", "flush")
	if !bytes.Equal(m.read(33<<20, slotData), bytes.Repeat([]byte{0x22}, slotData)) {
		t.Error("the machine does not see what the NBD client wrote")
	}
	if o := listed(t, cache, image).Overlay; o == nil || o.Data != 2*slotData {
		t.Errorf("%+v", o)
	}
	other := newMachine(t)
	begin := time.Now()
	if err := other.connect(path); err == nil {
		t.Error("two machines have a writable disk")
	}
	if !s.said("it is writable, and another virtual machine uses it") {
		t.Errorf("after %v:\n%s", time.Since(begin), s.stderr.String())
	}
	m.read(0, 4096)
	m.disconnect()
	other.mustConnect(path)
	if !bytes.Equal(other.read(32<<20, slotData), bytes.Repeat([]byte{0x11}, slotData)) {
		t.Error("the next machine has other bytes")
	}
	s.term()
	s = serving(t, args...)
	other.mustConnect(path)
	if !bytes.Equal(other.read(33<<20, slotData), bytes.Repeat([]byte{0x22}, slotData)) {
		t.Error("after a restart the machine has other bytes")
	}
	s.term()
}

// Each machine has a disk of its own over one image, by IMAGE~NAME on the command line and by
// the control socket. They share the cache, and each has its socket.
func TestVhostUserMachines(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	image := layoutImage(t)
	for _, mode := range []string{"--overlay-each", "--ephemeral"} {
		dir, cache, overlays := sockets(t), cacheDir(t), filepath.Join(t.TempDir(), "vms")
		args := []string{image, image + "~vm-1", image + "~vm-2", "--listen", "unix:" + socket(t), "--vhost-user", dir, "--cache", cache, mode}
		if mode == "--overlay-each" {
			args = append(args, overlays)
		}
		s := serving(t, args...)
		writable := func(i int) bool { return i > 0 || mode == "--ephemeral" }
		var paths []string
		for i, e := range s.ready.Exports {
			paths = append(paths, e.Socket)
			if e.Writable != writable(i) || e.Name != args[i] {
				t.Errorf("%+v", e)
			}
		}
		if len(paths) != 3 || paths[1] != dir+"/vm-1.sock" || paths[2] != dir+"/vm-2.sock" {
			t.Fatalf("%q", paths)
		}
		code, answer := controlCall(t, cache, "POST", "/v1/devices", fmt.Sprintf(`{"image": %q}`, image+"~vm-3"))
		added := decoded[host.DeviceInfo](t, answer)
		if code != http.StatusCreated || added.Socket != dir+"/vm-3.sock" || added.Overlay == nil {
			t.Fatalf("%s: %d %s", mode, code, answer)
		}
		paths = append(paths, added.Socket)
		var machines []*machine
		for i, path := range paths {
			m := newMachine(t)
			m.mustConnect(path)
			machines = append(machines, m)
			if status := m.write(40<<20, bytes.Repeat([]byte{byte(i)}, 4096)); (status == 0) != writable(i) {
				t.Errorf("%s: a write to %s: status %d", mode, path, status)
			}
		}
		for i, m := range machines {
			if got := m.read(40<<20, 4096); !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, 4096)) { // 0 in the image
				t.Errorf("%s: machine %d reads %d", mode, i, got[0])
			}
		}
		// The same overlays by NBD, also of the default export, which is the image itself.
		qemuWrite(t, s.as("~vm-1"), "read -P 1 40M 4k")
		qemuWrite(t, s.as(image+"~vm-3"), "read -P 3 40M 4k")
		qemuRead(t, s.as(""), "read -P 0 40M 4k")
		if n := len(listDevices(t, cache)); n != 4 {
			t.Errorf("%s: %d devices, want 4", mode, n)
		}

		// A device that is removed has no socket. Its machine keeps it until it leaves.
		if code, answer := controlCall(t, cache, "DELETE", "/v1/devices/"+added.ID, ""); code != http.StatusConflict {
			t.Errorf("%d %s", code, answer)
		}
		machines[3].read(0, 4096)
		if _, err := os.Stat(added.Socket); err != nil {
			t.Error(err)
		}
		if code, answer := controlCall(t, cache, "DELETE", "/v1/devices/"+added.ID+"?drain=true", ""); code != http.StatusAccepted {
			t.Errorf("%d %s", code, answer)
		}
		machines[3].read(0, 4096)
		if err := newMachine(t).connect(added.Socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("connect to a device that was removed: %v", err)
		}
		machines[3].disconnect()
		for end := time.Now().Add(atMost); len(listDevices(t, cache)) != 3; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: the device is not closed", mode)
			}
		}
		if _, code := s.term(); code != exitOK {
			t.Errorf("exit %d\n%s", code, s.stderr.String())
		}
		if names := dirOf(t, dir); len(names) != 0 {
			t.Errorf("left behind: %q", names)
		}
		if mode == "--overlay-each" && strings.Join(dirOf(t, overlays), " ") != "vm-1 vm-2 vm-3" {
			t.Errorf("%q", dirOf(t, overlays))
		}
	}
}

// A server without images serves the devices that the control socket adds. Names that would have
// one socket are refused, by the command line as well.
func TestVhostUserNames(t *testing.T) {
	image := layoutImage(t)
	dir, cache := sockets(t), cacheDir(t)
	s := serving(t, "--vhost-user", dir, "--cache", cache, "--ephemeral")
	if len(s.ready.Exports) != 0 || s.ready.Sockets != dir || len(s.ready.Listen) != 0 {
		t.Errorf("%+v", s.ready)
	}
	add := func(name, image string, want int) string {
		t.Helper()
		code, answer := controlCall(t, cache, "POST", "/v1/devices", fmt.Sprintf(`{"name": %q, "image": %q}`, name, image))
		if code != want {
			t.Errorf("add %s: %d, want %d: %s", name, code, want, answer)
		}
		return answer
	}
	first := decoded[host.DeviceInfo](t, add("web-1/root", image, http.StatusCreated))
	if first.Socket != dir+"/web-1_root.sock" {
		t.Errorf("%+v", first)
	}
	if answer := add("web-1:root", image, http.StatusConflict); !strings.Contains(answer, "would have the same socket") {
		t.Errorf("%s", answer)
	}
	add("other", image+"~vm", http.StatusBadRequest) // a client's device has its own name
	one, two := newMachine(t), newMachine(t)
	one.mustConnect(first.Socket)
	two.mustConnect(decoded[host.DeviceInfo](t, add("web-2", image, http.StatusCreated)).Socket)
	if one.write(0, bytes.Repeat([]byte{7}, 4096)) != 0 || bytes.Equal(one.read(0, 4096), two.read(0, 4096)) {
		t.Error("two devices share what is written")
	}
	one.disconnect()
	for end := time.Now().Add(atMost); ; time.Sleep(10 * time.Millisecond) {
		if code, _ := controlCall(t, cache, "DELETE", "/v1/devices/"+first.ID, ""); code == http.StatusNoContent {
			break
		} else if code != http.StatusConflict || time.Now().After(end) { // the machine may not have left yet
			t.Fatalf("remove: %d", code)
		}
	}
	add("web-1:root", image, http.StatusCreated)
	s.term()

	// Other settings that are refused.
	file := filepath.Join(t.TempDir(), "file")
	check(t, os.WriteFile(file, nil, 0o600))
	open := filepath.Join(t.TempDir(), "open")
	check(t, os.Mkdir(open, 0o700))
	check(t, os.Chmod(open, 0o777))
	taken := filepath.Join(cacheDir(t), "taken")
	check(t, os.Mkdir(taken, 0o700))
	check(t, os.WriteFile(filepath.Join(taken, "default.sock"), nil, 0o600))
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{image, "--vhost-user", file}, exitError, "directory of sockets for virtual machines"},
		{[]string{image, "--vhost-user", open}, exitError, "other users can write to"},
		{[]string{image, "--vhost-user", taken}, exitError, "exists and is not a socket"},
		{[]string{image, "--vhost-user", filepath.Join(t.TempDir(), strings.Repeat("x", 100))}, exitError, "choose a shorter one"},
		{[]string{image + "~vm", "--vhost-user", dir}, exitUsage, "add --overlay-each DIR to keep them, or --ephemeral"},
		{[]string{image, image + "~vm", "--vhost-user", dir, "--overlay", file}, exitUsage, "--overlay keeps the changes of one image"},
		{[]string{image + "~vm", image + "~vm", "--vhost-user", dir, "--ephemeral"}, exitUsage, "there is a device"},
		{[]string{"--allow", "**", "--vhost-user", dir}, exitUsage, "add --listen ADDRESS"},
		{[]string{"--nodes-only", "--vhost-user", dir}, exitUsage, "--nodes-only takes no IMAGE"},
	} {
		args := append([]string{"serve", "--cache", t.TempDir()}, c.args...)
		if _, stderr, code := thaw(t, args...); code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: exit %d, want %d and %q\n%s", c.args, code, c.code, c.want, stderr)
		}
	}
	if names := dirOf(t, dir); len(names) != 0 {
		t.Errorf("left behind: %q", names)
	}
}

// One image, pinned, for several machines: --pin without a name is for it.
func TestVhostUserPin(t *testing.T) {
	image := layoutImage(t)
	digest := inspectJSON(t, image).Digest
	args := []string{image, image + "~a", "--vhost-user", sockets(t), "--cache", cacheDir(t), "--ephemeral", "--pin"}
	s := serving(t, append(args, digest)...)
	for _, e := range s.ready.Exports {
		if e.Digest != digest {
			t.Errorf("%+v", e)
		}
	}
	s.term()
	_, stderr, code := thaw(t, append(append([]string{"serve"}, args...), "sha256:"+strings.Repeat("0", 64))...)
	if code != exitError || !strings.Contains(stderr, "is not the pinned one") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

// The server is killed under a virtual machine, with reads in flight that wait for the
// registry, and started again. Its stale socket is replaced, the machine connects again, and
// each request is completed once, with the right bytes. Nothing that was written is lost.
func TestVhostUserKill(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", "--chunk-size", "64K", ref)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	want, err := os.ReadFile(device(t, s.uri()))
	check(t, err)
	s.term()
	var cold []int64 // places with content, in different chunks
	for off := 1 << 20; off < 60<<20; off += 512 << 10 {
		content := true
		for at := off + 4096; at < off+5*4096; at += 4096 {
			content = content && !bytes.Equal(want[at:at+4096], make([]byte, 4096))
		}
		if content {
			cold = append(cold, int64(off))
		}
	}
	if len(cold) < 4 {
		t.Fatalf("content at %v only", cold)
	}

	dir, cache, overlay := sockets(t), cacheDir(t), filepath.Join(t.TempDir(), "o")
	serve := func() *server {
		return serving(t, ref, "--vhost-user", dir, "--cache", cache, "--overlay", overlay, "--fetch-ahead", "none")
	}
	s = serve()
	path := s.ready.Exports[0].Socket
	m := newMachine(t)
	m.mustConnect(path)
	waiting := make(chan struct{}, 1000)
	asked := func() {
		t.Helper()
		select {
		case <-waiting:
		case <-time.After(atMost):
			t.Fatal("the registry is not asked")
		}
	}
	for round := range 3 {
		written := bytes.Repeat([]byte{byte(round + 1)}, slotData)
		off := int64(60<<20 + round*slotData)
		if status := m.write(off, written); status != 0 {
			t.Fatalf("status %d", status)
		}
		waiting = make(chan struct{}, 1000)
		p.set(func(w http.ResponseWriter, r *http.Request) bool { // the registry hangs
			if r.Header.Get("Range") == "" {
				return true
			}
			waiting <- struct{}{}
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		})
		at := cold[round] // what no earlier round has fetched
		for slot := 1; slot <= 4; slot++ {
			m.begin(slot, diskRead, at+int64(slot)*4096, nil, 4096)
		}
		asked()
		// A write that is answered while they wait.
		if status := m.write(off+32<<10, bytes.Repeat([]byte{0xaa}, 4096)); status != 0 {
			t.Fatalf("status %d", status)
		}
		copy(written[32<<10:], bytes.Repeat([]byte{0xaa}, 4096))
		s.kill()
		if _, err := os.Lstat(path); err != nil {
			t.Fatalf("a killed server has removed its socket: %v", err)
		}
		if m.ended(1) {
			t.Fatal("a read has ended that waits for the registry")
		}
		p.set(nil)
		s = serve()
		m.mustConnect(path)
		for slot := 1; slot <= 4; slot++ {
			at := at + int64(slot)*4096
			if status, got := m.end(slot, 4096); status != 0 || !bytes.Equal(got, want[at:at+4096]) {
				t.Errorf("round %d: read at %d: status %d, or wrong bytes", round, at, status)
			}
		}
		if got := m.read(off, slotData); !bytes.Equal(got, written) {
			t.Errorf("round %d: what was written is gone", round)
		}
		if v := decoded[shownStatus](t, must(t, "status", "--json", "--cache", cache)).Counts.VhostUser; v.Resumed != 4 || v.Errors != 0 {
			t.Errorf("round %d: %+v", round, v)
		}
	}

	// SIGTERM lets a read finish that waits for the registry.
	release := make(chan struct{})
	waiting = make(chan struct{}, 1000)
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			waiting <- struct{}{}
			<-release
		}
		return true
	})
	at := cold[3]
	m.begin(1, diskRead, at+4096, nil, 4096)
	asked()
	check(t, s.cmd.Process.Signal(syscall.SIGTERM))
	for end := time.Now().Add(atMost); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) { // it stops
			break
		}
		if time.Now().After(end) {
			t.Fatal("the server does not stop")
		}
	}
	close(release)
	if status, got := m.end(1, 4096); status != 0 || !bytes.Equal(got, want[at+4096:at+2*4096]) {
		t.Errorf("a read during the grace: status %d, or wrong bytes", status)
	}
	<-s.done
	if code := s.cmd.ProcessState.ExitCode(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// A second server does not take the socket of the first one.
func TestVhostUserSocketInUse(t *testing.T) {
	image := layoutImage(t)
	dir := sockets(t)
	s := serving(t, image, "--vhost-user", dir, "--cache", cacheDir(t))
	_, stderr, code := thaw(t, "serve", image, "--vhost-user", dir, "--cache", t.TempDir())
	if code != exitError || !strings.Contains(stderr, "the address is in use by another program") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
	m := newMachine(t)
	m.mustConnect(s.ready.Exports[0].Socket)
	m.read(0, 4096)
	s.term()
}

// Whoever has one socket can open many connections, send garbage and hold them. Others notice
// nothing.
func TestVhostUserHostile(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir, cache := sockets(t), cacheDir(t)
	s := serving(t, image+"~good", image+"~bad", "--listen", "unix:"+socket(t), "--vhost-user", dir, "--cache", cache, "--ephemeral")
	bad := dir + "/bad.sock"
	good := newMachine(t)
	good.mustConnect(dir + "/good.sock")
	var held []net.Conn
	defer func() {
		for _, nc := range held {
			nc.Close()
		}
	}()
	for i := range 600 {
		nc, err := net.DialTimeout("unix", bad, atMost)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, nc)
		switch i % 3 {
		case 0:
			nc.Write(bytes.Repeat([]byte{0xff}, 100))
		case 1:
			nc.Write([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}[:i%12])
		}
	}
	if status := good.write(8<<20, bytes.Repeat([]byte{5}, 4096)); status != 0 {
		t.Errorf("status %d", status)
	}
	more := newMachine(t)
	good.disconnect()
	more.mustConnect(dir + "/good.sock")
	if got := more.read(8<<20, 4096); got[0] != 5 {
		t.Errorf("read %d", got[0])
	}
	qemuRead(t, s.as(image+"~good"), "read -P 5 8M 4k")
	if !s.said("too many connections are open") {
		t.Errorf("nothing is refused:\n%s", s.stderr.String())
	}
	v := decoded[shownStatus](t, must(t, "status", "--json", "--cache", cache)).Counts.VhostUser
	if v.Conns > 257 {
		t.Errorf("%d connections are open", v.Conns)
	}
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// A guest of QEMU reads and writes its disk, by vhost-user and by NBD: SeaBIOS with its driver, and a boot sector that
// reads sector 0x10000 and writes it to sector 0x10008.
func TestVhostUserQEMU(t *testing.T) {
	need(t, "qemu-system-x86_64", "qemu-io")
	boot := make([]byte, 512)
	code, err := hex.DecodeString("" +
		"31c0" + "8ed8" + "be407c" + // ds = 0, si = the packet
		"b442" + "cd13" + "7214" + // read
		"c706487c0800" + // another sector
		"b80043" + "cd13" + "7207" + // write
		"b010" + "e6f4" + "f4" + "ebfd" + // exit with 33
		"b011" + "e6f4" + "f4" + "ebfd") // exit with 35
	check(t, err)
	copy(boot, code)
	copy(boot[0x40:], []byte{16, 0, 1, 0, 0x00, 0x80, 0, 0, 0x00, 0x00, 0x01, 0x00})
	boot[510], boot[511] = 0x55, 0xaa
	file := filepath.Join(t.TempDir(), "boot")
	check(t, os.WriteFile(file, boot, 0o600))

	image := layoutImage(t)
	dir := sockets(t)
	s := serving(t, image+"~vm", "--listen", "unix:"+socket(t), "--vhost-user", dir, "--cache", cacheDir(t), "--overlay-each", filepath.Join(t.TempDir(), "vms"))
	qemuWrite(t, s.uri(), "write -s "+file+" 0 512")
	nbd := strings.TrimPrefix(s.ready.Listen[0], "unix:")
	for i, disk := range []string{ // as in README.md
		"-object memory-backend-memfd,id=mem,size=64M,share=on -machine memory-backend=mem -chardev socket,id=disk,path=" + dir + "/vm.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk,num-queues=2,bootindex=0",
		"-blockdev driver=nbd,node-name=disk,server.type=unix,server.path=" + nbd + ",export=" + image + "~vm,reconnect-delay=60 -device virtio-blk-pci,drive=disk,bootindex=0",
		"-drive id=disk,if=none,format=raw,file=" + s.as(image+"~vm") + " -device virtio-blk-pci,drive=disk,bootindex=0",
	} {
		pattern := fmt.Sprint("-P ", i+1)
		qemuWrite(t, s.uri(), "write "+pattern+" 32M 512", "flush")
		ctx, cancel := context.WithTimeout(t.Context(), 5*atMost)
		defer cancel()
		args := append(strings.Fields("-M q35 -accel tcg -m 64M -nodefaults -no-user-config -display none -device isa-debug-exit,iobase=0xf4"), strings.Fields(disk)...)
		cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 33 {
			t.Fatalf("%s: exit %d, %v\n%s\n%s", disk, code, err, out, s.stderr.String())
		}
		qemuWrite(t, s.uri(), "read "+pattern+" 33558528 512") // sector 0x10008
	}
	s.term()
}

// The JSON of a server that has sockets.
func TestVhostUserJSON(t *testing.T) {
	image := layoutImage(t)
	var out announced
	line := readyLine(t, image, "--vhost-user", sockets(t), "--cache", t.TempDir())
	check(t, json.Unmarshal([]byte(line), &out))
	for _, want := range []string{`"uri":""`, `"uris":[]`, `"listen":[]`, `"vhost_user":"/`, `"socket":"/`} {
		if !strings.Contains(strings.ReplaceAll(line, ": ", ":"), want) {
			t.Errorf("no %s in %s", want, line)
		}
	}
}
