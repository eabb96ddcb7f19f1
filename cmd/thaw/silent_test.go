package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/tracefile"
)

// silence has the proxy accept requests and say nothing, until it is lifted.
func (p *proxy) silence() (lift func()) {
	lifted := make(chan struct{})
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-lifted:
			return true
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	})
	return sync.OnceFunc(func() { close(lifted) })
}

// A registry that accepts connections and says nothing does not hold up what is in
// the cache: not at all where a digest names it, and for moments where a tag does.
// What it says later is told.
func TestSilentRegistry(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	b := buildOf(t, ref)
	source, _ := manifestOf(t, ref)
	pinned := withDigest(ref, source.Subject.Digest.String())
	itself := withDigest(ref, b.Digest)
	whole, part := t.TempDir(), t.TempDir()
	s := serving(t, ref, pinned, itself, "--listen", "unix:"+socket(t), "--cache", part, "--fetch-ahead", "none")
	s.term()
	s = serving(t, ref, pinned, itself, "--listen", "unix:"+socket(t), "--cache", whole, "--fetch-ahead", "none")
	want := device(t, s.uri())
	s.term()

	lift := p.silence()
	quick := time.Hour // what a start takes that does not wait
	// atOnce starts a server that would wait for the registry for an hour.
	atOnce := func(args ...string) *server {
		t.Helper()
		p.take()
		began := time.Now()
		s := launch(t, []string{asThaw + "=patient"}, append(args, "--listen", "unix:"+socket(t))...)
		s.mustBeReady()
		took := time.Since(began)
		if quick = min(quick, took); took > time.Hour/2 {
			t.Errorf("%v: ready after %v", args, took)
		}
		return s
	}
	start := func(args ...string) *server {
		t.Helper()
		began := time.Now()
		s := serving(t, append(args, "--listen", "unix:"+socket(t))...)
		if took := time.Since(began); took > slowly(quick) {
			t.Errorf("%v: ready after %v; without waiting it takes %v", args, took, quick)
		}
		return s
	}
	named := [][]string{{pinned}, {itself}, {ref, "--pin", b.Digest}}
	// These come first: a server that lacks parts asks for them, and what it asked for
	// may arrive after its end.
	for _, args := range named {
		s := atOnce(append(args[:len(args):len(args)], "--cache", whole)...)
		if seen := p.take(); len(seen) > 0 {
			t.Errorf("%v: requests for what is here: %v", args, seen)
		}
		wholeDevice(t, s.uri(), want)
		s.term()
	}
	for _, args := range named {
		s := atOnce(append(args[:len(args):len(args)], "--cache", part)...)
		s.term()
	}
	for _, args := range [][]string{
		{ref, "--cache", whole}, {ref, "--cache", part}, {ref, "--cache", whole, "--trace", "auto"}, {pinned, "--cache", part, "--trace", "auto"},
		{ref, "--cache", whole, "--trace", "auto", "--prefetch-wait", "50"},
		{ref, "--cache", whole, "--trace", "auto", "--trace", p.host() + "/team/app:v0"},
	} {
		s := start(args...)
		if args[0] == ref && !s.said("has not answered within") {
			t.Errorf("%v: it does not say so:\n%s", args, s.stderr.String())
		}
		if args[2] == whole {
			qemuRead(t, s.uri(), "read 0 4k")
		}
		if _, code := s.term(); code != exitOK {
			t.Errorf("%v: exit %d\n%s", args, code, s.stderr.String())
		}
		if args[2] == whole && strings.Contains(strings.Join(args, " "), "auto") && !s.said("recorded a start") {
			t.Errorf("%v: nothing is known, and nothing is recorded:\n%s", args, s.stderr.String())
		}
	}
	// A client that names the image waits no longer.
	for _, name := range []string{pinned, ref} {
		args := []string{"--allow", p.host() + "/**", "--cache", whole}
		s := start
		if name == pinned {
			s = atOnce
		}
		server := s(args...)
		began := time.Now()
		qemuRead(t, "nbd+unix:///"+name+"?socket="+strings.TrimPrefix(server.ready.Listen[0], "unix:"), "read 0 4k")
		if took := time.Since(began); name == ref && took > slowly(quick) {
			t.Errorf("a client has waited %v for %s", took, name)
		}
		server.term()
	}
	// Reads fetch what is missing as soon as the registry speaks.
	s = start(ref, "--cache", part)
	lift()
	wholeDevice(t, s.uri(), want)
	if !s.said("is the current one") {
		t.Errorf("it does not say that the registry has answered:\n%s", s.stderr.String())
	}
	s.term()

	// By the time that it speaks, the tag means something else.
	lift = p.silence()
	s = start(ref, "--cache", whole)
	other := reg.addr + "/team/app:v1"
	push(t, other, imageOf(t, layerOf(t, files(7, "other", 5)...)))
	now := buildOf(t, other)
	lift()
	if !s.said("the name means another image by now") || !strings.Contains(s.stderr.String(), now.Digest) {
		t.Errorf("it does not say that the tag has moved:\n%s", s.stderr.String())
	}
	wholeDevice(t, s.uri(), want)
	s.term()
	// When it is not silent, the tag means what it means.
	p.set(nil)
	s = start(ref, "--cache", whole)
	if got := s.ready.Exports[0].Digest; got != now.Digest {
		t.Errorf("%s is served, the tag means %s", got, now.Digest)
	}
	s.term()
}

// With nothing known the registry is waited for, and what it refuses is said.
func TestRefusedWithPartsMissing(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", ref)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--fetch-ahead", "none")
	s.term()
	p.set(func(w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "no", http.StatusForbidden)
		return false
	})
	if s := launch(t, nil, ref, "--listen", "unix:"+socket(t), "--cache", cache); s.isReady() {
		t.Error("an image is served of which the rest is refused")
	} else if <-s.done; !s.said("the cache lacks") {
		t.Errorf("%s", s.stderr.String())
	}
}

// A registry that fails is not one that says nothing: what it answers is said.
func TestFailingRegistryIsTold(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", ref)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--fetch-ahead", "none")
	s.term()
	p.set(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "60")
		http.Error(w, "out of disk", http.StatusInternalServerError)
		return false
	})
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--fetch-ahead", "none")
	if !s.said("serving from the cache alone") || !s.said("500") || !s.said("out of disk") {
		t.Errorf("it does not say what the registry answers:\n%s", s.stderr.String())
	}
	s.term()
}

// A lost blob is told without anybody waiting for that.
func TestLostBlobIsTold(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "64M", ref)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	s.term()
	lift := make(chan struct{})
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/blobs/") {
			select {
			case <-lift:
			case <-r.Context().Done():
			}
			http.NotFound(w, r)
			return false
		}
		return true
	})
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--fetch-ahead", "none")
	close(lift)
	if !s.said("the registry has lost a part of the image") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
}

// What is served is what is recorded: with the new index not to be had the old image
// is, and its trace is the old one's.
func TestRecordingIsOfWhatIsServed(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "old", 20)...)))
	old := buildOf(t, ref)
	was, _ := manifestOf(t, ref)
	dir := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", dir+"/c")
	want := device(t, s.uri())
	s.term()
	push(t, ref, imageOf(t, layerOf(t, files(2, "new", 20)...)))
	must(t, "build", "--size", "64M", ref)
	now, _ := manifestOf(t, ref)
	if was.Layers[0].Digest == now.Layers[0].Digest {
		t.Fatal("the images have one index")
	}
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, now.Layers[0].Digest.String()) {
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		}
		return true
	})
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--record", dir+"/t", "--trace", "auto", "--trace-push")
	if got := s.ready.Exports[0].Digest; got != old.Digest {
		t.Fatalf("%s is served", got)
	}
	wholeDevice(t, s.uri(), want)
	if _, code := s.term(); code != exitOK || !s.said("stored the recording beside its image") {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
	var sum tracefile.Summary
	if err := json.Unmarshal([]byte(must(t, "trace", "show", "--json", dir+"/t")), &sum); err != nil {
		t.Fatal(err)
	}
	if sum.Index != was.Layers[0].Digest.Hex {
		t.Errorf("the trace is of index %s, served was %s", sum.Index, was.Layers[0].Digest)
	}
	p.set(nil)
	if _, found := blockImageOf(t, ref); len(found.Traces) != 0 {
		t.Error("the trace of the old image is beside the new one")
	}
	if _, found := blockImageOf(t, withDigest(ref, old.Digest)); len(found.Traces) != 1 {
		t.Error("the trace of the old image is not beside it")
	}
}
