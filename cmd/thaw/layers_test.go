package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// gate holds requests back until no more come, and lets them through together. So it
// counts round trips: how many requests wait for each other.
type gate struct {
	mu    sync.Mutex
	held  []chan struct{}
	calm  int // probes since a request has come, or was let through
	trips int
}

// No more requests are expected after this many probes without one, each after a pause. A probe is
// a request itself: it takes longer on a busy machine, where others come later.
const (
	calmProbes = 15
	probePause = 10 * time.Millisecond
)

func startGate(t testing.TB, p *proxy) *gate {
	t.Helper()
	g := &gate{}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				g.let()
				return
			case <-time.After(probePause):
			}
			resp, err := http.Get(p.URL + probePath)
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			g.mu.Lock()
			g.calm++
			full := len(g.held) > 0 && g.calm > calmProbes
			g.mu.Unlock()
			if full {
				g.let()
			}
		}
	})
	t.Cleanup(func() { close(stop); wg.Wait(); p.set(nil) })
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == probePath {
			return false
		}
		c := make(chan struct{})
		g.mu.Lock()
		g.held, g.calm = append(g.held, c), 0
		g.mu.Unlock()
		select {
		case <-c:
			return true
		case <-r.Context().Done():
			return false
		}
	})
	return g
}

// probePath is that of a probe.
const probePath = "/probe"

// let lets through what is held.
func (g *gate) let() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.held {
		close(c)
	}
	g.held, g.calm = nil, 0
	g.trips++
}

// take returns the round trips since the last time.
func (g *gate) take() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := g.trips
	g.trips = 0
	return n
}

// smallLayers is an image of n layers.
func smallLayers(t testing.TB, n int) v1.Image {
	t.Helper()
	var layers []v1.Layer
	for i := range n {
		layers = append(layers, layerOf(t, file{name: fmt.Sprint("f", i), data: random(uint64(i), 3000)}))
	}
	return imageOf(t, layers...)
}

// A first build, a build when nothing has changed, one in another repository, and a start
// take no more than three round trips more with 120 layers than with 3.
func TestRoundTripsByLayers(t *testing.T) {
	reg := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true)))
	t.Cleanup(reg.Close)
	host := strings.TrimPrefix(reg.URL, "http://")
	counts := []int{3, 120}
	what := []string{"first", "unchanged", "elsewhere", "serve"}
	trips := make(map[string][]int)
	for _, n := range counts {
		img := smallLayers(t, n)
		p := startProxy(t, host)
		at := func(repo string) string { return fmt.Sprintf("%s/layers-%d/%s:v1", p.host(), n, repo) }
		push(t, at("one"), img)
		push(t, at("two"), img)
		p.take()
		g := startGate(t, p)
		count := func(what string, f func()) {
			g.take()
			f()
			trips[what] = append(trips[what], g.take())
			t.Logf("%d layers, %s: %d round trips, %d requests", n, what, trips[what][len(trips[what])-1], len(p.take()))
		}
		count("first", func() { must(t, "build", "--size", "64M", at("one")) })
		count("unchanged", func() { must(t, "build", "--size", "64M", at("one")) })
		count("elsewhere", func() { must(t, "build", "--size", "64M", "--reuse", at("one"), at("two")) })
		count("serve", func() {
			s := serving(t, at("one"), "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto")
			s.kill()
		})
	}
	for _, w := range what {
		if a, b := trips[w][0], trips[w][1]; b > a+3 {
			t.Errorf("%s: %d round trips with 3 layers, %d with 120", w, a, b)
		}
	}
}

// The layers of an image that is in another repository of the registry are neither
// downloaded nor sent, with --reuse or if the source itself is there; nor are those that
// are in another registry converted again.
func TestReuse(t *testing.T) {
	t.Parallel()
	one, other := startRegistry(t, "", t.TempDir(), ""), startRegistry(t, "", t.TempDir(), "")
	p, q := startProxy(t, one.addr), startProxy(t, other.addr)
	img := imageOf(t, layerOf(t, files(1, "a", 60)...), layerOf(t, files(2, "b", 60)...))
	first := p.host() + "/team/first:v1"
	second := p.host() + "/team/second:v1"
	none, third, fourth := p.host()+"/team/none:v1", p.host()+"/team/third:v1-thaw", p.host()+"/team/fourth:v1-thaw"
	far, layout := q.host()+"/team/far:v1", "oci:"+t.TempDir()+"/l:v1-thaw"
	for _, ref := range []string{first, second, none, far} {
		push(t, ref, img)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	layers := make(map[string]bool)
	ls, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		layers[d.String()] = true
	}
	var want built
	if err := json.Unmarshal([]byte(must(t, "build", "--json", first)), &want); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		args   []string
		result string
		reused bool
	}{
		{"not told", []string{none}, none, false},
		{"reuse", []string{second, "--reuse", first}, second, true},
		{"the source's repository", []string{first, third}, third, true},
		{"a source with a digest", []string{p.host() + "/team/first@" + digest.String(), fourth}, fourth, false},
		{"another registry", []string{far, "--reuse", p.host() + "/nowhere", "--reuse", first}, far, true},
		{"a layout", []string{first, layout}, layout, true},
	} {
		p.take()
		q.take()
		var got built
		if err := json.Unmarshal([]byte(must(t, append([]string{"build", "--json"}, c.args...)...)), &got); err != nil {
			t.Fatal(err)
		}
		if got.Digest != want.Digest {
			t.Errorf("%s: %s, want %s", c.name, got.Digest, want.Digest)
		}
		for i, l := range got.Layers {
			if l.Reused != c.reused {
				t.Errorf("%s: layer %d: reused=%v", c.name, i, l.Reused)
			}
		}
		read := 0
		for _, s := range append(p.take(), q.take()...) {
			method, path, _ := strings.Cut(s, " ")
			if name := path[strings.LastIndexByte(path, '/')+1:]; method == http.MethodGet && layers[name] {
				read++
			}
		}
		if (read == 0) != c.reused {
			t.Errorf("%s: %d layers were downloaded", c.name, read)
		}
		must(t, "verify", c.result)
	}
	for _, args := range [][]string{{first, "--reuse", "docker-archive:x.tar"}, {first, "--reuse", ":"}, {first, "--requests", "-1"}} {
		if _, stderr, code := thaw(t, append([]string{"build"}, args...)...); code != exitUsage {
			t.Errorf("%q: exit %d\n%s", args, code, stderr)
		}
	}
}
