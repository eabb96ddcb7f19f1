package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/zone"
)

// zoneBed is a registry with an image, and hosts of a zone on this machine: each a process
// with a cache of its own.
type zoneBed struct {
	t        testing.TB
	registry *proxy
	ref      string
	want     []byte // the content of the device
	distinct int64  // what a lone host reads of the registry for it
	hosts    []*zoneProcess
	ca       string // a directory with certificates; empty: no TLS
}

type zoneProcess struct {
	*server
	cache string
	uri   string
	addr  string // in the zone
}

func newZoneBed(t testing.TB) *zoneBed {
	t.Helper()
	need(t, "nbdcopy")
	reg := startRegistry(t, "", t.TempDir(), "")
	b := &zoneBed{t: t, registry: startProxy(t, reg.addr)}
	b.ref = b.registry.host() + "/team/app:v1"
	push(t, b.ref, sample(t))
	must(t, "build", "--size", "64M", b.ref)
	lone := b.start("--allow", b.registry.host()+"/**")
	before := b.registry.fetched()
	b.want = b.read(lone)
	b.distinct = b.registry.fetched() - before
	lone.kill()
	return b
}

// start starts a server.
func (b *zoneBed) start(args ...string) *zoneProcess {
	b.t.Helper()
	h := &zoneProcess{cache: cacheDir(b.t)}
	args = append([]string{"--listen", "unix:" + socket(b.t), "--cache", h.cache, "--fetch-ahead", "none"}, args...)
	h.server = serving(b.t, args...)
	h.uri = "nbd+unix:///" + b.ref + "?socket=" + strings.TrimPrefix(h.ready.Listen[0], "unix:")
	return h
}

// join starts a member of the zone.
func (b *zoneBed) join(args ...string) *zoneProcess {
	b.t.Helper()
	n := len(b.hosts) + 1
	args = append(args, "--zone", "test", "--zone-listen", fmt.Sprintf("127.0.0.%d:0", n+1))
	if len(b.hosts) > 0 {
		args = append(args, "--zone-join", b.hosts[0].addr)
	}
	if b.ca != "" {
		name := fmt.Sprintf("host-%d.example", n)
		args = append(args, "--zone-cert", filepath.Join(b.ca, name+"-cert.pem"), "--zone-key", filepath.Join(b.ca, name+"-key.pem"),
			"--zone-ca", filepath.Join(b.ca, "ca-cert.pem"), "--zone-secret", filepath.Join(b.ca, "secret"))
	}
	h := b.start(args...)
	h.addr = b.zone(h).Address
	b.hosts = append(b.hosts, h)
	return h
}

// zone is what thaw zone says of a member.
func (b *zoneBed) zone(h *zoneProcess) host.ZoneStatus {
	b.t.Helper()
	return decoded[shownZone](b.t, must(b.t, "zone", "--json", "--cache", h.cache)).ZoneStatus
}

// awaitMembers waits until all know each other.
func (b *zoneBed) awaitMembers(n int, hosts ...*zoneProcess) {
	b.t.Helper()
	for _, h := range hosts {
		for end := time.Now().Add(atMost); b.zone(h).Members != n; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				b.t.Fatalf("the zone has not got %d members: %+v\n%s", n, b.zone(h), h.stderr.String())
			}
		}
	}
}

// read reads all of the device.
func (b *zoneBed) read(h *zoneProcess) []byte {
	b.t.Helper()
	out := filepath.Join(b.t.TempDir(), "device")
	ctx, cancel := context.WithTimeout(b.t.Context(), 5*atMost)
	defer cancel()
	if msg, err := exec.CommandContext(ctx, "nbdcopy", h.uri, out).CombinedOutput(); err != nil {
		b.t.Errorf("nbdcopy: %v: %s\n%s", err, msg, h.stderr.String())
		return nil
	}
	got, err := os.ReadFile(out)
	if err != nil {
		b.t.Error(err)
	}
	if b.want != nil && !bytes.Equal(got, b.want) {
		b.t.Error("the device has other bytes")
	}
	return got
}

// amplification is what hosts have read of the registry for do, of what is distinct.
func (b *zoneBed) amplification(do func()) float64 {
	b.registry.settle(b.t)
	before := b.registry.fetched()
	do()
	return float64(b.registry.fetched()-before) / float64(b.distinct)
}

// Three hosts start one image at once: the registry is read once.
func TestZoneStartsAtOnce(t *testing.T) {
	b := newZoneBed(t)
	for _, secured := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "tls"}[secured], func(t *testing.T) {
			b.startAtOnce(t, secured)
		})
	}
}

// late is how many chunks were so late at hosts that they were requested from another source as
// well, which is often the registry: on a busy machine that is no fault of the zone's.
func (b *zoneBed) late(hosts ...*zoneProcess) (n int64) {
	b.t.Helper()
	for _, h := range hosts {
		c := decoded[shownStatus](b.t, must(b.t, "status", "--json", "--cache", h.cache)).Counts
		n += c.PassedOver + c.Extra
	}
	return n
}

// startAtOnce starts the image on three hosts of a zone.
func (b *zoneBed) startAtOnce(t *testing.T, secured bool) {
	b = &zoneBed{t: t, registry: b.registry, ref: b.ref, want: b.want, distinct: b.distinct}
	if secured {
		b.ca = certificates(t, "host-1.example", "host-2.example", "host-3.example")
	}
	for range 3 {
		b.join("--allow", b.registry.host()+"/**")
	}
	b.awaitMembers(3, b.hosts...)
	a := b.amplification(func() {
		var wg sync.WaitGroup
		for _, h := range b.hosts {
			wg.Go(func() { b.read(h) })
		}
		wg.Wait()
	})
	if late := b.late(b.hosts...); a > 1.05 && late == 0 || a > 2.5 {
		t.Errorf("three hosts have read %.3f times the distinct bytes of the registry; %d requests were late", a, late)
	}
	// What was sent is counted after it has arrived, and a busy peer may answer too late.
	var in int64
	until(t, "what is received was sent, and all peers answer", func() bool {
		var out int64
		in = 0
		answer := true
		for _, h := range b.hosts {
			z := b.zone(h)
			in, out = in+z.Received, out+z.Sent
			if z.TLS != secured || len(z.Peers) != 2 || z.Alone || z.Registry == 0 {
				t.Fatalf("%+v", z)
			}
			for _, p := range z.Peers {
				if p.Wrong > 0 {
					t.Fatalf("%s about %s: %+v", z.Name, p.Name, p)
				}
				answer = answer && p.Health != nil
			}
		}
		return in > 0 && out >= in && answer
	})
	t.Logf("the registry was read %.3f times; %d bytes went from host to host", a, in)
	for _, h := range b.hosts {
		h.kill()
	}
}

// A host that starts later reads nothing of the registry. One that is killed costs nobody
// an error, and little.
func TestZoneSurvivesItsMembers(t *testing.T) {
	b := newZoneBed(t)
	for range 3 {
		b.join("--allow", b.registry.host()+"/**")
	}
	b.awaitMembers(3, b.hosts...)
	if a := b.amplification(func() { b.read(b.hosts[0]) }); a > 1.05 && b.late(b.hosts...) == 0 || a > 2 {
		t.Errorf("the first host: %.3f", a)
	}
	if a := b.amplification(func() { b.read(b.hosts[1]) }); a > 0.05 && b.late(b.hosts...) == 0 || a > 0.9 {
		t.Errorf("the second host: %.3f", a)
	}
	t.Parallel() // what follows waits for members to be missed
	b.hosts[0].kill()
	began := time.Now()
	if a := b.amplification(func() { b.read(b.hosts[2]) }); a > 1.05 && b.late(b.hosts[1]) == 0 || a > 2 {
		t.Errorf("the third host, without the first: %.3f", a)
	}
	if took := time.Since(began); took > 3*atMost {
		t.Errorf("the third host, without the first: %v", took)
	}
	b.awaitMembers(2, b.hosts[1:]...)
	// A host alone works.
	b.hosts[1].kill()
	b.awaitMembers(1, b.hosts[2])
	b.read(b.hosts[2])
	out := must(t, "zone", "--cache", b.hosts[2].cache)
	if !strings.Contains(out, "no other member can be reached") {
		t.Errorf("%s", out)
	}
	if _, code := b.hosts[2].term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, b.hosts[2].stderr.String())
	}
}

// A member that may not open the image for peers, and one that nobody can reach, cost a
// look-up each.
func TestZoneWithUselessMembers(t *testing.T) {
	b := newZoneBed(t)
	b.join("--allow", b.registry.host()+"/**")
	b.join("--allow", "registry.example/**") // knows no image of this registry
	b.join("--allow", b.registry.host()+"/**", "--zone-allow", "registry.example/**")
	b.awaitMembers(3, b.hosts...)
	if a := b.amplification(func() { b.read(b.hosts[0]) }); a > 1.05 && b.late(b.hosts[0]) == 0 || a > 2 {
		t.Errorf("%.3f", a)
	}
	for _, h := range b.hosts[1:] {
		if z := b.zone(h); z.Sent > 0 || z.Registry > 0 {
			t.Errorf("it has read the registry for peers: %+v", z)
		}
	}
	// The first has all of it, and owns a third.
	if a := b.amplification(func() { b.read(b.hosts[2]) }); a > 0.9 && b.late(b.hosts...) == 0 || a > 2 {
		t.Errorf("%.3f", a)
	}
}

// What the flags of a zone require of each other.
func TestZoneFlags(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"--zone-listen 127.0.0.1:0", exitUsage, "add --zone NAME"},
		{"--zone-memory 1M", exitUsage, "add --zone NAME"},
		{"--zone test", exitUsage, "add --zone-listen"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-memory much", exitUsage, "a size is"},
		{"--zone te/st --zone-listen 127.0.0.1:0", exitUsage, "the name of a zone"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-host a,b", exitUsage, "the name of a host"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-join dns:", exitUsage, "--zone-join"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-cert x", exitUsage, "--zone-ca together"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-cert x --zone-key y --zone-ca z", exitUsage, "--zone-secret"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-allow [", exitUsage, "--zone-allow"},
		{"--zone test --zone-listen 0.0.0.0:0", exitError, "without TLS"},
		{"--zone test --zone-listen :0", exitError, "without TLS"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-cert x --zone-key y --zone-ca z --zone-secret s", exitError, "certificate x of the zone"},
		{"--zone test --zone-listen 127.0.0.1:0 --zone-secret " + dir, exitError, "secret of the zone"},
	} {
		args := append([]string{"serve", "--allow", "x/**", "--cache", dir + "/cache", "--listen", "unix:" + dir + "/s"}, strings.Fields(c.args)...)
		_, stderr, code := thaw(t, args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit %d\n%s", c.args, code, stderr)
		}
	}
	// A server in the background gets them, with paths that it understands.
	z := zoneFlags{allow: []string{"x/**"}, memory: 32 << 20, o: host.ZoneOptions{
		Name: "test", Listen: "127.0.0.1:0", Host: "h", Join: []string{"file:hosts", "dns:x"}, Cert: "c", Key: "/k", CA: "a", Secret: "s",
	}}
	args, err := z.args()
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	want := "--zone test --zone-listen 127.0.0.1:0 --zone-host h --zone-cert " + here + "/c --zone-key /k --zone-ca " + here + "/a --zone-secret " + here +
		"/s --zone-join file:" + here + "/hosts --zone-join dns:x --zone-allow x/** --zone-memory 32M"
	if got := strings.Join(args, " "); got != want {
		t.Errorf("%s\ninstead of\n%s", got, want)
	}
	for memory, want := range map[size]int64{zone.StoredMemory: 0, 0: -1, 1 << 20: 1 << 20} {
		z.memory = memory
		if got := z.options(nil).Memory; got != want {
			t.Errorf("--zone-memory %s: %d", &memory, got)
		}
	}
	if args, err := new(zoneFlags).args(); err != nil || len(args) > 0 {
		t.Errorf("without a zone: %v, %v", args, err)
	}
	out, stderr, code := thaw(t, "zone", "--cache", dir)
	if code != exitError || out != "" || !strings.Contains(stderr, "start one with") {
		t.Errorf("zone without a server: exit %d\n%s", code, stderr)
	}
	cache := cacheDir(t)
	serving(t, "--allow", "x/**", "--cache", cache, "--listen", "unix:"+socket(t))
	if _, stderr, code := thaw(t, "zone", "--cache", cache); code != exitError || !strings.Contains(stderr, "member of no zone") {
		t.Errorf("zone of a server without one: exit %d\n%s", code, stderr)
	}
}

// The table of peers fits its terminal, whatever peers call themselves.
func TestZoneLines(t *testing.T) {
	z := host.ZoneStatus{Registry: 5 << 20, Status: zone.Status{
		Zone: "prod", Name: "host-1.example", Address: "10.0.0.1:7946", TLS: true, Members: 3, Uploads: 1, Sent: 12 << 20, Received: 30 << 20, Served: 40, Referred: 2, Absent: 1,
		SentStored: 9 << 20, ReceivedStored: 45 << 19, Kept: 15 << 20, Hits: 36, Misses: 4,
		Peers: []zone.Peer{
			{Name: "host-2.example", Address: "10.0.0.2:7946", State: zone.Working, Received: 20 << 20, Sent: 12 << 20, P95: 0.0123, Requests: 9, Health: &zone.Health{Uploads: 3}},
			{Name: "host-3.example\x1b[2J", Address: "10.0.0.3:7946", State: zone.Resting, Failed: 4, Wrong: 1},
			{Name: "host-4.example", State: zone.Distrusted, Wrong: 1},
		},
	}}
	got := strings.Join(zoneLines(z, 0), "\n")
	want := `zone      prod, 3 members, with TLS
host      host-1.example at 10.0.0.1:7946
registry  5.0 MiB read
peers     30 MiB received, 12 MiB sent, 1 upload under way
          compressed: 75 % of what was received, 75 % of what was sent
          in memory for them: 15 MiB of compressed chunks, which served 36 of 40 requests
          of their requests 40 answered, 2 sent to other members, 1 for what is not here, 0 refused, 0 too many, 0 failed

state       name                address        answers  uploads  received    sent     p95  failed
working     host-2.example      10.0.0.2:7946  yes            3    20 MiB  12 MiB  12.3ms       0
resting     host-3.example` + "\ufffd" + `[2J  10.0.0.3:7946  no             -       0 B     0 B       -       5
distrusted  host-4.example      has left       -              -       0 B     0 B       -       1`
	if got != want {
		t.Errorf("it is\n%s\ninstead of\n%s", got, want)
	}
	line, err := json.Marshal(shownZone{"zone", z})
	if err != nil {
		t.Fatal(err)
	}
	goldenJSON(t, "zone", string(line)+"\n", t.TempDir())
	z.Alone, z.Error, z.Peers, z.TLS = true, "join 10.0.0.9:7946: refused", nil, false
	got = strings.Join(zoneLines(z, 80), "\n")
	if !strings.Contains(got, "no other member can be reached") || !strings.Contains(got, "refused\n") && !strings.HasSuffix(got, "refused") || !strings.Contains(got, "without TLS") {
		t.Errorf("%s", got)
	}
}

// certificates makes an authority, certificates with these names, and a secret, in a
// directory.
func certificates(t *testing.T, names ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	key := newECDSA(t)
	ca := certificate(t, dir, "ca", "zone authority", key, nil, nil)
	for _, name := range names {
		certificate(t, dir, name, name, newECDSA(t), ca, key)
	}
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("a secret of the zone of the tests\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}
