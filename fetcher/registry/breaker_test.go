package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
)

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &breakers{backoff: time.Second}
		u := &url.URL{Scheme: "https", Host: "r.example", Path: "/v2/app/blobs/sha256:0"}
		name := kindOf(u) + " " + u.Host
		cause := errors.New("the line is cut")
		pass := func() error { return b.pass(name, time.Now(), "GET", u) }
		fail := func(after time.Duration) { b.failed(name, time.Now(), after, cause) }
		// open returns how long the circuit is open.
		open := func() time.Duration {
			t.Helper()
			start := time.Now()
			err := pass()
			for ; err != nil; err = pass() {
				if !errors.Is(err, ErrUnavailable) || !errors.Is(err, cause) || RetryAfter(err) <= 0 {
					t.Fatalf("%v, after %v", err, RetryAfter(err))
				}
				time.Sleep(RetryAfter(err))
			}
			return time.Since(start)
		}
		for range maxFails {
			if err := pass(); err != nil {
				t.Errorf("closed: %v", err)
			}
			fail(0)
		}
		fail(0) // of a request that was under way at the same time
		if pass() == nil {
			t.Error("a request passes after failures in a row")
		}
		for i := range 8 {
			want := min(time.Second<<i, maxOpen)
			if d := open(); d > want || d < want/4 {
				t.Errorf("failure %d: open for %v, want up to %v", i, d, want)
			}
			// open has let the one through that finds out.
			if err := pass(); RetryAfter(err) != trialWait {
				t.Errorf("a second request passes: %v", err)
			}
			fail(0)
		}
		open()
		b.unknown(name) // its caller has gone away
		if err := pass(); err != nil {
			t.Errorf("no other request finds out: %v", err)
		}
		if pass() == nil {
			t.Error("two requests find out")
		}
		time.Sleep(trialTime) // it hangs
		if err := pass(); err != nil {
			t.Errorf("a request that hangs keeps all others back: %v", err)
		}
		b.works(name)
		for range 3 {
			if err := pass(); err != nil {
				t.Errorf("closed again: %v", err)
			}
		}
		// What a host asks for counts at once, within limits.
		fail(3 * time.Second)
		if d := open(); d != 3*time.Second {
			t.Errorf("open for %v", d)
		}
		fail(time.Hour)
		if d := open(); d != maxBlobWait {
			t.Errorf("blobs: open for %v", d)
		}
		name = "manifests r.example"
		if err := pass(); err != nil {
			t.Errorf("another kind: %v", err)
		}
		fail(time.Hour)
		if d := open(); d != time.Hour {
			t.Errorf("manifests: open for %v", d)
		}
		for i := range 2 * maxNotes {
			b.failed(fmt.Sprint("blobs ", i), time.Now(), 0, cause)
		}
		if n := len(b.mu.circuits); n > maxNotes {
			t.Errorf("%d circuits", n)
		}
	})
}

func TestKinds(t *testing.T) {
	for path, want := range map[string]string{
		"/v2/team/app/manifests/v1":             "manifests",
		"/v2/team/app/referrers/sha256:0":       "manifests",
		"/v2/team/app/blobs/sha256:0":           "blobs",
		"/v2/team/app/blobs/uploads/":           "uploads",
		"/bucket/manifests/blobs":               "blobs", // storage
		"/v2/manifests/blobs/sha256:0123456789": "blobs",
	} {
		if got := kindOf(&url.URL{Path: path}); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

// A registry that asks to wait is not asked by anybody until then, and then by one first.
func TestRetryAfterHost(t *testing.T) {
	for name, header := range map[string]func() string{
		"seconds": func() string { return "1" },
		"a date":  func() string { return time.Now().Add(3 * time.Second).UTC().Format(http.TimeFormat) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, r, l, layer := faultyRepo(t, Options{})
			var told atomic.Int64
			f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
				if told.CompareAndSwap(0, 1) {
					w.Header().Set("Retry-After", header())
					w.WriteHeader(http.StatusTooManyRequests)
					return
				}
				serveContent(layer)(w, r)
			}))
			start := time.Now()
			_, err := readRange(t.Context(), r, l.Digest, 0, 10)
			wait := RetryAfter(err)
			if wait <= 0 || wait > 3*time.Second {
				t.Fatalf("%v, after %v", err, wait)
			}
			var early, done atomic.Int64
			var readers sync.WaitGroup
			for i := range int64(50) {
				readers.Go(func() {
					for {
						b, err := readRange(t.Context(), r, l.Digest, i*1000, 1000)
						if err == nil {
							if !bytes.Equal(b, layer[i*1000:i*1000+1000]) {
								t.Error("wrong bytes")
							}
							if time.Since(start) < wait {
								early.Add(1)
							}
							done.Add(1)
							return
						}
						if !Temporary(err) || RetryAfter(err) <= 0 || time.Since(start) > time.Minute {
							t.Errorf("%v, after %v", err, RetryAfter(err))
							return
						}
						time.Sleep(RetryAfter(err))
					}
				})
			}
			// What is of another kind is asked for meanwhile.
			if _, err := r.Resolve(t.Context(), nil); err != nil {
				t.Error(err)
			}
			readers.Wait()
			if early.Load() > 0 || done.Load() != 50 {
				t.Errorf("%d of %d readers did not wait", early.Load(), done.Load())
			}
			if n := f.requests.Load(); n != 1+1+50 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

// A registry that fails in a row is left alone for a short time; all calls learn why. When it
// works again, so do they.
func TestBreakerRegistry(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{backoff: 50 * time.Millisecond})
	f.set(asBlob(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	const calls = 1000
	var sent atomic.Int64
	for range calls {
		_, err := readRange(t.Context(), r, l.Digest, 0, 10)
		if !Temporary(err) || statusOf(err) != http.StatusBadGateway && !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		if RetryAfter(err) == 0 {
			sent.Add(1)
		}
	}
	if n := f.requests.Load(); n > maxFails+20 || n != sent.Load() {
		t.Errorf("%d requests for %d calls, %d of them said so", n, calls, sent.Load())
	}
	if s := r.client.Stats(); s[0].Errors[502] != sent.Load() {
		t.Errorf("%+v", s)
	}
	f.set(asBlob(serveContent(layer)))
	persist(t, r, l.Digest, layer, blockmap.Range(0, 10), blockmap.Range(50, 10))
	for range 10 {
		if _, err := readRange(t.Context(), r, l.Digest, 0, 10); err != nil {
			t.Errorf("it works again: %v", err)
		}
	}
	// Who gives up says nothing about the registry.
	f.set(hang)
	for range 3 * maxFails {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, err := readRange(ctx, r, l.Digest, 0, 10)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
	f.set(asBlob(serveContent(layer)))
	if _, err := readRange(t.Context(), r, l.Digest, 0, 10); err != nil {
		t.Error(err)
	}
}

// The pauses between attempts are spread over all of their length, so that hosts that failed
// together do not return together.
func TestFullJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Options{backoff: time.Second})
		defer c.Close()
		paused := func(n int, err error) time.Duration {
			start := time.Now()
			if err := c.pause(t.Context(), n, err); err != nil {
				t.Fatal(err)
			}
			return time.Since(start)
		}
		for n, limit := range map[int]time.Duration{1: time.Second, 3: 4 * time.Second, 30: maxBackoff} {
			var tenths [10]int
			for range 500 {
				d := paused(n, ErrUnavailable)
				if d > limit {
					t.Fatalf("attempt %d: %v", n, d)
				}
				tenths[min(int(10*d/limit), 9)]++
			}
			for i, k := range tenths {
				if k < 20 || k > 90 {
					t.Errorf("attempt %d: %d of 500 pauses lie in tenth %d", n, k, i)
				}
			}
		}
		told := &httpError{err: ErrUnavailable, after: 20 * time.Second}
		seen := make(map[time.Duration]bool)
		for range 20 {
			d := paused(1, told)
			if d < told.after || d > told.after+told.after/4 {
				t.Errorf("told to wait for %v, waited for %v", told.after, d)
			}
			seen[d] = true
		}
		if len(seen) < 10 {
			t.Errorf("all return at once: %v", seen)
		}
	})
}
