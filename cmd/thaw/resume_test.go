package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A build is killed while it downloads a large layer, and while it pushes it. The next one
// downloads the rest alone, and then nothing; the one that is ended by ctrl-C says so.
func TestResumeLargeLayer(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	img := imageOf(t, layerOf(t, file{name: "large", data: random(1, 40<<20)}), layerOf(t, files(2, "b", 3)...))
	push(t, ref, img)
	push(t, reg.addr+"/team/other:v1", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	size, err := layers[0].Size()
	if err != nil {
		t.Fatal(err)
	}
	var want built
	if err := json.Unmarshal([]byte(must(t, "build", "--json", reg.addr+"/team/other:v1")), &want); err != nil {
		t.Fatal(err)
	}
	temp := t.TempDir()
	// interrupt ends a build when before says so, and returns what the build says.
	interrupt := func(sig syscall.Signal, before func(end func(), w http.ResponseWriter, r *http.Request) bool) string {
		t.Helper()
		p.take()
		reached := make(chan struct{}, 100)
		p.set(func(w http.ResponseWriter, r *http.Request) bool {
			return before(func() {
				reached <- struct{}{}
				io.Copy(io.Discard, r.Body) // or else nobody notices that the client goes
				<-r.Context().Done()
			}, w, r)
		})
		defer p.set(nil)
		cmd := asProgram("build", ref, "--temp", temp)
		var said syncBuffer
		cmd.Stderr = &said
		if err := startWithUs(cmd); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		select {
		case <-reached:
		case <-time.After(5 * atMost):
			t.Fatalf("the build does not come so far:\n%s", said.String())
		}
		// What was sent has been read when it is on disk, there as the layer or as its stream.
		kept := func() int64 { return max(sizeOf(t, temp, "layer-"), sizeOf(t, temp, "stream-thaw-layer-")) }
		for end := time.Now().Add(atMost); kept() < size/2-1<<20 && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		cmd.Process.Signal(sig)
		cmd.Wait()
		return said.String()
	}
	half := func(end func(), w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+digest.String()) {
			return true
		}
		resp, err := http.Get("http://" + reg.addr + r.URL.Path)
		if err != nil {
			t.Error(err)
			return false
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Length", fmt.Sprint(size))
		io.CopyN(w, resp.Body, size/2)
		w.(http.Flusher).Flush()
		end()
		return false
	}
	interrupt(syscall.SIGKILL, half)

	pushing := func(end func(), w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch && r.ContentLength > 16<<20 {
			end()
			return false
		}
		return true
	}
	interrupt(syscall.SIGKILL, pushing)
	var from []int64
	for _, s := range p.take() {
		if f := strings.Fields(s); f[0] == http.MethodGet && strings.HasSuffix(f[1], digest.Hex) {
			n := int64(0)
			if len(f) == 3 {
				n, err = strconv.ParseInt(strings.TrimSuffix(strings.TrimPrefix(f[2], "bytes="), fmt.Sprintf("-%d", size-1)), 10, 64)
				if err != nil {
					t.Fatal(err)
				}
			}
			from = append(from, n)
		}
	}
	if len(from) != 1 || from[0] < size/2-1<<20 {
		t.Errorf("after half of %d bytes, the build reads from bytes %d on", size, from)
	}

	said := interrupt(syscall.SIGINT, pushing)
	if !strings.Contains(said, "are kept in "+temp+"/thaw-streams-") || !strings.Contains(said, "goes on from there") {
		t.Errorf("it says:\n%s", said)
	}
	var got built
	if err := json.Unmarshal([]byte(must(t, "build", "--json", ref, "--temp", temp)), &got); err != nil {
		t.Fatal(err)
	}
	for _, s := range p.take() {
		if strings.HasPrefix(s, "GET ") && strings.Contains(s, digest.Hex) {
			t.Errorf("the layer is read again after it was converted: %s", s)
		}
	}
	if got.Digest != want.Digest {
		t.Errorf("%s, want %s", got.Digest, want.Digest)
	}
	must(t, "verify", ref)
	if left := filesIn(t, temp); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// sizeOf is how many bytes the files below dir have whose names begin with prefix.
func sizeOf(t testing.TB, dir, prefix string) (n int64) {
	t.Helper()
	filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || !strings.HasPrefix(d.Name(), prefix) {
			return nil // it was removed, or is another
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}
