package main

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/time/rate"
)

// uplink is the line from a site to a registry. It has a speed, and counts what the registry
// sends over it.
type uplink struct {
	*httptest.Server
	sent   atomic.Int64
	hedged atomic.Int64 // the part of sent that hosts got past the cache: ranges
	hedges atomic.Int64 // and for how many requests

	mu   sync.Mutex
	seen []string // requests, with what was sent for them
}

func startUplink(t testing.TB, registry string, bytesPerSecond int) *uplink {
	t.Helper()
	const packet = 16 << 10
	u := &uplink{}
	limit := rate.NewLimiter(rate.Limit(bytesPerSecond), packet)
	rp := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: registry})
			r.Out.Host = r.In.Host // so that upload locations lead back here
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		line := &uplinked{ResponseWriter: w, u: u, limit: limit, ctx: r.Context(), packet: packet}
		defer func() {
			if r.Header.Get("Range") != "" {
				u.hedges.Add(1)
				u.hedged.Add(int64(line.sent))
			}
			u.mu.Lock()
			defer u.mu.Unlock()
			u.seen = append(u.seen, fmt.Sprintf("%s +%.2f s %8d bytes: %s %.40s %s (%s)", began.Format("05.000"), time.Since(began).Seconds(), line.sent,
				r.Method, r.URL.Path[strings.LastIndex(r.URL.Path, "/"):], r.Header.Get("Range"), r.UserAgent()))
		}()
		rp.ServeHTTP(line, r)
	}))
	u.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		c.(*net.TCPConn).SetWriteBuffer(4 * packet) // a line holds little
		return ctx
	}
	u.Start()
	t.Cleanup(u.Close)
	return u
}

// take returns the requests since the last time.
func (u *uplink) take() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	seen := u.seen
	u.seen = nil
	return strings.Join(seen, "\n")
}

func (u *uplink) reset() {
	u.sent.Store(0)
	u.hedged.Store(0)
	u.hedges.Store(0)
	u.take()
}

func (u *uplink) host() string { return strings.TrimPrefix(u.URL, "http://") }

type uplinked struct {
	http.ResponseWriter
	u      *uplink
	limit  *rate.Limiter
	ctx    context.Context
	packet int
	sent   int
}

func (w *uplinked) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *uplinked) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		m := min(len(p), w.packet)
		if err = w.limit.WaitN(w.ctx, m); err != nil {
			break
		}
		m, err = w.ResponseWriter.Write(p[:m])
		w.u.sent.Add(int64(m))
		w.sent += m
		n += m
		p = p[m:]
	}
	return n, err
}

// site is an image in a registry behind an uplink, and a pull-through cache in front of it.
type site struct {
	up      *uplink
	ref     string
	front   *proxy // in front of the cache, to count
	cache   *registryProcess
	storage string // of the cache
	hosts   string

	// How often hosts have given the cache up for a while, as they do on a machine that is so busy
	// that its answers take seconds, and how many bytes they have fetched in all.
	rests, fetched atomic.Int64
}

// siteImage is the storage of a registry with the image of all sites, and its block image. No
// test pushes to it. TestMain removes it.
var siteImage struct {
	sync.Mutex
	dir string
}

func siteStorage(t testing.TB) string {
	t.Helper()
	siteImage.Lock()
	defer siteImage.Unlock()
	if siteImage.dir != "" {
		return siteImage.dir
	}
	dir, err := os.MkdirTemp("", "thaw-site")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if siteImage.dir == "" { // something has failed
			os.RemoveAll(dir)
		}
	}()
	reg := startRegistry(t, "", dir, "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, append(files(1, "base", 100), file{name: "big", data: random(3, 24<<20)})...)))
	must(t, "build", "--size", "128M", ref)
	reg.stop()
	siteImage.dir = dir
	return dir
}

// newSite makes a site with an image of about 26 MB, compressed.
func newSite(t testing.TB, storage string) *site {
	t.Helper()
	need(t, "nbdcopy", "docker-registry")
	x := &site{storage: storage}
	x.up = startUplink(t, startRegistry(t, "", siteStorage(t), "").addr, 16<<20)
	x.ref = x.up.host() + "/team/app:v1"
	x.cache = startPullThrough(t, "", storage, x.up.URL)
	x.front = startProxy(t, x.cache.addr)
	x.hosts = filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(x.hosts, []byte(x.up.host()+" "+x.front.URL+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.up.reset()
	return x
}

// start is a cold start of the image that reads all of it. The result is what the server says
// at its end.
func (x *site) start(t testing.TB) map[string]any {
	t.Helper()
	s := serving(t, x.ref, "--hosts", x.hosts, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	tool(t, "nbdcopy", s.uri(), "null:")
	sum, code := s.term()
	for line := range strings.Lines(s.stderr.String()) {
		if strings.Contains(line, "mirror") {
			t.Log(strings.TrimSpace(line))
		}
		if strings.Contains(line, "a mirror fails") {
			x.rests.Add(1)
		}
	}
	if n, ok := sum["fetched_bytes"].(float64); ok {
		x.fetched.Add(int64(n))
	}
	if code != exitOK || sum["failed_chunks"] != float64(0) || sum["wrong_chunks"] != float64(0) {
		t.Errorf("exit %d, %v\n%s", code, sum, s.stderr.String())
	}
	return sum
}

// distinct is how many bytes of distinct blobs and manifests the cache has.
func (x *site) distinct(t testing.TB) (n int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(x.storage, "docker/registry/v2/blobs"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "data" {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// late is the most requests that hosts may have sent to the registry because the cache was late,
// which depends on the machine: half of those that they have sent to the cache.
func (x *site) late() int64 {
	x.front.mu.Lock()
	defer x.front.mu.Unlock()
	return int64(len(ranges(x.front.seen, v1.Hash{Hex: "none"}, true)) / 2)
}

// amplification checks how much the registry has sent: what is distinct, once, unless hosts have
// given the cache up. What hosts have asked it for because the
// cache was late does not count, and is bounded. limit is for the rest, and it is looser if the
// cache was late, since it was then asked more often.
func (x *site) amplification(t testing.TB, limit float64) {
	t.Helper()
	distinct, sent, hedged := x.distinct(t), x.up.sent.Load(), x.up.hedged.Load()
	t.Logf("the registry sent %.2f MB, which is %.4f times what is distinct; %.2f MB of it for %d requests that were late at the cache",
		float64(sent)/1e6, float64(sent)/float64(distinct), float64(hedged)/1e6, x.up.hedges.Load())
	if n := x.rests.Load(); n > 0 {
		t.Logf("hosts have given the cache up %d times", n)
		if all := x.fetched.Load(); sent > all+all/4 {
			t.Errorf("the registry sent %d bytes, hosts fetched %d", sent, all)
		}
		return
	}
	if hedged > 0 {
		limit += 0.1
	}
	if float64(sent-hedged) > limit*float64(distinct) || x.up.hedges.Load() > x.late() {
		t.Errorf("the registry sent %d bytes, %d are distinct:\n%s", sent, distinct, x.up.take())
	}
}

// Eight hosts start an image, one after the other, behind a pull-through cache that does not
// have it. The registry sends it once.
func TestPullThroughCache(t *testing.T) {
	t.Parallel()
	x := newSite(t, t.TempDir())
	for i := range 8 {
		before, hedged, began := x.up.sent.Load(), x.up.hedged.Load(), time.Now()
		sum := x.start(t)
		t.Logf("start %d: %.1f s, %.2f MB from the registry", i+1, time.Since(began).Seconds(), float64(x.up.sent.Load()-before)/1e6)
		if fetched, distinct := int64(sum["fetched_bytes"].(float64)), x.distinct(t); x.rests.Load() == 0 && (fetched < distinct*9/10 || fetched > distinct*3/2+x.up.hedged.Load()-hedged) { // what was late came twice
			t.Errorf("the start fetched %d bytes, the cache has %d", fetched, distinct)
		}
	}
	x.amplification(t, 1.02)
}

// Eight hosts start an image at once. On a machine that is too slow for all of them, many answers
// are late, but most requests still go to the cache.
func TestPullThroughCacheAtOnce(t *testing.T) {
	x := newSite(t, t.TempDir())
	var hosts sync.WaitGroup
	began := time.Now()
	for range 8 {
		hosts.Go(func() { x.start(t) })
	}
	hosts.Wait()
	t.Logf("%.1f s", time.Since(began).Seconds())
	x.amplification(t, 1.25)
}

// The cache dies while a host starts: the start goes on from the registry, without an error.
// When the cache is back, hosts use it again.
func TestPullThroughCacheDies(t *testing.T) {
	t.Parallel()
	x := newSite(t, t.TempDir())
	x.start(t)
	distinct := x.distinct(t)
	x.up.reset()
	before := x.front.fetched()
	var died atomic.Bool
	stop := sync.OnceFunc(func() { x.cache.stop(); died.Store(true) })
	x.front.set(func(http.ResponseWriter, *http.Request) bool {
		if x.front.fetched()-before >= distinct/4 {
			stop()
		}
		return true
	})
	s := serving(t, x.ref, "--hosts", x.hosts, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	tool(t, "nbdcopy", s.uri(), "null:")
	x.front.set(nil)
	if !died.Load() {
		t.Fatal("the cache was still alive at the end")
	}
	sum, code := s.term()
	if code != exitOK || sum["failed_chunks"] != float64(0) {
		t.Errorf("exit %d, %v\n%s", code, sum, s.stderr.String())
	}
	if sent := x.up.sent.Load(); sent == 0 || sent > distinct {
		t.Errorf("the registry sent %d bytes", sent)
	}
	// Dead from the beginning.
	x.start(t)

	startPullThrough(t, x.cache.addr, x.storage, x.up.URL)
	x.up.reset()
	x.front.take()
	x.rests.Store(0)
	x.start(t)
	if sent := x.up.sent.Load() - x.up.hedged.Load(); x.rests.Load() == 0 && (sent > distinct/50 || x.up.hedges.Load() > x.late()) {
		t.Errorf("the cache is back, and the registry sent %d bytes:\n%s", sent, x.up.take())
	}
}

// The disk of the cache is full: it keeps nothing, and hosts start from the registry.
func TestPullThroughCacheFull(t *testing.T) {
	t.Parallel()
	need(t, "mount")
	if os.Getuid() != 0 {
		t.Skip("not root: cannot make a small disk")
	}
	storage := t.TempDir()
	tool(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", storage)
	t.Cleanup(func() { exec.Command("umount", "-l", storage).Run() })
	x := newSite(t, storage)
	sum := x.start(t)
	fetched := int64(sum["fetched_bytes"].(float64))
	until(t, "what has come is counted", func() bool { return x.up.sent.Load() >= fetched })
	sent := x.up.sent.Load()
	t.Logf("a start needs %.1f MB, the registry sent %.1f MB", float64(fetched)/1e6, float64(sent)/1e6)
	if sent > 2*fetched {
		t.Errorf("a start needs %d bytes, the registry sent %d", fetched, sent)
	}
}
