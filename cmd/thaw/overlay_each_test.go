package main

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"thaw/blockmap"
)

// Sixteen clients write to one image, each for itself, by two connections each, and find
// their changes again. The registry sends each chunk once.
func TestSixteenClientsOnOneImage(t *testing.T) {
	t.Parallel()
	need(t, "nbdsh", "nbdcopy", "qemu-img")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", ref)
	var in inspected
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", ref)), &in); err != nil {
		t.Fatal(err)
	}
	p.take()
	before := p.fetched()
	dir, cache := t.TempDir(), cacheDir(t)
	serve := func() *server {
		return serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay-each", dir, "--fetch-ahead", "none")
	}
	s := serve()
	const clients = 16
	all := func(script func(i int) string) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range clients {
			wg.Go(func() { nbdsh(t, script(i)) })
		}
		wg.Wait()
	}
	uri := func(i int) string {
		if i%2 == 0 {
			return s.as(fmt.Sprintf("~vm-%d", i)) // of the default export
		}
		return s.as(fmt.Sprintf("%s~vm-%d", ref, i))
	}
	all(func(i int) string {
		return fmt.Sprintf(`
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri(%q)
b.connect_uri(%q)
was = a.pread(64 << 20 >> 2, 0)
want = bytes([%d]) * 100000
a.pwrite(want, (5 << 20) + 77)
assert b.pread(100000, (5 << 20) + 77) == want
b.trim(1 << 20, 9 << 20)
b.flush()
assert a.pread((5 << 20) + 77, 0) == was[:(5 << 20) + 77]
`, uri(i), s.as(fmt.Sprintf("%s~vm-%d", ref, i)), i+1)
	})
	if n := p.fetched() - before; n > in.Stored {
		t.Errorf("%d bytes of chunks were fetched for %d clients; the image has %d", n, clients, in.Stored)
	}
	fetched := p.fetched()
	base := device(t, s.uri()) // read-only, and as it was
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", s.uri()).CombinedOutput(); err == nil {
		t.Errorf("a client without a name writes: %s", out)
	}
	until(t, "the devices without clients are closed", func() bool {
		all := listDevices(t, cache)
		return len(all) == 1 && all[0].Name == ref
	})
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	if names := dirOf(t, dir); len(names) != clients {
		t.Errorf("%q", names)
	}
	s = serve()
	all(func(i int) string {
		return fmt.Sprintf(`
h = nbd.NBD()
h.connect_uri(%q)
assert h.pread(100000, (5 << 20) + 77) == bytes([%d]) * 100000
assert h.pread(1 << 20, 9 << 20) == bytes(1 << 20)
`, uri(i), i+1)
	})
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", base, s.uri())
	if n := p.fetched() - fetched; n > in.Stored {
		t.Errorf("%d bytes of chunks were fetched again", n)
	}
	s.term()
}

func listDevices(t testing.TB, cache string) (all []listedDevice) {
	t.Helper()
	for line := range strings.Lines(must(t, "list", "--json", "--cache", cache)) {
		var d listedDevice
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// Names that clients choose stay in the directory, and are refused by a sentence. One overlay
// is open once.
func TestNamesOfClients(t *testing.T) {
	need(t, "nbdinfo", "qemu-io")
	image, other := layoutImage(t), layoutImage(t)
	parent := t.TempDir()
	dir := filepath.Join(parent, "each")
	s := serving(t, image, other, "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--overlay-each", dir)
	for _, name := range []string{"..", ".", "", ".hidden", "a%2Fb", "..%2Fup", "-x", "a b", "%C3%A4", strings.Repeat("x", 129), "x~"} {
		uri := s.as(image + "~" + strings.ReplaceAll(name, " ", "%20"))
		if out, err := exec.Command("nbdinfo", "--size", uri).CombinedOutput(); err == nil {
			t.Errorf("the name %q is accepted: %s", name, out)
		}
	}
	if !s.said("it must be at most 128 letters, digits, dots, dashes and underscores") {
		t.Errorf("no sentence:\n%s", s.stderr.String())
	}
	for _, uri := range []string{s.as("~vm"), s.as("oci:/etc~vm"), s.as(image + "~one~two")} { // two images: no default
		if out, err := exec.Command("nbdinfo", "--size", uri).CombinedOutput(); err == nil {
			t.Errorf("%s is served: %s", uri, out)
		}
	}
	if names := append(dirOf(t, dir), dirOf(t, parent)...); len(names) != 1 {
		t.Errorf("refused clients have left %q", names)
	}
	longest := strings.Repeat("x", 128)
	qemuWrite(t, s.as(image+"~"+longest), "write -P 0x11 1M 64k")
	if names := dirOf(t, dir); len(names) != 1 || names[0] != longest {
		t.Errorf("%q", names)
	}
	// The same overlay by another image.
	out, err := exec.Command("nbdinfo", "--size", s.as(other+"~"+longest)).CombinedOutput()
	if err == nil || !s.said("is another image: serve the former with this overlay, or the latter with another one") {
		t.Errorf("%v\n%s\n%s", err, out, s.stderr.String())
	}
	s.term()
}

// A client that disconnects and connects again at once finds its overlay, although making its
// changes durable takes a while.
func TestClientConnectsAgainAtOnce(t *testing.T) {
	t.Parallel()
	image := layoutImage(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--overlay-each", t.TempDir())
	nbdsh(t, fmt.Sprintf(`
import os
have = None
for i in range(30):
    h = nbd.NBD()
    h.connect_uri(%q)
    if have:
        assert h.pread(len(have), 8 << 20) == have, i
    have = os.urandom(8 << 20)
    h.pwrite(have, 8 << 20)
    h.shutdown()
`, s.as("~vm")))
	s.term()
}

// A machine that comes and goes with --ephemeral: its changes outlive a reconnect, are its own,
// and the image stays as it is.
func TestEphemeralClients(t *testing.T) {
	need(t, "qemu-io", "nbdcopy", "qemu-img")
	image := layoutImage(t)
	cache := cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--ephemeral")
	before := device(t, s.uri())
	qemuWrite(t, s.as("~a"), "write -P 0x11 32M 64k")
	qemuWrite(t, s.as("~b"), "write -P 0x22 32M 64k")
	qemuWrite(t, s.as("~a"), "read -P 0x11 32M 64k")
	qemuWrite(t, s.as(image+"~b"), "read -P 0x22 32M 64k")
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", before, s.uri())
	if n := len(listDevices(t, cache)); n != 3 {
		t.Errorf("%d devices, want 3", n)
	}
	if _, code := s.term(); code != exitOK { // although clients' devices wait for them
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// With certificates, a client opens overlays of its own names only, and no other one learns that
// they are there.
func TestOverlaysBelongToCertificates(t *testing.T) {
	need(t, "nbdinfo", "qemu-io")
	image := layoutImage(t)
	dir, each := t.TempDir(), t.TempDir()
	caKey := newECDSA(t).(*ecdsa.PrivateKey)
	ca := certificate(t, dir, "ca", "authority", caKey, nil, nil)
	certificate(t, dir, "server", "localhost", newECDSA(t), ca, caKey)
	s := serving(t, image, "--listen", "tcp:127.0.0.1:0", "--cache", cacheDir(t), "--overlay-each", each,
		"--tls-cert", dir+"/server-cert.pem", "--tls-key", dir+"/server-key.pem", "--tls-client-ca", dir+"/ca-cert.pem")
	client := func(name string) func(export string) error {
		c := t.TempDir()
		certificate(t, c, "client", name, newECDSA(t), ca, caKey)
		b, err := os.ReadFile(dir + "/ca-cert.pem")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c+"/ca-cert.pem", b, 0o600); err != nil {
			t.Fatal(err)
		}
		return func(export string) error {
			return exec.Command("nbdinfo", "--size", s.uri()+export+"?tls-certificates="+c).Run()
		}
	}
	one, two := client("host-1.example"), client("host-2.example")
	for export, want := range map[string][2]bool{
		"":                      {true, true}, // the image itself
		"~host-1.example":       {true, false},
		"~vm-7.host-1.example":  {true, false},
		"~vm-7.host-2.example":  {false, true},
		"~xhost-1.example":      {false, false},
		"~example":              {false, false},
		"~host-1.example.other": {false, false},
	} {
		for i, open := range []func(string) error{one, two} {
			if err := open(export); (err == nil) != want[i] {
				t.Errorf("client %d opens %q: %v, want %v", i+1, export, err, want[i])
			}
		}
	}
	if names := dirOf(t, each); len(names) != 3 {
		t.Errorf("%q", names)
	}
	s.term()
}

// Images that clients name have overlays, too, where that is allowed.
func TestOverlaysOfAllowedImages(t *testing.T) {
	need(t, "qemu-io", "nbdinfo")
	reg := startRegistry(t, "", t.TempDir(), "")
	one, secret := reg.addr+"/team/one:v1", reg.addr+"/other/app:v1"
	for i, ref := range []string{one, secret} {
		push(t, ref, imageOf(t, layerOf(t, files(uint64(i), "a", 5)...)))
		must(t, "build", "--size", "64M", ref)
	}
	each := t.TempDir()
	s := serving(t, "--allow", reg.addr+"/team/*", "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--overlay-each", each)
	qemuWrite(t, s.as(one+"~vm"), "write -P 0x11 32M 64k")
	qemuWrite(t, s.as(one+"~vm"), "read -P 0x11 32M 64k")
	if out, err := exec.Command("nbdinfo", "--size", s.as(secret+"~vm")).CombinedOutput(); err == nil {
		t.Errorf("an image that is not allowed is served to a client with a name: %s", out)
	}
	until(t, "the overlay is closed", func() bool {
		info, err := blockmap.ReadOverlay(blockmap.OS, filepath.Join(each, "vm"))
		if err != nil || info.Data != 64<<10 {
			t.Fatalf("%+v, %v", info, err)
		}
		return !info.InUse
	})
	s.term()
}

// A server that keeps the changes of one device takes no other one.
func TestOverlayTakesOneDevice(t *testing.T) {
	image := layoutImage(t)
	cache := cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", filepath.Join(t.TempDir(), "o"))
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://thaw/v1/devices", strings.NewReader(fmt.Sprintf(`{"name":"other","image":%q}`, image)))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", cache+"/control.sock")
	}}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusConflict {
		t.Errorf("a second device: %s", resp.Status)
	}
	s.term()
}
