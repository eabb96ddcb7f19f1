package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// persist reads ranges as a fetcher does: it waits as long as it is told to, distrusts wrong
// bytes, and tries again. wrong counts the bodies with wrong bytes.
func persist(t *testing.T, r *Repo, h v1.Hash, content []byte, ranges ...blockmap.Extent) (wrong int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	open := func() (io.ReadCloser, []blockmap.Extent, error) {
		if len(ranges) > 1 {
			rc, err := r.OpenRanges(ctx, digestOf(h), ranges)
			if rc != nil || err != nil {
				return rc, ranges, err
			}
		}
		rc, err := r.OpenRange(ctx, digestOf(h), ranges[0].Start, ranges[0].Len())
		return rc, ranges[:1], err
	}
	for len(ranges) > 0 {
		rc, got, err := open()
		var b []byte
		if err == nil {
			b, err = io.ReadAll(rc)
			if err == nil && !bytes.Equal(b, bytesOf(content, got)) {
				err = fmt.Errorf("%w: wrong bytes", ErrUnavailable)
				rc.(*Body).Distrust()
				wrong++
			}
			rc.Close()
		}
		switch {
		case err == nil:
			ranges = ranges[len(got):]
		case !Temporary(err):
			t.Fatal(err)
		default:
			select {
			case <-time.After(max(RetryAfter(err), 2*time.Millisecond)):
			case <-ctx.Done():
				t.Fatalf("the bytes have not come: %v", err)
			}
		}
	}
	return wrong
}

// rangeOf reads a Range header with one range.
func rangeOf(r *http.Request, size int) (from, to int, ok bool) {
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil || strings.Contains(r.Header.Get("Range"), ",") {
		return 0, size - 1, false
	}
	return from, min(to, size-1), true
}

// sendRange sends a part of content as one says it.
func sendRange(w http.ResponseWriter, status, from, to, size int, body []byte) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, size))
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// Caches and peer-to-peer proxies in front of a registry, as their users have reported them.
// Whatever they do, readers get the registry's bytes. What the header of an answer betrays
// brings no wrong byte.
func TestEngines(t *testing.T) {
	type engine struct {
		reported string
		answer   func(w http.ResponseWriter, r *http.Request, layer []byte, n int64)
		wrong    bool // only the digest shows it
	}
	for name, x := range map[string]engine{
		"a part with 200": {reported: "dragonflyoss/client#1874", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			sendRange(w, http.StatusOK, from, to, len(layer), layer[from:to+1])
		}},
		"a part with 200, in pieces of unknown length": {reported: "dragonflyoss/client#1874", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(layer)))
			w.WriteHeader(http.StatusOK)
			http.NewResponseController(w).Flush()
			// As long as the blob, so that only the header tells.
			w.Write(layer[from : to+1])
			w.Write(layer)
		}},
		"the beginning in the place of each part": {reported: "dragonflyoss/client#1889, #1932", wrong: true, answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			sendRange(w, http.StatusPartialContent, from, to, len(layer), layer[:to+1-from])
		}},
		"a part that ends early and well": {reported: "dragonflyoss/client#1959", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(layer)))
			w.WriteHeader(http.StatusPartialContent)
			http.NewResponseController(w).Flush()
			w.Write(layer[from : (from+to)/2])
		}},
		"a part that is cut": {reported: "dragonflyoss/client#1959", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			partly(w, r, layer, 0.5, false)
		}},
		"whole pieces instead of the part": {reported: "dragonflyoss/dragonfly#3679", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			from, to = from&^0xffff, min(to|0xffff, len(layer)-1)
			sendRange(w, http.StatusPartialContent, from, to, len(layer), layer[from:to+1])
		}},
		"more bytes than the part has": {reported: "dragonflyoss/dragonfly#4366", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			sendRange(w, http.StatusPartialContent, from, to, len(layer), layer[from-1:to+1])
		}},
		"a blob of another size each time": {reported: "goharbor/harbor#23600", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, n int64) {
			from, to, _ := rangeOf(r, len(layer))
			sendRange(w, http.StatusPartialContent, from, to, len(layer)+int(n), layer[from:to+1])
		}},
		"a part of which nobody knows the place": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(layer[from : to+1])
		}},
		"compressed on the way": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			w.Header().Set("Content-Encoding", "gzip")
			sendRange(w, http.StatusPartialContent, from, to, len(layer), layer[from:to+1])
		}},
		"compressed twice on the way": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			from, to, _ := rangeOf(r, len(layer))
			w.Header()["Content-Encoding"] = []string{"identity", "zstd"}
			sendRange(w, http.StatusPartialContent, from, to, len(layer), layer[from:to+1])
		}},
		"the whole blob, always": {reported: "goharbor/harbor#23875", answer: func(w http.ResponseWriter, _ *http.Request, layer []byte, _ int64) {
			w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
			w.Write(layer)
		}},
		"the whole blob, of unknown length": {reported: "goharbor/harbor#23923", answer: func(w http.ResponseWriter, _ *http.Request, layer []byte, _ int64) {
			http.NewResponseController(w).Flush()
			w.Write(layer)
		}},
		"a truncated blob": {reported: "goharbor/harbor#23600", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			serveContent(layer[:1000])(w, r)
		}},
		"404 until it has the blob": {reported: "goharbor/harbor#22609, spegel-org/spegel#217", answer: func(w http.ResponseWriter, _ *http.Request, _ []byte, _ int64) {
			w.WriteHeader(http.StatusNotFound)
		}},
		"500 for what no peer has": {reported: "spegel-org/spegel#530", answer: func(w http.ResponseWriter, _ *http.Request, _ []byte, _ int64) {
			w.WriteHeader(http.StatusInternalServerError)
		}},
		"200 with nothing, once the blob has expired": {reported: "distribution/distribution#1356", answer: func(w http.ResponseWriter, _ *http.Request, _ []byte, _ int64) {
			w.Header().Set("Content-Length", "0")
		}},
		"400 for several ranges, nothing for one": {reported: "containerd/stargz-snapshotter#81", answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			if _, _, one := rangeOf(r, len(layer)); !one {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		}},
		"429 with a date": {reported: "containerd/containerd#10447", answer: func(w http.ResponseWriter, _ *http.Request, _ []byte, _ int64) {
			w.Header().Set("Retry-After", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusTooManyRequests)
		}},
		"a redirect to storage that refuses": {reported: "rpardini/docker-registry-proxy#26", answer: func(w http.ResponseWriter, r *http.Request, _ []byte, _ int64) {
			if r.URL.Query().Has("X-Amz-Signature") {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			http.Redirect(w, r, r.URL.Path+"?X-Amz-Signature=old", http.StatusTemporaryRedirect)
		}},
		"no answer until all peers have been asked": {reported: "getnora-io/nora#1002, spegel-org/spegel#551", answer: func(_ http.ResponseWriter, r *http.Request, _ []byte, _ int64) {
			<-r.Context().Done()
		}},
		"several parts with the same bytes": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			w.WriteHeader(http.StatusPartialContent)
			span := "Content-Range: bytes 70000-70099/" + fmt.Sprint(len(layer))
			io.WriteString(w, multipartBody("x", [2]string{span, string(layer[70000:70100])}, [2]string{span, string(layer[70000:70100])}))
		}},
		"parts of blobs of different sizes": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte, _ int64) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, multipartBody("x",
				[2]string{"Content-Range: bytes 70000-70099/2097155", string(layer[70000:70100])},
				[2]string{"Content-Range: bytes 90000-90099/2097156", string(layer[90000:90100])}))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := Options{HeaderTimeout: time.Minute}
			if strings.HasPrefix(name, "no answer") {
				o.leastLate = minLate
			}
			_, mirror, r, l, layer := mirrored(t, o)
			var n atomic.Int64
			mirror.set(asBlob(func(w http.ResponseWriter, r *http.Request) { x.answer(w, r, layer, n.Add(1)) }))
			wrong := 0
			for _, ranges := range [][]blockmap.Extent{
				{blockmap.Range(70_000, 100)},
				{blockmap.Range(70_000, 100), blockmap.Range(90_000, 100)},
				{blockmap.Range(1, 300_000)},
				{blockmap.Range(1<<20, 9000), blockmap.Range(3, 1), blockmap.Range(100_000, 70_000)},
			} {
				wrong += persist(t, r, l.Digest, layer, ranges...)
			}
			if wrong > 0 != x.wrong {
				t.Errorf("%d bodies had wrong bytes", wrong)
			}
			if n.Load() == 0 {
				t.Error("the mirror was not asked")
			}
			// Whole blobs come through it, or past it, as before.
			if b, err := r.Blob(t.Context(), l); err != nil || !bytes.Equal(b, layer) {
				t.Errorf("%d bytes, %v", len(b), err)
			}
		})
	}
}

// pullThrough is a mirror that answers with whole blobs until it has copied them.
type pullThrough struct {
	layer  []byte
	after  time.Duration // from the first request for a blob until it has the blob
	whole  atomic.Int64  // whole blobs that it began to send
	parts  atomic.Int64
	begun  atomic.Int64 // UnixNano of the first request
	single bool         // it gives one range at a time, and for several the whole blob
}

func (p *pullThrough) answer(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	first := p.begun.CompareAndSwap(0, now.UnixNano())
	_, _, one := rangeOf(r, len(p.layer))
	// However slow the machine is, the first two are answered so by one that has to copy.
	again := p.after > 0 && (first || p.whole.Load() < 2)
	if again || now.Sub(time.Unix(0, p.begun.Load())) < p.after || p.single && !one {
		p.whole.Add(1)
		w.Header().Set("Content-Length", fmt.Sprint(len(p.layer)))
		w.Write(p.layer)
		return
	}
	p.parts.Add(1)
	serveContent(p.layer)(w, r)
}

// While a cache copies a blob, thaw waits and asks seldom. The registry is not asked at all,
// and the cache is used as soon as it has the blob: also for several ranges at once.
func TestPullThrough(t *testing.T) {
	for _, several := range []bool{false, true} {
		t.Run(fmt.Sprintf("several ranges %v", several), func(t *testing.T) {
			t.Parallel()
			origin, mirror, r, l, layer := mirrored(t, Options{})
			p := &pullThrough{layer: layer, after: 700 * time.Millisecond}
			mirror.set(asBlob(p.answer))
			start := time.Now()
			var readers sync.WaitGroup
			for i := range int64(32) {
				readers.Go(func() {
					ranges := []blockmap.Extent{blockmap.Range(i*1000, 1000)}
					if several {
						ranges = append(ranges, blockmap.Range(100_000+i*1000, 1000))
					}
					persist(t, r, l.Digest, layer, ranges...)
				})
			}
			readers.Wait()
			if n := origin.requests.Load(); n != 0 {
				t.Errorf("the registry was asked %d times", n)
			}
			// Another one asks when an answer takes longer than pollTime.
			if n := p.whole.Load(); n < 2 || n > 5+int64(max(time.Since(start)-2*p.after, 0)/pollTime) {
				t.Errorf("the mirror began to send the whole blob %d times", n)
			}
			if most := map[bool]int{false: 1, true: maxRanges}[several]; several && r.Ranges() != most {
				t.Errorf("%d ranges at once", r.Ranges())
			}
			if restingMirrors(r) != 0 {
				t.Errorf("%+v", r.client.Stats())
			}
			before := p.whole.Load()
			persist(t, r, l.Digest, layer, blockmap.Range(5, 50), blockmap.Range(500, 50))
			if p.whole.Load() != before {
				t.Error("the mirror was asked for several ranges again, which it does not give")
			}
		})
	}
}

// An image may be named by the address of a cache, which is its registry then. thaw waits for its
// copy, too. A server that knows no ranges, and a cache that gives none for long, are read at once.
func TestPullThroughRegistry(t *testing.T) {
	for name, x := range map[string]struct {
		cache     bool          // it says that it is a registry of docker's kind
		after     time.Duration // it gives ranges
		impatient bool          // thaw has waited for it in vain
		parts     int64
		most      time.Duration
	}{
		"cache":              {true, 700 * time.Millisecond, false, 32, time.Minute},
		"no ranges":          {false, time.Hour, false, 0, originPatience * 3 / 4},
		"cache, without end": {true, time.Hour, true, 0, originPatience * 3 / 4},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			origin, _, _, l, layer := mirrored(t, Options{})
			r := openRepo(t, newClient(t, Options{}), origin.host()+"/app:v1")
			p := &pullThrough{layer: layer, after: x.after}
			origin.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
				if x.cache {
					w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
				}
				p.answer(w, r)
			}))
			if src := r.reader.(*remote).origin.src; x.impatient {
				src.mu.restless, src.mu.patient = time.Now().Add(time.Hour), time.Now()
			}
			start := time.Now()
			var readers sync.WaitGroup
			for i := range int64(32) {
				readers.Go(func() { persist(t, r, l.Digest, layer, blockmap.Range(i*1000, 1000)) })
			}
			readers.Wait()
			if took := time.Since(start); took > x.most {
				t.Errorf("took %v", took)
			}
			// The first 32 may all ask before one is answered. After that few do, unless an answer
			// takes longer than pollTime.
			if n := p.whole.Load(); n > 40+int64(max(time.Since(start)-2*time.Second, 0)/pollTime) || n == 0 {
				t.Errorf("it began to send the whole blob %d times", n)
			}
			if n := p.parts.Load(); n != x.parts {
				t.Errorf("it has sent %d ranges, instead of %d", n, x.parts)
			}
		})
	}
}

// thaw does not wait for long for a cache that takes its time: it reads from the registry,
// and from the cache later. Nor does it wait for each blob.
func TestPullThroughSlow(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{})
	other := noise(2<<20+3, 8)
	_, l2 := pushImage(t, t.Context(), openRepo(t, newClient(t, Options{}), origin.host()+"/app:v2"), "v2", other, amd64)
	p, p2 := &pullThrough{layer: layer, after: time.Hour}, &pullThrough{layer: other, after: time.Hour}
	mirror.set(asBlob(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, l2.Digest.Hex) {
			p2.answer(w, req)
		} else {
			p.answer(w, req)
		}
	}))
	origin.set(nil)
	origin.requests.Store(0)
	start := time.Now()
	persist(t, r, l.Digest, layer, blockmap.Range(1000, 1000))
	if took := time.Since(start); took < maxPatience/2 || took > 4*maxPatience {
		t.Errorf("the first read took %v", took)
	}
	reads := func() time.Duration {
		start := time.Now()
		for i := range int64(20) {
			persist(t, r, l.Digest, layer, blockmap.Range(i*1000, 1000))
			persist(t, r, l2.Digest, other, blockmap.Range(i*1000, 1000))
		}
		return time.Since(start)
	}
	took, again := reads(), reads()
	if took-2*again > maxPatience/2 { // it waits for the second blob
		t.Errorf("the next reads took %v, and the same once more %v", took, again)
	}
	if n := origin.requests.Load(); n != 81 {
		t.Errorf("the registry was asked %d times", n)
	}
	if n := p.whole.Load() + p2.whole.Load(); n > 12 {
		t.Errorf("the mirror began to send whole blobs %d times", n)
	}
	if s := r.client.Stats(); restingMirrors(r) != 0 {
		t.Errorf("%+v", s)
	}
	// Its time comes.
	p.after = 0
	m := r.reader.(*remote)
	m.mirrors(false)[0].update(l.Digest, func(s *blobState) { s.pulling.next = time.Now() })
	origin.requests.Store(0)
	for i := range int64(20) {
		persist(t, r, l.Digest, layer, blockmap.Range(i*1000, 1000))
	}
	if p.parts.Load() != 20 || origin.requests.Load() != 0 {
		t.Errorf("%d parts from the mirror, %d requests to the registry", p.parts.Load(), origin.requests.Load())
	}
}

// While readers wait for a cache, a demand that is late does not turn to the registry, and
// afterwards it does. Who gives up does not wait.
func TestPullThroughElsewhere(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{})
	mirror.set(asBlob((&pullThrough{layer: layer, after: time.Hour}).answer))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	start := time.Now()
	if _, err := readRange(ctx, r, l.Digest, 5, 100); !errors.Is(err, errPulling) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > maxPatience/2+time.Second {
		t.Errorf("took %v", took)
	}
	e := r.reader.(*remote).mirrors(false)[0]
	e.update(l.Digest, func(s *blobState) { s.pulling.next = time.Now().Add(time.Minute) })
	if rc, err := r.OpenRangeElsewhere(t.Context(), digestOf(l.Digest), 5, 100, ""); rc != nil || err != nil {
		t.Fatal(rc, err)
	}
	e.src.mu.Lock()
	e.src.mu.patient = time.Now()
	e.src.mu.Unlock()
	rc, err := r.OpenRangeElsewhere(t.Context(), digestOf(l.Digest), 5, 100, "")
	if err != nil || rc == nil {
		t.Fatal(rc, err)
	}
	defer rc.Close()
	if b, err := io.ReadAll(rc); err != nil || !bytes.Equal(b, layer[5:105]) || rc.(*Body).Source() != origin.URL {
		t.Errorf("%d bytes from %s, %v", len(b), rc.(*Body).Source(), err)
	}
}

// A mirror in front of object storage answers requests for several ranges with the whole blob.
// thaw takes it for one that is still copying only once, and then asks for one range at a time.
func TestPullThroughSingle(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{})
	p := &pullThrough{layer: layer, single: true}
	mirror.set(asBlob(p.answer))
	for i := range int64(10) {
		persist(t, r, l.Digest, layer, blockmap.Range(i*1000, 1000), blockmap.Range(100_000+i*1000, 1000))
	}
	if p.whole.Load() > 2 || p.parts.Load() < 19 || origin.requests.Load() != 0 || r.Ranges() != 1 {
		t.Errorf("%d whole blobs, %d parts, %d requests to the registry, %d ranges at once", p.whole.Load(), p.parts.Load(), origin.requests.Load(), r.Ranges())
	}
}

// A small blob is taken as it comes, and so is a range that is all of the blob.
func TestPullThroughSmall(t *testing.T) {
	origin, mirror, r, l, layer := mirrored(t, Options{})
	small := layer[:100_000]
	p, p2 := &pullThrough{layer: layer, after: time.Hour}, &pullThrough{layer: small, after: time.Hour}
	mirror.set(asBlob(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, l.Digest.Hex) {
			p.answer(w, req)
		} else {
			p2.answer(w, req)
		}
	}))
	persist(t, r, l.Digest, layer, blockmap.Range(0, l.Size))
	persist(t, r, hashOf(small), small, blockmap.Range(5000, 10))
	if p.whole.Load() != 1 || p2.whole.Load() != 1 || origin.requests.Load() != 0 {
		t.Errorf("asked for %d and %d times, %d requests to the registry", p.whole.Load(), p2.whole.Load(), origin.requests.Load())
	}
}
