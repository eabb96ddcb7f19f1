package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"thaw/bench"
	"thaw/bench/benchtest"
	"thaw/bench/fanout/sim"
)

func TestMain(m *testing.M) { benchtest.Main(m) }

// testBenchmark is a benchmark with a small image.
func testBenchmark(t *testing.T, variants int) (*benchmark, *site, *bytes.Buffer) {
	t.Helper()
	if err := bench.Need(programs...); err != nil {
		t.Skip(err)
	}
	// Not t.TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "fan")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	out := new(bytes.Buffer)
	b := &benchmark{rec: bench.NewRecorder(out), options: options{
		dir: dir, link: link{time.Millisecond, 1e9}, rounds: 1, count: 3, size: "64M", hosts: 3, per: 2, hostRate: 400e6, simHosts: 20, seed: 1, faultAt: 50 * time.Millisecond,
	}}
	if b.thaw, err = bench.BuildThaw(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	s, err := b.prepare(t.Context(), benchtest.Image(t), variants)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close() })
	s.script = scriptOf(s.trace)
	if err := b.learn(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return b, s, out
}

// Devices and images that share layers start on one host; what is recorded makes a table.
func TestOneHost(t *testing.T) {
	b, s, _ := testBenchmark(t, 3)
	if err := b.oneHost(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if a := b.amplified("Devices/image=small/way=trace/devices=3"); a < 1 || a > 1.5 {
		t.Errorf("amplification %.3f of three devices", a)
	}
	one, three := b.rec.Median("Sharing/image=small/images=1", distinctUnit), b.rec.Median("Sharing/image=small/images=3", distinctUnit)
	if three < one+2*64<<10 || three > 2*one {
		t.Errorf("one image needs %v bytes, three that share layers %v", one, three)
	}
	var report strings.Builder
	if err := b.report(&report); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Devices on one host", "aim ", "Sharing"} {
		if !strings.Contains(report.String(), want) {
			t.Errorf("the report has no %q:\n%s", want, &report)
		}
	}
}

// A start fails when it reads other bytes than the registry has.
func TestWrongBytes(t *testing.T) {
	b, s, _ := testBenchmark(t, 0)
	server, err := bench.Serve(t.Context(), b.thaw, s.direct(plainTag), b.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	c, err := dial(t.Context(), server.Socket, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.start(t.Context(), s.script); err != nil {
		t.Error(err)
	}
	s.script[len(s.script)/2].sum++
	if err := c.start(t.Context(), s.script); err == nil || !strings.Contains(err.Error(), "WRONG BYTES") {
		t.Errorf("error %v", err)
	}
	if _, err := c.read(1<<40, 4096); err == nil {
		t.Error("a read beyond the end succeeds")
	}
}

// Hosts of a network reach each other at the rate of their links, and not when they are separated.
func TestNetwork(t *testing.T) {
	if err := bench.Need(programs...); err != nil {
		t.Skip(err)
	}
	const rate = 80e6
	w, err := newNetwork(t.Context(), 2, rate)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	from, to := w.hosts[0], w.hosts[1]
	trips, err := roundTrips(from, to)
	if err != nil {
		t.Fatal(err)
	}
	// On a busy machine most of them take longer.
	if p := slices.Min(trips); p > 5*time.Millisecond {
		t.Errorf("the shortest round trip takes %v", p)
	}
	const n = 4 << 20
	took, err := transfer(from, to, n)
	if err != nil {
		t.Fatal(err)
	}
	if want := time.Duration(n * 8 / rate * float64(time.Second)); took < want*8/10 || took > want+30*time.Second {
		t.Errorf("%d bytes take %v, want about %v", n, took, want)
	}
	sent, err := from.traffic()
	if err != nil || sent < n {
		t.Errorf("the interface says that it has sent %d bytes, %v", sent, err)
	}
	if err := w.separate(t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	l, err := to.listen(to.addr + ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = from.do(func() error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", l.Addr().String())
		if err == nil {
			c.Close()
		}
		return err
	})
	if !errors.Is(err, context.DeadlineExceeded) && !os.IsTimeout(err) {
		t.Errorf("hosts that are separated reach each other: %v", err)
	}
}

// transfer sends n bytes and returns the time until the last one has arrived.
func transfer(from, to *namespace, n int64) (time.Duration, error) {
	l, err := to.listen(to.addr + ":0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	came := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(io.Discard, c)
			c.Close()
		}
		came <- err
	}()
	c, err := from.dial(l.Addr().String())
	if err != nil {
		return 0, err
	}
	began := time.Now()
	_, err = c.Write(make([]byte, n))
	err = errors.Join(err, c.Close(), <-came)
	return time.Since(began), err
}

// The certificates are accepted for the names and addresses of their hosts, and no others.
func TestCertificates(t *testing.T) {
	a, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := a.issue("host-1", "10.77.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	for name, ok := range map[string]bool{"host-1": true, "10.77.0.1": true, "host-2": false} {
		_, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		if (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The data of large files is changed, and holes and small files are not.
func TestScramble(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "data")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 64<<10)
	if _, err := f.WriteAt(data, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(4<<20), f.Close(), os.WriteFile(filepath.Join(dir, "small"), data[:10], 0o600)); err != nil {
		t.Fatal(err)
	}
	n, err := scramble(dir)
	if err != nil || n < 64<<10 || n > 256<<10 {
		t.Errorf("%d bytes changed, %v", n, err)
	}
	all, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(all, data[:100]) || len(all) != 4<<20 || !bytes.Equal(all[2<<20:], make([]byte, 2<<20)) {
		t.Error("the data is as before, or more than that has changed")
	}
}

// Hosts in namespaces start the image with a zone and without one, and behind a cache.
func TestFewHosts(t *testing.T) {
	b, s, _ := testBenchmark(t, 0)
	if err := b.fewHosts(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	for _, w := range ways[1:] {
		zone, none := b.amplified(hostsName(s.Name, w, withZone, 3, 2)), b.amplified(hostsName(s.Name, w, withoutZone, 3, 2))
		// On a busy machine some requests to peers are late, and the registry answers them too.
		if none < 2.5 || zone >= none {
			t.Errorf("%s: amplification %.2f with a zone, %.2f without one", w.name, zone, none)
		}
	}
}

// Whatever happens to a host, the readers of the others see no error.
func TestFaults(t *testing.T) {
	b, s, _ := testBenchmark(t, 0)
	if err := b.faulty(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	for _, x := range faults {
		if b.rec.Rounds(faultName(s.Name, ways[1], x), bench.Wall) != 1 {
			t.Errorf("no figures of a host that is %s", x.name)
		}
	}
}

// The simulator's part has a row for each scenario, and plots.
func TestSimulate(t *testing.T) {
	dir := t.TempDir()
	b := &benchmark{rec: bench.NewRecorder(io.Discard), options: options{simHosts: 20, seed: 1, plots: dir}}
	if err := b.simulate(t.Context()); err != nil {
		t.Fatal(err)
	}
	var report strings.Builder
	if err := b.report(&report); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"20-hosts-1G-trace", "pull-through", "tree", "liars"} {
		if !strings.Contains(report.String(), want) {
			t.Errorf("the report has no %q", want)
		}
	}
	svg, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil || len(svg) != len(scenarios(sim.Flask(), sim.FlaskBundle, 20))-2 && len(svg) < 8 {
		t.Errorf("%d plots, %v", len(svg), err)
	}
}

func TestParseLink(t *testing.T) {
	if l, err := parseLink("20ms:200"); err != nil || l != (link{20 * time.Millisecond, 200e6}) {
		t.Errorf("%v, %v", l, err)
	}
	for _, bad := range []string{"", "20ms", "x:1", "1ms:0", "-1ms:5", "1ms:x"} {
		if _, err := parseLink(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
