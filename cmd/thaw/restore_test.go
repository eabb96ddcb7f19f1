package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// addDevice adds a device by the control socket.
func addDevice(t testing.TB, cache, name, image string) host.DeviceInfo {
	t.Helper()
	code, answer := controlCall(t, cache, "POST", "/v1/devices", fmt.Sprintf(`{"name": %q, "image": %q}`, name, image))
	if code != http.StatusCreated {
		t.Fatalf("add %s: %d %s", name, code, answer)
	}
	return decoded[host.DeviceInfo](t, answer)
}

func removeDevice(t testing.TB, cache, id string) {
	t.Helper()
	until(t, "the device is removed", func() bool { // its last client may not have left yet
		code, answer := controlCall(t, cache, "DELETE", "/v1/devices/"+id, "")
		if code != http.StatusNoContent && code != http.StatusConflict {
			t.Fatalf("remove: %d %s", code, answer)
		}
		return code == http.StatusNoContent
	})
}

// Devices that the control socket has added are there when a server that was killed starts
// again, before it says that it is ready: the same names, content, overlays and sockets. A
// virtual machine connects again and finds what it has written, flushed or not. The tag may
// have moved meanwhile: a disk in use does not change.
func TestAddedDevicesOutliveAKill(t *testing.T) {
	need(t, "qemu-io", "qemu-img", "nbdcopy")
	for _, mode := range []string{"", "--overlay-each", "--ephemeral"} {
		t.Run(strings.TrimPrefix(mode, "--"), func(t *testing.T) {
			reg := startRegistry(t, "", t.TempDir(), "")
			ref := reg.addr + "/team/app:v1"
			build := func(seed uint64) {
				push(t, ref, imageOf(t, layerOf(t, files(seed, "a", 5)...)))
				must(t, "build", "--size", "64M", ref)
			}
			build(1)
			dir, cache, nbd := sockets(t), cacheDir(t), socket(t)
			args := []string{"--vhost-user", dir, "--listen", "unix:" + nbd, "--cache", cache}
			if mode != "" {
				args = append(args, mode)
			}
			if mode == "--overlay-each" {
				args = append(args, filepath.Join(t.TempDir(), "vms"))
			}
			s := serving(t, args...)
			names := []string{"root"}
			addDevice(t, cache, "root", ref)
			if mode != "" {
				names = append(names, ref+"~vm-1", ref+"~vm-2")
				addDevice(t, cache, names[1], names[1])
				addDevice(t, cache, names[2], names[2])
			}
			gone := addDevice(t, cache, "gone", ref)
			removeDevice(t, cache, gone.ID)
			before := make(map[string]host.DeviceInfo)
			plain := device(t, s.as("root"))
			machines := make(map[string]*machine)
			for i, name := range names {
				in := listed(t, cache, name)
				before[name] = in
				if in.Socket == "" || (in.Overlay != nil) != (mode == "--ephemeral" || i > 0) {
					t.Errorf("%+v", in)
				}
				m := newMachine(t)
				m.mustConnect(in.Socket)
				machines[name] = m
				if in.Overlay == nil {
					continue
				}
				if status := m.write(40<<20, bytes.Repeat([]byte{byte(i + 1)}, slotData)); status != 0 {
					t.Fatalf("status %d", status)
				}
				qemuWrite(t, s.as(name), fmt.Sprintf("write -P %d 41M 64k", i+101))
			}
			build(2) // the tag leads elsewhere
			for round := range 2 {
				if s.kill(); round == 1 {
					reg.stop()
				}
				s = launch(t, []string{asThaw + "=patient"}, args...) // it waits until they are open
				s.mustBeReady()
				for _, d := range listDevices(t, cache) {
					if d.State != host.Ready || d.Name == "gone" {
						t.Errorf("when the server is ready: %+v", d)
					}
				}
				for i, name := range names {
					in := listed(t, cache, name)
					if was := before[name]; in.Socket != was.Socket || in.Image != was.Image || in.Digest != was.Digest || !in.Permanent ||
						(in.Overlay == nil) != (was.Overlay == nil) || in.Overlay != nil && in.Overlay.Directory != was.Overlay.Directory {
						t.Errorf("%+v, was %+v", in, was)
					}
					m := machines[name]
					m.mustConnect(in.Socket)
					if in.Overlay == nil {
						continue
					}
					if got := m.read(40<<20, slotData); !bytes.Equal(got, bytes.Repeat([]byte{byte(i + 1)}, slotData)) {
						t.Errorf("round %d: %s reads %d", round, name, got[0])
					}
					qemuWrite(t, s.as(name), fmt.Sprintf("read -P %d 40M 64k", i+1), fmt.Sprintf("read -P %d 41M 64k", i+101))
				}
				if before["root"].Overlay == nil {
					tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", plain, s.as("root"))
					tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", plain, s.as("")) // the default export is the same one
				}
			}
			// What is removed after a restart is gone as well.
			for name, m := range machines {
				m.disconnect()
				removeDevice(t, cache, listed(t, cache, name).ID)
			}
			s.kill()
			if _, err := os.Stat(filepath.Join(cache, "state.json")); err == nil {
				t.Error("a state file is left")
			}
			if names := ephemeralIn(t, cache); len(names) > 0 {
				t.Errorf("overlays are left: %q", names)
			}
			s = serving(t, args...)
			if d := listDevices(t, cache); len(d) > 0 {
				t.Errorf("%+v", d)
			}
			s.term()
		})
	}
}

// ephemeralIn are the overlays in a cache directory that go with devices.
func ephemeralIn(t testing.TB, cache string) []string {
	if _, err := os.Stat(filepath.Join(cache, "ephemeral")); err != nil {
		return nil
	}
	return dirOf(t, filepath.Join(cache, "ephemeral"))
}

// ephemeralOf are the names of such overlays by their devices, as the state file has them.
func ephemeralOf(t testing.TB, cache string) map[string]string {
	t.Helper()
	state, err := os.ReadFile(filepath.Join(cache, "state.json"))
	check(t, err)
	of := make(map[string]string)
	for _, d := range decoded[struct {
		Devices []struct{ Name, Ephemeral string }
	}](t, string(state)).Devices {
		of[d.Name] = d.Ephemeral
	}
	return of
}

// An ephemeral overlay outlives a kill, whoever has its device: a machine of the command
// line, and a client that has named it. It outlives SIGTERM for who has it open, and goes
// with the others.
func TestEphemeralOutlivesAKill(t *testing.T) {
	need(t, "qemu-io", "nbdsh")
	image := layoutImage(t)
	dir, cache, nbd := sockets(t), cacheDir(t), socket(t)
	args := []string{image + "~vm", "--vhost-user", dir, "--listen", "unix:" + nbd, "--cache", cache, "--ephemeral", "--allow", "**", "--allow", image}
	serve := func() *server { return serving(t, args...) }
	s := serve()
	m := newMachine(t)
	has := func(what string, pattern byte) {
		t.Helper()
		m.mustConnect(dir + "/vm.sock")
		if got := m.read(40<<20, slotData); !bytes.Equal(got, bytes.Repeat([]byte{pattern}, slotData)) {
			t.Errorf("%s: the machine reads %d, want %d", what, got[0], pattern)
		}
	}
	m.mustConnect(dir + "/vm.sock")
	if status := m.write(40<<20, bytes.Repeat([]byte{7}, slotData)); status != 0 {
		t.Fatalf("status %d", status)
	}
	qemuWrite(t, s.as(image+"~other"), "write -P 8 40M 64k")
	s.kill()
	s = serve()
	has("after a kill", 7)
	qemuWrite(t, s.as(image+"~other"), "read -P 8 40M 64k")
	if n := len(ephemeralIn(t, cache)); n != 2 {
		t.Errorf("%d overlays", n)
	}

	// SIGTERM while the machine is connected, and no client is.
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	if n := len(ephemeralIn(t, cache)); n != 1 {
		t.Errorf("%d overlays are left, want that of the machine", n)
	}
	s = serve()
	has("after SIGTERM", 7)
	qemuWrite(t, s.as(image+"~other"), "read -P 0 40M 64k")

	// And when the machine has gone.
	m.disconnect()
	until(t, "the machine has left", func() bool { return listed(t, cache, image+"~vm").Users == 0 })
	s.term()
	if n := len(ephemeralIn(t, cache)); n != 0 {
		t.Errorf("%d overlays are left", n)
	}
	s = serve()
	has("of a machine that had gone", 0)
	s.kill()

	// Changes that may be lost: nobody gets the disk as it was before them.
	overlay := filepath.Join(cache, "ephemeral", ephemeralOf(t, cache)[image+"~vm"])
	check(t, os.Truncate(filepath.Join(overlay, "live"), 100))
	bad := launch(t, nil, args...)
	if <-bad.done; bad.isReady() || !bad.said("what was written to it may be lost") || !bad.said(overlay) {
		t.Errorf("a machine gets a disk without its changes:\n%s", bad.stderr.String())
	}
	check(t, os.RemoveAll(overlay)) // as the error says
	s = serve()
	if !s.said("somebody has removed the directory of its overlay") {
		t.Errorf("%s", s.stderr.String())
	}
	has("after the remedy", 0)
	m.disconnect()
	s.term()
}

// What is in the way of one device keeps neither the server nor other devices from starting.
// It is tried again, and can be removed.
func TestRestoredDevicesFail(t *testing.T) {
	need(t, "qemu-io")
	one, two, three := layoutImage(t), layoutImage(t), layoutImage(t)
	layout := func(image string) string { return strings.TrimSuffix(strings.TrimPrefix(image, "oci:"), ":x") }
	dir, cache, nbd := sockets(t), cacheDir(t), socket(t)
	args := []string{"--vhost-user", dir, "--listen", "unix:" + nbd, "--cache", cache, "--ephemeral"}
	s := serving(t, args...)
	m := newMachine(t)
	m.mustConnect(addDevice(t, cache, "one", one).Socket)
	addDevice(t, cache, "two", two)
	lost := newMachine(t)
	lost.mustConnect(addDevice(t, cache, "three", three).Socket)
	addDevice(t, cache, "four", one)
	if m.write(8<<20, bytes.Repeat([]byte{5}, 4096)) != 0 || lost.write(8<<20, bytes.Repeat([]byte{6}, 4096)) != 0 {
		t.Fatal("cannot write")
	}
	qemuWrite(t, s.as("two"), "write -P 9 8M 4k")
	s.kill()
	// The second image is gone, and the cache has nothing of it. The live map of the third
	// device is damaged, and the socket of the fourth one is in use.
	check(t, os.Rename(layout(two), layout(two)+".away"))
	for _, name := range dirOf(t, cache) {
		if name != "state.json" && name != "ephemeral" && name != "vm" {
			check(t, os.RemoveAll(filepath.Join(cache, name)))
		}
	}
	check(t, os.Truncate(filepath.Join(cache, "ephemeral", ephemeralOf(t, cache)["three"], "live"), 0))
	other := serving(t, one, "--vhost-user", dir, "--cache", cacheDir(t)) // default.sock
	check(t, os.Remove(dir+"/four.sock"))
	check(t, os.Rename(dir+"/default.sock", dir+"/four.sock"))

	begin := time.Now()
	s = launch(t, []string{asThaw + "=patient"}, args...)
	s.mustBeReady()
	if took := time.Since(begin); took > time.Hour/2 { // what fails is not waited for
		t.Errorf("it was ready after %v\n%s", took, s.stderr.String())
	}
	m.mustConnect(dir + "/one.sock")
	if got := m.read(8<<20, 4096); got[0] != 5 {
		t.Errorf("read %d", got[0])
	}
	opening := func(name, why string) (id string) {
		t.Helper()
		for _, d := range listDevices(t, cache) {
			if d.Name == name {
				if d.State != host.Opening || !strings.Contains(d.Error, why) {
					t.Errorf("%+v", d)
				}
				id = d.ID
			}
		}
		return id
	}
	opening("two", "there is no directory "+layout(two))
	id := opening("three", "what was written to it may be lost")
	if !s.said("a device of the last server cannot be opened yet") || !s.said("a device of the last server has no socket yet") {
		t.Errorf("%s", s.stderr.String())
	}
	if err := lost.connect(dir + "/three.sock"); err == nil {
		t.Error("a machine gets a disk without its changes")
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "read 8M 4k", s.as("three")).CombinedOutput(); err == nil {
		t.Errorf("%s", out)
	}
	removeDevice(t, cache, id)
	lost.mustConnect(addDevice(t, cache, "three", three).Socket) // anew
	if got := lost.read(8<<20, 4096); got[0] == 6 {
		t.Errorf("read %d", got[0])
	}
	check(t, os.Rename(layout(two)+".away", layout(two)))
	until(t, "the image is there again", func() bool { return listed(t, cache, "two").State == host.Ready })
	qemuWrite(t, s.as("two"), "read -P 9 8M 4k")
	other.term()
	until(t, "the socket is there", func() bool { return listed(t, cache, "four").Socket != "" })
	newMachine(t).mustConnect(dir + "/four.sock")
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// A device waits for a server that can serve it as it was. A state file that was damaged,
// or is of another version, costs a line of the log.
func TestRestoredDevicesSuit(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir, cache, nbd, vms := sockets(t), cacheDir(t), socket(t), filepath.Join(t.TempDir(), "vms")
	listen := []string{"--listen", "unix:" + nbd, "--cache", cache}
	args := append(listen, "--vhost-user", dir, "--overlay-each", vms)
	serve := func(args ...string) (s *server, names string) {
		t.Helper()
		s = serving(t, args...)
		var list []string
		for _, d := range listDevices(t, cache) {
			if d.Permanent && d.Name != image {
				list = append(list, strings.TrimPrefix(d.Name, image))
			}
		}
		slices.Sort(list)
		return s, strings.Join(list, " ")
	}
	s, _ := serve(args...)
	addDevice(t, cache, image+"~vm", image+"~vm")
	addDevice(t, cache, "root", image)
	qemuWrite(t, s.as(image+"~vm"), "write -P 3 8M 4k")
	s.kill()
	for what, c := range map[string]struct {
		args []string
		want string
		says string
	}{
		"no sockets":       {append(listen, image, "--overlay-each", vms), "", "its socket is " + dir + "/vm.sock: start thaw serve with --vhost-user " + dir},
		"other sockets":    {append(listen, "--vhost-user", sockets(t), "--overlay-each", vms), "", "its socket is " + dir + "/root.sock"},
		"other overlays":   {append(listen, "--vhost-user", dir, "--overlay-each", t.TempDir()), "root", "start thaw serve with --overlay-each " + vms},
		"no overlays":      {append(listen, "--vhost-user", dir), "root", "its overlay is " + vms + "/vm"},
		"ephemeral ones":   {append(listen, "--vhost-user", dir, "--ephemeral"), "", "it is read-only: start thaw serve without --ephemeral"},
		"one overlay":      {append(listen, image, "--overlay", t.TempDir()), "", "this server serves one image only"},
		"nodes only":       {[]string{"--nodes-only", "--cache", cache}, "", ""},
		"on the flags too": {append(args, image+"~vm"), "root ~vm", ""},
	} {
		for _, end := range []func(*server){func(s *server) { s.term() }, (*server).kill} {
			if what == "on the flags too" {
				break // below
			}
			s, names := serve(c.args...)
			if names != c.want || c.says != "" && !s.said(c.says) {
				t.Errorf("%s: %q, want %q\n%s", what, names, c.want, s.stderr.String())
			}
			end(s)
		}
	}
	s, names := serve(args...)
	if names != "root ~vm" {
		t.Errorf("%q", names)
	}
	qemuWrite(t, s.as(image+"~vm"), "read -P 3 8M 4k")
	// In order, too: they stay until they are removed.
	s.term()
	s, names = serve(args...)
	if names != "root ~vm" {
		t.Errorf("after SIGTERM: %q", names)
	}
	s.term()

	state := filepath.Join(cache, "state.json")
	good, err := os.ReadFile(state)
	check(t, err)
	for what, c := range map[string]struct{ text, names, says string }{
		"one entry": {strings.Replace(string(good), `"name":"root"`, `"name":""`, 1), "~vm", "an entry of the state file makes no sense and is left out"},
		"cut":       {string(good[:len(good)/2]), "", "the nodes and devices of the last server are left alone"},
		"old":       {strings.Replace(string(good), `"version":2`, `"version":1`, 1), "", "another version of thaw has written it"},
		"nothing":   {"", "", ""}, // as a loss of power leaves a file of nodes alone, which is not synced
	} {
		check(t, os.WriteFile(state, []byte(c.text), 0o600))
		s, names := serve(args...)
		if names != c.names || !s.said(c.says) {
			t.Errorf("%s: %q\n%s", what, names, s.stderr.String())
		}
		s.term()
	}
	// A device of the flags takes the place of one that was added.
	check(t, os.WriteFile(state, good, 0o600))
	s, _ = serve(append(args, image+"~vm")...)
	if !s.said("a device of the last server has another one in its place") {
		t.Errorf("%s", s.stderr.String())
	}
	qemuWrite(t, s.as(image+"~vm"), "read -P 3 8M 4k")
	s.term()
	s, names = serve(args...)
	if names != "root" {
		t.Errorf("%q", names)
	}
	s.term()
}

// A device that cannot be kept for the next server is not added.
func TestDeviceThatCannotBeKept(t *testing.T) {
	image := layoutImage(t)
	dir, cache := sockets(t), cacheDir(t)
	s := serving(t, "--vhost-user", dir, "--cache", cache)
	check(t, os.Mkdir(filepath.Join(cache, ".state.json.tmp"), 0o700))
	if code, answer := controlCall(t, cache, "POST", "/v1/devices", fmt.Sprintf(`{"image": %q}`, image)); code != http.StatusUnprocessableEntity || !strings.Contains(answer, "keep the device for the time after a restart") {
		t.Errorf("%d %s", code, answer)
	}
	until(t, "it is closed", func() bool { return len(listDevices(t, cache)) == 0 })
	if names := dirOf(t, dir); len(names) > 0 {
		t.Errorf("%q", names)
	}
	check(t, os.Remove(filepath.Join(cache, ".state.json.tmp")))
	addDevice(t, cache, "root", image)
	s.term()
}

// QEMU's NBD driver waits for the next server, as README.md says: requests in the gap
// succeed, and what was written before is there.
func TestQEMUReconnects(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	image := layoutImage(t)
	for _, mode := range []string{"--overlay-each", "--ephemeral"} {
		cache, nbd := cacheDir(t), socket(t)
		args := []string{image, "--listen", "unix:" + nbd, "--cache", cache, mode}
		if mode == "--overlay-each" {
			args = append(args, filepath.Join(t.TempDir(), "vms"))
		}
		s := serving(t, args...)
		io := exec.Command("qemu-io", "--image-opts", "driver=nbd,server.type=unix,server.path="+nbd+",export="+image+"~vm,reconnect-delay=60")
		var out syncBuffer
		io.Stdout, io.Stderr = &out, &out
		in, err := io.StdinPipe()
		check(t, err)
		check(t, startWithUs(io))
		defer func() { io.Process.Kill(); io.Wait() }()
		prompts := func() int { return strings.Count(out.String(), "qemu-io> ") }
		// ask has the command begin. It reads no second line that comes with the first one.
		ask := func(command string) {
			t.Helper()
			was := prompts()
			fmt.Fprintln(in, command)
			until(t, "it goes on", func() bool { return prompts() > was })
		}
		answered := func(words string, n int) {
			t.Helper()
			until(t, words, func() bool { return strings.Count(out.String(), words) >= n })
		}
		until(t, "it asks for a command", func() bool { return prompts() > 0 })
		ask("write -P 1 8M 64k")
		answered("wrote 65536/65536", 1)
		for round := range 2 {
			s.kill()
			done := strings.Count(out.String(), "65536/65536")
			ask(fmt.Sprintf("aio_write -P %d %dM 64k", round+2, round+9)) // in the gap
			ask("aio_read -P 1 8M 64k")
			if n := strings.Count(out.String(), "65536/65536"); n != done || strings.Contains(out.String(), "failed") {
				t.Fatalf("without a server:\n%s", out.String())
			}
			s = serving(t, args...)
			ask("aio_flush") // waits for both
			answered("wrote 65536/65536", round+2)
			answered("read 65536/65536", round+1)
		}
		ask("flush")
		fmt.Fprintln(in, "quit")
		if err := io.Wait(); err != nil || strings.Contains(out.String(), "failed") {
			t.Errorf("%s: %v\n%s", mode, err, out.String())
		}
		qemuWrite(t, s.as(image+"~vm"), "read -P 1 8M 64k", "read -P 2 9M 64k", "read -P 3 10M 64k")
		s.term()
	}
}
