package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
)

// trickle sends an endless answer with long pauses between bytes, until the client
// disconnects. It is faster than any stall timer that a byte resets.
func trickle(w http.ResponseWriter, r *http.Request, header http.Header, status int, begin []byte) {
	for k, v := range header {
		w.Header()[k] = v
	}
	w.WriteHeader(status)
	w.Write(begin)
	every := time.NewTicker(10 * time.Millisecond)
	defer every.Stop()
	for {
		if _, err := w.Write([]byte(" ")); err != nil || http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-every.C:
		}
	}
}

// Every read from a server, even of bytes that are discarded, has a least speed or a
// time limit, so a server that trickles does not block a reader.
func TestTrickle(t *testing.T) {
	const off, n = 70_000, 100_000
	big := http.Header{"Content-Length": {"2097155"}}
	partial := http.Header{"Content-Range": {fmt.Sprintf("bytes %d-%d/2097155", off, off+n-1)}, "Content-Length": {fmt.Sprint(n)}}
	blob := func(h http.Header, status int, begin int) func(http.ResponseWriter, *http.Request, []byte) bool {
		return func(w http.ResponseWriter, r *http.Request, layer []byte) bool {
			if isBlob(r) {
				trickle(w, r, h, status, layer[:begin])
			}
			return isBlob(r)
		}
	}
	manifest := func(status int, h http.Header) func(http.ResponseWriter, *http.Request, []byte) bool {
		return func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
			trickle(w, r, h, status, []byte(`{"a":"`))
			return true
		}
	}
	read := func(ctx context.Context, r *Repo, l v1.Descriptor) error {
		_, err := readRange(ctx, r, l.Digest, off, n)
		return err
	}
	resolve := func(ctx context.Context, r *Repo, _ v1.Descriptor) error {
		_, err := r.Resolve(ctx, nil)
		return err
	}
	for _, x := range []struct {
		name   string
		fault  func(http.ResponseWriter, *http.Request, []byte) bool
		do     func(context.Context, *Repo, v1.Descriptor) error
		status int // of the error, 0 for none
	}{
		{"a range", blob(partial, 206, 0), read, 0},
		{"a range after a good beginning", blob(partial, 206, 40_000), read, 0},
		{"the bytes before a range", blob(big, 200, 1000), read, 0},
		{"a whole blob", blob(big, 200, 0), func(ctx context.Context, r *Repo, l v1.Descriptor) error {
			_, err := r.Blob(ctx, l)
			return err
		}, 0},
		{"several ranges", blob(http.Header{"Content-Type": {"multipart/byteranges; boundary=x"}}, 206, 0), func(ctx context.Context, r *Repo, l v1.Descriptor) error {
			_, err := readRanges(r, l.Digest, someRanges)
			return err
		}, 0},
		{"a refusal of a blob", blob(nil, 503, 0), read, 503},
		{"a manifest", manifest(200, nil), resolve, 0},
		{"a refusal of a manifest", manifest(403, nil), resolve, 403},
		{"a redirect", func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
			trickle(w, r, http.Header{"Location": {r.URL.Path}}, 307, nil)
			return true
		}, resolve, 0},
		{"an upload", func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
			if r.Method == http.MethodPost || r.Method == http.MethodHead {
				return false
			}
			trickle(w, r, nil, 403, nil)
			return true
		}, func(ctx context.Context, r *Repo, l v1.Descriptor) error {
			_, err := r.PushBytes(ctx, []byte("data"), types.OCILayer)
			return err
		}, 403},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			o := Options{Attempts: 2, StallTimeout: 150 * time.Millisecond}
			if x.name == "an upload" {
				o.StallTimeout = 0 // of what the client sends; how long it reads the refusal is bounded otherwise
			}
			f, r, l, layer := faultyRepo(t, o)
			f.set(func(w http.ResponseWriter, r *http.Request) bool { return x.fault(w, r, layer) })
			start := time.Now()
			err := x.do(t.Context(), r, l)
			if err == nil || statusOf(err) != x.status {
				t.Errorf("%v", err)
			}
			if took := time.Since(start); took > 40*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// The client does not take a slow reader for a slow server.
func TestSlowReader(t *testing.T) {
	t.Parallel() // it sleeps most of the time
	_, r, l, layer := faultyRepo(t, Options{StallTimeout: 3 * time.Second})
	rc, err := r.OpenRange(t.Context(), digestOf(l.Digest), 0, l.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	var got []byte
	buf := make([]byte, 8<<10) // half of what is wanted of the server in that time
	for range 3 {
		n, err := io.ReadFull(rc, buf)
		if got = append(got, buf[:n]...); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3200 * time.Millisecond) // the reader, not the proof
	}
	rest, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(append(got, rest...), layer) {
		t.Errorf("%d bytes, %v", len(got)+len(rest), err)
	}
}

// A repository with one image, a mirror, and a registry. The mirror is patiently waited for,
// unless leastLate says otherwise.
func mirrored(t *testing.T, o Options) (origin, mirror *faulty, r *Repo, l v1.Descriptor, layer []byte) {
	t.Helper()
	origin = newFaulty(t, memoryRegistry(t, true))
	mirror = newFaulty(t, origin.host())
	layer = noise(2<<20+3, 7)
	_, l = pushImage(t, t.Context(), openRepo(t, newClient(t, Options{}), origin.host()+"/app:v1"), "v1", layer, amd64)
	origin.set(asBlob(serveContent(layer)))
	mirror.set(asBlob(serveContent(layer)))
	origin.requests.Store(0)
	o.Mirrors = Mirrors{origin.host(): {{URL: mirror.URL}}}
	if o.leastLate == 0 {
		o.leastLate = time.Minute
	}
	return origin, mirror, openRepo(t, newClient(t, o), origin.host()+"/app:v1"), l, layer
}

func hang(w http.ResponseWriter, r *http.Request) bool {
	if isBlob(r) {
		<-r.Context().Done()
	}
	return isBlob(r)
}

func restingMirrors(r *Repo) (n int) {
	for _, s := range r.client.Stats() {
		if s.Resting {
			n++
		}
	}
	return n
}

// Requests overtake a mirror that hangs. It holds no more than its share of requests,
// and is then avoided for some time.
func TestMirrorHangs(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{HeaderTimeout: time.Minute, StallTimeout: time.Minute, leastLate: minLate, leastRest: time.Minute})
	var waiting, most atomic.Int64
	mirror.set(func(w http.ResponseWriter, req *http.Request) bool {
		for n := waiting.Add(1); ; {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		defer waiting.Add(-1)
		return hang(w, req)
	})
	start := time.Now()
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			off := int64(i * 1000)
			var b []byte
			var err error
			if i%4 == 0 {
				ranges := []blockmap.Extent{blockmap.Range(off, 10), blockmap.Range(off+100, 10)}
				if b, err = readRanges(r, l.Digest, ranges); err == nil && b != nil && !bytes.Equal(b, bytesOf(layer, ranges)) {
					t.Error("wrong ranges")
				}
			} else if b, err = readRange(t.Context(), r, l.Digest, off, 1000); err == nil && !bytes.Equal(b, layer[off:off+1000]) {
				t.Error("wrong bytes")
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("64 readers took %v", took)
	}
	if most.Load() > maxWaiting {
		t.Errorf("%d requests hung at once, at most %d should", most.Load(), maxWaiting)
	}
	if restingMirrors(r) != 1 {
		t.Errorf("%+v", r.client.Stats())
	}
	// From now on the mirror costs almost no time.
	before := mirror.requests.Load()
	for i := range 20 {
		if b, err := readRange(t.Context(), r, l.Digest, int64(i), 10); err != nil || !bytes.Equal(b, layer[i:i+10]) {
			t.Error(err)
		}
	}
	if n := mirror.requests.Load() - before; n > 3 {
		t.Errorf("a mirror that hangs was asked %d times more", n)
	}
	if n := origin.requests.Load(); n < 20 {
		t.Errorf("the origin was asked %d times", n)
	}
	// The cancelled requests have ended.
	eventually(t, "no request hangs", func() bool { return waiting.Load() == 0 })
}

// After a failure one request tests whether the mirror works again, while the others go
// to other servers.
func TestMirrorProbed(t *testing.T) {
	s := &source{name: "m", mirrorOf: "r", log: new(lockedBuffer).logger()}
	now := time.Now()
	s.failed(0, ErrUnavailable)
	if s.enter(now) {
		t.Error("the client asks a mirror that it should avoid")
	}
	later := now.Add(time.Minute)
	if one, two := s.enter(later), s.enter(later); !one || two {
		t.Error("not one request finds out")
	}
	s.leave()
	s.succeeded()
	if one, two := s.enter(later), s.enter(later); !one || !two {
		t.Error("a mirror that works again is not asked")
	}
}

// The client asks a mirror again that was slow only once.
func TestMirrorLateOnce(t *testing.T) {
	_, mirror, r, l, layer := mirrored(t, Options{leastLate: minLate})
	var n atomic.Int64
	mirror.set(func(w http.ResponseWriter, req *http.Request) bool {
		if isBlob(req) && n.Add(1) == 3 {
			return hang(w, req)
		}
		return asBlob(serveContent(layer))(w, req)
	})
	from := make(map[string]int)
	for range 10 {
		rc, err := r.OpenRange(t.Context(), digestOf(l.Digest), 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, rc); err != nil {
			t.Error(err)
		}
		from[rc.(*Body).Source()]++
		rc.Close()
	}
	// On a busy machine other answers may be late, too.
	if from[mirror.URL] > 9 || from[mirror.URL] == 0 || restingMirrors(r) != 0 {
		t.Errorf("%v", from)
	}
	eventually(t, "the mirror is asked each time", func() bool { return n.Load() >= 10 })
}

// When all answers of a mirror are late, few requests turn to the registry early.
func TestMirrorBusy(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{leastLate: minLate})
	read := func(i int) {
		if b, err := readRange(t.Context(), r, l.Digest, int64(i), 10); err != nil || !bytes.Equal(b, layer[i:i+10]) {
			t.Error(err)
		}
	}
	for i := range 2 * hedgeEvery { // it is known to be quick
		read(i)
	}
	origin.requests.Store(0)
	var n atomic.Int64
	mirror.set(asBlob(func(w http.ResponseWriter, req *http.Request) {
		if n.Add(1)%2 == 0 { // half of the answers, so that the mirror does not rest
			select {
			case <-time.After(2 * minLate):
			case <-req.Context().Done():
			}
		}
		serveContent(layer)(w, req)
	}))
	var readers sync.WaitGroup
	for w := range 4 {
		readers.Go(func() {
			for i := range 10 {
				read(100*w + i)
			}
		})
	}
	readers.Wait()
	if got := origin.requests.Load(); got > maxHedges+40/hedgeEvery {
		t.Errorf("the registry was asked %d times for 40 reads", got)
	}
}

// If a demand trickles from a mirror, the client reads it from another server and
// avoids the mirror. If there is no other server, the client says so.
func TestOpenRangeElsewhere(t *testing.T) {
	ctx := t.Context()
	origin, mirror, r, l, layer := mirrored(t, Options{StallTimeout: time.Minute, HeaderTimeout: time.Minute, leastRest: time.Minute})
	mirror.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		trickle(w, r, http.Header{"Content-Range": {"bytes 0-99999/2097155"}, "Content-Length": {"100000"}}, 206, nil)
	}))
	late, err := r.OpenRange(ctx, digestOf(l.Digest), 0, 100_000)
	if err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 1)
	for end := time.Now().Add(time.Minute); !late.(*Body).watched.trickles() && time.Now().Before(end); { // as a reader that waits
		if _, err := late.Read(first); err != nil {
			t.Fatal(err)
		}
	}
	rc, err := r.OpenRangeElsewhere(ctx, digestOf(l.Digest), 0, 100_000, late.(*Body).Source())
	if err != nil || rc == nil {
		t.Fatal(rc, err)
	}
	if s := rc.(*Body).Source(); s != origin.URL {
		t.Errorf("from %s", s)
	}
	if b, err := io.ReadAll(rc); err != nil || !bytes.Equal(b, layer[:100_000]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	rc.Close()
	late.Close()
	if restingMirrors(r) != 1 {
		t.Error("the client does not avoid a mirror that trickled")
	}
	// The client avoids the only other source; the origin alone has no alternative.
	if rc, err := r.OpenRangeElsewhere(ctx, digestOf(l.Digest), 0, 10, origin.URL); rc != nil || err != nil {
		t.Errorf("%v, %v", rc, err)
	}
	alone := openRepo(t, newClient(t, Options{}), origin.host()+"/app:v1")
	if rc, err := alone.OpenRangeElsewhere(ctx, digestOf(l.Digest), 0, 10, origin.URL); rc != nil || err != nil {
		t.Errorf("%v, %v", rc, err)
	}
	dir := openRepo(t, newClient(t, Options{}), "oci:"+t.TempDir())
	if rc, err := dir.OpenRangeElsewhere(ctx, digestOf(l.Digest), 0, 10, ""); rc != nil || err != nil {
		t.Errorf("%v, %v", rc, err)
	}
	for _, x := range [][2]int64{{-1, 5}, {0, 0}, {5, 1<<63 - 1}} {
		if _, err := r.OpenRangeElsewhere(ctx, digestOf(l.Digest), x[0], x[1], ""); err == nil {
			t.Errorf("%v: no error", x)
		}
	}
	// The origin hangs, and the client asks the mirror instead.
	origin2, mirror2, r2, l2, layer2 := mirrored(t, Options{HeaderTimeout: time.Minute})
	origin2.set(hang)
	rc, err = r2.OpenRangeElsewhere(ctx, digestOf(l2.Digest), 7, 100, origin2.URL)
	if err != nil || rc == nil || rc.(*Body).Source() != mirror2.URL {
		t.Fatal(rc, err)
	}
	defer rc.Close()
	if b, err := io.ReadAll(rc); err != nil || !bytes.Equal(b, layer2[7:107]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// A trusted mirror that hangs does not delay what the origin resolves.
func TestResolverHangs(t *testing.T) {
	origin := newFaulty(t, memoryRegistry(t, true))
	img, _ := pushImage(t, t.Context(), openRepo(t, newClient(t, Options{}), origin.host()+"/app:v1"), "v1", []byte("x"), amd64)
	mirror := newFaulty(t, origin.host())
	mirror.set(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	c := newClient(t, Options{HeaderTimeout: time.Minute, Mirrors: Mirrors{origin.host(): {{mirror.URL, true}}}})
	r := openRepo(t, c, origin.host()+"/app:v1")
	start := time.Now()
	if got, err := r.Resolve(t.Context(), nil); err != nil || got.Digest != img.Digest {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := r.Lookup(t.Context(), r.Ref().WithTag("away")); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

// However a mirror is broken, the client gets the origin's bytes, whole and in ranges,
// and its manifests.
func TestMirrorsBroken(t *testing.T) {
	page := func(status int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(status)
			io.WriteString(w, "<html>log in"+strings.Repeat(" ", 3<<20))
			return true
		}
	}
	status := func(code int, h ...string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			for i := 0; i+1 < len(h); i += 2 {
				w.Header().Set(h[i], h[i+1])
			}
			w.WriteHeader(code)
			return true
		}
	}
	for name, fault := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"a page by 200":      page(200),
		"a page by 206":      page(206),
		"a page by 203":      page(203),
		"401":                status(401),
		"401 Basic":          status(401, "Www-Authenticate", `Basic realm="m"`),
		"401 Bearer":         status(401, "Www-Authenticate", `Bearer realm="http://127.0.0.1:1/token"`),
		"403":                status(403),
		"404":                status(404),
		"410":                status(410),
		"500":                status(500),
		"204":                status(204),
		"302 to a login":     status(302, "Location", "/login"),
		"302 to nowhere":     status(302),
		"302 to a dead host": status(302, "Location", "http://127.0.0.1:1/x"),
		"200 with nothing":   status(200),
		"200 of a wrong length": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Write([]byte("{}"))
			return true
		},
		"206 of another range":   status(206, "Content-Range", "bytes 1-5/2097155"),
		"206 of no range":        status(206, "Content-Range", "bytes */*"),
		"206 without its range":  status(206),
		"206 in words":           status(206, "Content-Range", "some bytes"),
		"broken off in the head": func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, mirror, r, l, layer := mirrored(t, Options{})
			mirror.set(fault)
			ctx := t.Context()
			img, err := r.Resolve(ctx, nil)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := r.Manifest(ctx, img.Descriptor); err != nil {
					t.Error(err)
				}
				for _, off := range []int64{0, 1, 70_000} {
					if b, err := readRange(ctx, r, l.Digest, off, 5000); err != nil || !bytes.Equal(b, layer[off:off+5000]) {
						t.Errorf("%d bytes at %d, %v", len(b), off, err)
					}
				}
				if b, err := r.Blob(ctx, l); err != nil || !bytes.Equal(b, layer) {
					t.Errorf("%d bytes, %v", len(b), err)
				}
			}
		})
	}
}

// The order in which the client asks sources.
func TestOrder(t *testing.T) {
	c := newClient(t, Options{Mirrors: Mirrors{"r.example": {{"https://a", false}, {"https://b", true}, {"https://c", false}}}})
	r := openRepo(t, c, "r.example/app")
	m := r.reader.(*remote)
	names := func(list []*endpoint) (names []string) {
		for _, e := range list {
			names = append(names, strings.TrimPrefix(e.src.name, "https://"))
		}
		return names
	}
	check := func(got []*endpoint, want ...string) {
		t.Helper()
		if !slices.Equal(names(got), want) {
			t.Errorf("%v, want %v", names(got), want)
		}
	}
	h := hashOf(nil)
	check(m.holders(h, ""), "a", "b", "c", "r.example")
	check(m.holders(h, "https://a"), "b", "c", "r.example")
	check(m.holders(h, "https://r.example"), "a", "b", "c")
	check(m.resolvers(), "b", "r.example")
	m.mirrors(false)[0].src.failed(0, ErrUnavailable)
	m.mirrors(false)[1].src.failed(0, ErrUnavailable)
	check(m.holders(h, ""), "c", "r.example", "a", "b")
	check(m.resolvers(), "r.example", "b")
	m.mirrors(false)[0].src.distrust()
	check(m.holders(h, ""), "c", "r.example", "b")
	m.mirrors(false)[2].update(h, func(s *blobState) { s.missing = time.Now().Add(time.Minute) })
	check(m.holders(h, ""), "r.example", "b")
}
