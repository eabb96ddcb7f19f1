package main

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A build that a signal ends says what the next one reuses. It leaves no temporary
// file, and no upload in the registry.
func TestEndedBuildLeavesNothing(t *testing.T) {
	t.Parallel()
	storage := t.TempDir()
	reg := startRegistry(t, "", storage, "")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		p := startProxy(t, reg.addr)
		ref := p.host() + "/team/app:v1"
		push(t, ref, sample(t))
		b := startHungBuild(t, p, ref, nil, asThaw+"=patient")
		if uploads := uploadsIn(t, storage); len(uploads) == 0 {
			t.Fatal("the registry has no upload: this tests nothing")
		}
		if err := b.signal(sig); err != nil {
			t.Fatal(err)
		}
		status := b.wait()
		want := "thaw: interrupted: no layer was finished: the next build starts from the beginning\n"
		if status.ExitStatus() != exitError || !strings.HasSuffix(b.stderr.String(), want) {
			t.Errorf("%v: exit %d, want %q:\n%s", sig, status.ExitStatus(), want, b.stderr.String())
		}
		if left := filesIn(t, b.temp); len(left) > 0 {
			t.Errorf("%v leaves %q", sig, left)
		}
		if uploads := uploadsIn(t, storage); len(uploads) > 0 {
			t.Errorf("%v leaves the uploads %q", sig, uploads)
		}
	}
}

// A second signal ends a build at once, which waits for a registry in order to end.
func TestSecondSignalEndsABuild(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		p := startProxy(t, reg.addr)
		ref := p.host() + "/team/app:v1"
		push(t, ref, sample(t))
		cancelled := make(chan struct{}, 100)
		b := startHungBuild(t, p, ref, func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodDelete {
				cancelled <- struct{}{}
				<-r.Context().Done()
				panic(http.ErrAbortHandler)
			}
			return true
		}, asThaw+"=patient") // it does not end by itself before a second signal comes, however busy this machine is
		if err := b.signal(sig); err != nil {
			t.Fatal(err)
		}
		select {
		case <-cancelled:
		case <-time.After(atMost):
			t.Fatalf("%v: the uploads are not cancelled", sig)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for b.signal(sig) == nil { // until it is gone
				time.Sleep(50 * time.Millisecond)
			}
		}()
		if status := b.wait(); !status.Signaled() || status.Signal() != sig {
			t.Errorf("%v twice: exit %d, killed by %v", sig, status.ExitStatus(), status.Signal())
		}
		<-ended
	}
}

// hungBuild is a build in a process of its own, whose uploads hang.
type hungBuild struct {
	t      testing.TB
	p      *os.Process
	temp   string
	stderr syncBuffer
	waited func() error
	state  func() *os.ProcessState
}

// startHungBuild starts it and waits until an upload hangs. before sees the other
// requests from then on.
func startHungBuild(t testing.TB, p *proxy, ref string, before func(http.ResponseWriter, *http.Request) bool, env ...string) *hungBuild {
	t.Helper()
	b := &hungBuild{t: t, temp: t.TempDir()}
	asked := make(chan struct{}, 100)
	var hangs atomic.Bool
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut || r.Method == http.MethodPatch {
			hangs.Store(true)
			asked <- struct{}{}
			io.Copy(io.Discard, r.Body) // or else nobody notices that the client goes
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}
		return before == nil || !hangs.Load() || before(w, r)
	})
	cmd := asProgram("build", ref, "--temp", b.temp)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = &b.stderr
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	select {
	case <-asked:
	case <-time.After(atMost):
		t.Fatal("it pushes nothing")
	}
	b.p, b.waited, b.state = cmd.Process, cmd.Wait, func() *os.ProcessState { return cmd.ProcessState }
	return b
}

func (b *hungBuild) signal(sig syscall.Signal) error { return b.p.Signal(sig) }

// wait waits for its end.
func (b *hungBuild) wait() syscall.WaitStatus {
	b.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- b.waited() }()
	select {
	case <-ended:
	case <-time.After(atMost):
		b.t.Fatal("the build does not end")
	}
	return b.state().Sys().(syscall.WaitStatus)
}

// uploadsIn are the uploads that a docker-registry expects to go on. Of one that was
// cancelled it keeps a directory, without the file that says when it was begun.
func uploadsIn(t testing.TB, storage string) []string {
	t.Helper()
	found, err := filepath.Glob(storage + "/docker/registry/v2/repositories/*/*/_uploads/*/startedat")
	if err != nil {
		t.Fatal(err)
	}
	return found
}
