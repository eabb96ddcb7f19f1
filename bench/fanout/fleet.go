package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"thaw/bench"
)

// mode is where the hosts of a fleet read chunks.
type mode string

const (
	withZone    mode = "zone"
	withoutZone mode = "none"         // each from the registry
	withCache   mode = "pull-through" // docker-registry as a cache between them and the registry
)

// fleet is hosts that run thaw serve, and the registry that they share.
type fleet struct {
	b     *benchmark
	s     *site
	mode  mode
	args  []string
	dir   string
	net   *network
	link  *bench.Link // before the registry
	cache *exec.Cmd   // the pull-through cache
	ca    *authority
	addr  string // of the registry, as hosts see it
	hosts []*member
}

// member is a host of a fleet.
type member struct {
	*namespace
	dir    string
	server *bench.Server
}

// newFleet starts n hosts. Nothing of the image is on them. They know each other when it returns.
func (b *benchmark) newFleet(ctx context.Context, s *site, m mode, n int, args ...string) (f *fleet, err error) {
	f = &fleet{b: b, s: s, mode: m, args: args}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	// The path of a socket has at most 107 bytes.
	if f.dir, err = os.MkdirTemp(b.dir, "fleet"); err != nil {
		return f, err
	}
	if f.net, err = newNetwork(ctx, 0, 0); err != nil {
		return f, err
	}
	l, err := f.net.sw.listen(switchAddr + ":0")
	if err != nil {
		return f, err
	}
	f.link = bench.NewLink(l, bench.LinkOptions{RTT: b.link.rtt, Rate: b.link.rate, Dial: dialTCP(s.registry.Addr)})
	f.addr = l.Addr().String()
	switch m {
	case withZone:
		if f.ca, err = newAuthority(f.dir); err != nil {
			return f, err
		}
	case withCache:
		if err := f.startCache(ctx); err != nil {
			return f, err
		}
	}
	for range n {
		if _, err := f.add(ctx); err != nil {
			return f, err
		}
	}
	return f, f.meet(ctx, f.hosts)
}

// startCache starts docker-registry as a pull-through cache, on a host with a link of ten times
// the rate.
func (f *fleet) startCache(ctx context.Context) error {
	ns, err := f.net.add(ctx, "cache", cacheAddr, 10*f.b.hostRate)
	if err != nil {
		return err
	}
	config := filepath.Join(f.dir, "cache.yml")
	err = os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: "%s:5000"}
proxy: {remoteurl: "http://%s"}
`, filepath.Join(f.dir, "cache"), cacheAddr, f.addr), 0o600)
	if err != nil {
		return err
	}
	f.addr = cacheAddr + ":5000"
	cmd := ns.command("docker-registry", "serve", config)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	f.cache = cmd
	return waitFor(ctx, "the pull-through cache listens", time.Minute, func() error {
		c, err := f.net.sw.dial(f.addr)
		if err == nil {
			err = c.Close()
		}
		return err
	})
}

// add starts one more host.
func (f *fleet) add(ctx context.Context) (*member, error) {
	n := len(f.hosts) + 1
	ns, err := f.net.add(ctx, fmt.Sprintf("host-%d", n), fmt.Sprintf("10.77.0.%d", n), f.b.hostRate)
	if err != nil {
		return nil, err
	}
	m := &member{namespace: ns, dir: filepath.Join(f.dir, fmt.Sprint("h", n))}
	f.hosts = append(f.hosts, m)
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		return nil, err
	}
	return m, f.serve(ctx, m)
}

// serve starts the server of a host.
func (f *fleet) serve(ctx context.Context, m *member) error {
	program, err := m.script(f.dir, f.b.thaw)
	if err != nil {
		return err
	}
	args := append([]string{"--plain-http", f.addr, "--complete", "off"}, f.args...)
	if f.mode == withZone {
		cert, key, err := f.ca.issue(m.name, m.addr)
		if err != nil {
			return err
		}
		args = append(args, "--zone", "bench", "--zone-listen", m.addr+":7946", "--zone-host", m.name,
			"--zone-cert", cert, "--zone-key", key, "--zone-ca", f.ca.ca(), "--zone-secret", f.ca.secret())
		for _, other := range f.hosts {
			if other != m {
				args = append(args, "--zone-join", other.addr+":7946")
			}
		}
	}
	m.server, err = bench.Serve(ctx, program, "--allow=**", m.dir, append(args, f.b.serveArgs...)...)
	return err
}

// meet waits until hosts know all members of the zone.
func (f *fleet) meet(ctx context.Context, hosts []*member) error {
	if f.mode != withZone || len(f.hosts) < 2 {
		return nil
	}
	return waitFor(ctx, "the hosts of the zone know each other", time.Minute, func() error {
		for _, m := range hosts {
			z, err := f.zone(ctx, m)
			if err != nil {
				return err
			}
			if z.Members < len(f.hosts) {
				return fmt.Errorf("%s knows %d of %d", m.name, z.Members, len(f.hosts))
			}
		}
		return nil
	})
}

// zoneStatus is what thaw zone prints.
type zoneStatus struct {
	Members  int   `json:"members"`
	Registry int64 `json:"registry_bytes"`
	Received int64 `json:"received_bytes"`
	Sent     int64 `json:"sent_bytes"`
	Referred int64 `json:"referred_requests"`
	Absent   int64 `json:"absent_requests"`
}

func (f *fleet) zone(ctx context.Context, m *member) (z zoneStatus, err error) {
	out, err := bench.Output(exec.CommandContext(ctx, f.b.thaw, "zone", "--json", "--cache", filepath.Join(m.dir, "cache")))
	if err != nil {
		return z, err
	}
	return z, json.Unmarshal([]byte(out), &z)
}

func (f *fleet) close() (err error) {
	for _, m := range f.hosts {
		if m.server != nil {
			m.server.Kill()
		}
	}
	if f.cache != nil {
		f.cache.Process.Kill() // fails only if it has ended
		f.cache.Wait()
	}
	if f.link != nil {
		err = f.link.Close()
	}
	if f.net != nil {
		f.net.close()
	}
	return errors.Join(err, os.RemoveAll(f.dir))
}

// started is what came of starts on all hosts.
type started struct {
	took     time.Duration   // until the last one ended
	times    []time.Duration // of all starts, sorted
	registry int64           // bytes that its link carried to the hosts
	requests int64
	uploads  []float64     // bytes that each host sent
	cpu      time.Duration // of hosts, registry, links and clients
	errs     []error
}

// cpu is the processor time of all that takes part, as far as it runs.
func (f *fleet) cpu() (sum time.Duration) {
	pids := []int{os.Getpid(), f.s.registry.PID()}
	for _, m := range f.hosts {
		pids = append(pids, m.server.PID())
	}
	for _, pid := range pids {
		if t, err := bench.CPUTime(pid); err == nil {
			sum += t
		}
	}
	return sum
}

// start starts the image on hosts, per times on each, at once. meanwhile happens while they run.
func (f *fleet) start(ctx context.Context, tag string, hosts []*member, per int, meanwhile func(ctx context.Context) error) (*started, error) {
	before := f.link.Stats()
	sent := make(map[*member]int64)
	for _, m := range f.hosts {
		n, err := m.traffic()
		if err != nil {
			return nil, err
		}
		sent[m] = n
	}
	var mu sync.Mutex
	x := new(started)
	cpu := f.cpu()
	began := time.Now()
	var wg sync.WaitGroup
	run := func(m *member) {
		for range per {
			wg.Go(func() {
				c, err := dial(ctx, m.server.Socket, f.s.at(f.addr, tag))
				if err == nil {
					err = c.start(ctx, f.s.script)
					c.close()
				}
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					x.errs = append(x.errs, fmt.Errorf("%s: %w", m.name, err))
					return
				}
				x.times = append(x.times, time.Since(began))
			})
		}
	}
	for _, m := range hosts {
		run(m)
	}
	if meanwhile != nil {
		if err := meanwhile(ctx); err != nil {
			return nil, err
		}
	}
	wg.Wait()
	x.took = time.Since(began)
	x.cpu = f.cpu() - cpu
	slices.Sort(x.times)
	after := f.link.Stats()
	x.registry, x.requests = after.Down-before.Down, after.Requests-before.Requests
	for _, m := range f.hosts {
		n, err := m.traffic()
		if err != nil {
			return nil, err
		}
		x.uploads = append(x.uploads, float64(n-sent[m]))
	}
	return x, nil
}

// toMean returns how many times the mean the busiest host sent.
func (x *started) toMean() float64 {
	var total float64
	for _, n := range x.uploads {
		total += n
	}
	return slices.Max(x.uploads) / (total / float64(len(x.uploads)))
}

func (x *started) percentile(share float64) time.Duration {
	if len(x.times) == 0 {
		return 0
	}
	return x.times[min(int(share*float64(len(x.times))), len(x.times)-1)]
}

// measures are for the recorder. distinct is how many bytes one host needs.
func (x *started) measures(distinct int64) []bench.Measure {
	return []bench.Measure{
		{Value: float64(x.took), Unit: bench.Wall}, {Value: float64(x.percentile(0.5)), Unit: "p50-ns"}, {Value: float64(x.percentile(0.99)), Unit: "p99-ns"},
		{Value: float64(x.registry), Unit: registryUnit}, {Value: float64(distinct), Unit: distinctUnit}, {Value: float64(x.requests), Unit: requestsUnit},
		{Value: x.toMean(), Unit: toMeanUnit}, {Value: float64(x.cpu), Unit: bench.CPU}, {Value: float64(len(x.errs)), Unit: errorsUnit},
	}
}

const (
	toMeanUnit = "busiest/mean"
	errorsUnit = "errors"
)

// waitFor waits until ok returns nil.
func waitFor(ctx context.Context, what string, most time.Duration, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("wait until %s: %w", what, err)
		}
	}
}

func dialTCP(addr string) func(ctx context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}
