package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// When an image is complete, its registry can be shut down: the device goes on to work,
// and so does a server that is started again, whether its image is named by a tag or by a
// digest.
func TestServeWithoutRegistry(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy")
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	cache := filepath.Dir(socket(t))
	serve := func(image string) *server {
		t.Helper()
		return serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--complete", "50ms")
	}
	device := func() *host.CompletionInfo {
		t.Helper()
		var d listedDevice
		if err := json.Unmarshal([]byte(must(t, "list", "--json", "--cache", cache)), &d); err != nil || d.Completion == nil {
			t.Fatalf("%+v, %v", d, err)
		}
		return d.Completion
	}
	content := func(s *server) []byte {
		t.Helper()
		out := filepath.Join(t.TempDir(), "device")
		tool(t, "nbdcopy", s.uri(), out)
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}

	s := serve(ref)
	for end := time.Now().Add(atMost); device().State != "complete"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it is not complete: %+v\n%s", device(), s.stderr.String())
		}
	}
	if out := must(t, "status", "--cache", cache); !bytes.Contains([]byte(out), []byte("all complete")) {
		t.Errorf("the status is\n%s", out)
	}
	digest := s.ready.Exports[0].Image
	reg.stop()
	want := content(s)
	s.term()
	for _, name := range []string{digest, ref} {
		s = serve(name)
		if !bytes.Equal(content(s), want) {
			t.Errorf("%s: other bytes without the registry", name)
		}
		if c := device(); c.State != "complete" || c.Missing != 0 {
			t.Errorf("%s: %+v", name, c)
		}
		if summary, code := s.term(); code != 0 || summary["fetched_bytes"] != 0.0 || summary["failed_chunks"] != 0.0 {
			t.Errorf("%s: exit %d, %v", name, code, summary)
		}
	}
}

// --complete takes a time or off.
func TestCompleteFlag(t *testing.T) {
	var f completeFlag
	for s, want := range map[string]time.Duration{"off": 0, "30s": 30 * time.Second, "1ms": time.Millisecond} {
		if err := f.Set(s); err != nil || time.Duration(f) != want || f.String() != s && s != "30s" {
			t.Errorf("%s: %v, %v", s, f.String(), err)
		}
	}
	for _, s := range []string{"", "10", "0s", "-1s", "on", "never"} {
		if err := f.Set(s); err == nil {
			t.Errorf("%q is accepted as %v", s, f.String())
		}
	}
}
