package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

var someRanges = []blockmap.Extent{blockmap.Range(70_001, 300_000), blockmap.Range(3, 10), blockmap.Range(1<<20, 1), blockmap.Range(1<<20+1, 9), blockmap.Range(2<<20, 3)}

// bytesOf returns the bytes of ranges.
func bytesOf(content []byte, ranges []blockmap.Extent) (all []byte) {
	for _, x := range ranges {
		all = append(all, content[x.Start:x.End]...)
	}
	return all
}

// readRanges returns nil without an error if the client must request the ranges one by
// one.
func readRanges(r *Repo, h v1.Hash, ranges []blockmap.Extent) ([]byte, error) {
	rc, err := r.OpenRanges(context.Background(), digestOf(h), ranges)
	if err != nil || rc == nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// asBlob makes a handler answer the requests for blobs.
func asBlob(h http.HandlerFunc) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			h(w, r)
		}
		return isBlob(r)
	}
}

func serveContent(content []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}
}

// The answers of real servers: docker-registry gives several ranges,
// go-containerregistry does not, and for files no server is asked.
func TestRanges(t *testing.T) {
	media(t, func(t *testing.T, place string) {
		r := openRepo(t, newClient(t, Options{}), place+":v1")
		layer := noise(2<<20+3, 9)
		_, l := pushImage(t, t.Context(), r, "v1", layer, amd64)
		several := strings.Contains(t.Name(), "docker-registry")
		var before int64
		for _, s := range r.client.Stats() {
			before += s.Requests
		}
		for range 3 {
			b, err := readRanges(r, l.Digest, someRanges)
			if err != nil || several && !bytes.Equal(b, bytesOf(layer, someRanges)) || !several && b != nil {
				t.Errorf("%d bytes, %v", len(b), err)
			}
			if n := r.Ranges(); n != map[bool]int{true: maxRanges, false: 1}[several] {
				t.Errorf("%d ranges at once", n)
			}
		}
		var requests int64
		for _, s := range r.client.Stats() {
			requests += s.Requests
		}
		if want := map[bool]int64{true: 3, false: 1}[several]; requests-before > want {
			t.Errorf("%d requests, want %d", requests-before, want)
		}
		if b, err := readRange(t.Context(), r, l.Digest, 5, 7); err != nil || !bytes.Equal(b, layer[5:12]) {
			t.Errorf("%v", err)
		}
	})
}

func TestRangesMisused(t *testing.T) {
	f, r, l, _ := faultyRepo(t, Options{})
	for _, ranges := range [][]blockmap.Extent{
		{blockmap.Range(5, 3), blockmap.Range(3, 3)}, {blockmap.Range(0, 10), blockmap.Range(9, 5)}, {blockmap.Range(-1, 3), blockmap.Range(10, 5)}, {blockmap.Range(0, 0), blockmap.Range(10, 5)}, {blockmap.Range(0, 5), blockmap.Range(10, -1)}, {blockmap.Range(5, 1), blockmap.Range(6, 1<<63-1)},
	} {
		if _, err := readRanges(r, l.Digest, ranges); err == nil || Temporary(err) {
			t.Errorf("%v: %v", ranges, err)
		}
	}
	many := make([]blockmap.Extent, maxRanges+1)
	for i := range many {
		many[i] = blockmap.Range(int64(i)*2, 1)
	}
	if b, err := readRanges(r, l.Digest, many); b != nil || err != nil || f.requests.Load() != 0 {
		t.Errorf("%d bytes, %v, %d requests", len(b), err, f.requests.Load())
	}
}

// multipartBody is an answer with the given parts: each is a header and its bytes.
func multipartBody(boundary string, parts ...[2]string) string {
	var b strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&b, "\r\n--%s\r\n%s\r\n\r\n%s", boundary, p[0], p[1])
	}
	fmt.Fprintf(&b, "\r\n--%s--\r\n", boundary)
	return b.String()
}

func contentRange(off, n int) string {
	return fmt.Sprintf("Content-Range: bytes %d-%d/2097155", off, off+n-1)
}

// For every answer of a server, the bytes are right, or there is an error that another
// try may fix, or the client must request the ranges one by one. In the last case these
// requests succeed.
func TestRangesFaults(t *testing.T) {
	ranges := []blockmap.Extent{blockmap.Range(100, 5000), blockmap.Range(90_000, 8000)}
	layer := noise(2<<20+3, 7)
	a, b := string(layer[100:5100]), string(layer[90_000:98_000])
	answer := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, body)
		}
	}
	const multi = "multipart/byteranges; boundary=xyz"
	whole := multipartBody("xyz", [2]string{contentRange(100, 5000), a}, [2]string{contentRange(90_000, 8000), b})
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	for _, x := range []struct {
		name   string
		answer http.HandlerFunc
		want   string // right, one by one, temporary, or permanent
	}{
		{"as Go does", serveContent(layer), "right"},
		{"plain", answer(multi, whole), "right"},
		{"quoted boundary", answer(`multipart/byteranges; boundary="xyz"`, whole), "right"},
		{"no empty line first", answer(multi, strings.TrimPrefix(whole, "\r\n")), "right"},
		{"bare line feeds", answer(multi, "--xyz\nCONTENT-range:bytes 100-5099/*\n\n"+a+"\r\n--xyz \nContent-Type: x\n"+contentRange(90_000, 8000)+"\n\n"+b), "right"},
		{"nothing behind the last part", answer(multi, whole[:len(whole)-len("\r\n--xyz--\r\n")]), "right"},
		{"garbage behind the last part", answer(multi, whole+strings.Repeat("z", 10_000)), "right"},
		{"all of the blob", func(w http.ResponseWriter, r *http.Request) { w.Write(layer) }, "one by one"},
		{"the first range alone", func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=100-5099")
			serveContent(layer)(w, r)
		}, "one by one"},
		{"without a boundary", answer("multipart/byteranges", whole), "one by one"},
		{"another type", answer("multipart/mixed; boundary=xyz", whole), "one by one"},
		{"416", status(416), "one by one"},
		{"400", status(400), "one by one"},
		{"501", status(501), "one by one"},
		{"labelled as compressed, falsely", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			answer(multi, whole)(w, r)
		}, "right"},
		{"other ranges", answer(multi, multipartBody("xyz", [2]string{contentRange(101, 5000), a})), "one by one"},
		{"one range of both", answer(multi, multipartBody("xyz", [2]string{contentRange(100, 97_900), string(layer[100:98_000])})), "one by one"},
		{"no Content-Range", answer(multi, multipartBody("xyz", [2]string{"Content-Type: x", a})), "one by one"},
		{"a Content-Range that cannot be read", answer(multi, multipartBody("xyz", [2]string{"Content-Range: 100", a})), "one by one"},
		{"a preamble", answer(multi, "This is a multipart message.\r\n"+whole), "one by one"},
		{"another boundary", answer(multi, strings.ReplaceAll(whole, "xyz", "abc")), "one by one"},
		{"a long line", answer(multi, "--xyz\r\nX: "+strings.Repeat("y", 1<<20)), "one by one"},
		{"many lines", answer(multi, "--xyz\r\n"+strings.Repeat("X: y\r\n", 10_000)), "one by one"},
		{"empty lines", answer(multi, strings.Repeat("\r\n", 10_000)), "one by one"},
		{"the second range is another", answer(multi, multipartBody("xyz", [2]string{contentRange(100, 5000), a}, [2]string{contentRange(0, 8000), b})), "temporary"},
		{"in another order", answer(multi, multipartBody("xyz", [2]string{contentRange(90_000, 8000), b}, [2]string{contentRange(100, 5000), a})), "one by one"},
		{"a part that is too long", answer(multi, multipartBody("xyz", [2]string{contentRange(100, 5000), a + "!"}, [2]string{contentRange(90_000, 8000), b})), "temporary"},
		{"a part that is too short", answer(multi, multipartBody("xyz", [2]string{contentRange(100, 5000), a[1:]}, [2]string{contentRange(90_000, 8000), b})), "temporary"},
		{"one part", answer(multi, multipartBody("xyz", [2]string{contentRange(100, 5000), a})), "temporary"},
		{"nothing", answer(multi, ""), "temporary"},
		{"cut in a header", answer(multi, whole[:20]), "temporary"},
		{"cut in a part", answer(multi, whole[:len(whole)/2]), "temporary"},
		{"reset in a part", func(w http.ResponseWriter, r *http.Request) {
			cut(w, http.Header{"Content-Type": {multi}, "Content-Length": {fmt.Sprint(len(whole))}}, 206, []byte(whole[:len(whole)/2]), true)
		}, "temporary"},
		{"stalls in a part", func(w http.ResponseWriter, r *http.Request) {
			answer(multi, whole[:len(whole)/2])(w, r)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "temporary"},
		{"503", status(503), "temporary"},
		{"404", status(404), "permanent"},
		{"403", status(403), "permanent"},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			var o Options
			if strings.HasPrefix(x.name, "stalls") {
				o.StallTimeout = time.Second
			}
			f, r, l, layer := faultyRepo(t, o)
			f.set(asBlob(x.answer))
			start := time.Now()
			got, err := readRanges(r, l.Digest, ranges)
			all := bytesOf(layer, ranges)
			what := "right"
			switch {
			case err != nil && Temporary(err):
				what = "temporary"
			case err != nil:
				what = "permanent"
			case got == nil:
				what = "one by one"
			}
			if what != x.want || err == nil && got != nil && !bytes.Equal(got, all) {
				t.Errorf("%s: %d bytes, %v", what, len(got), err)
			}
			if err == nil {
				if n := r.Ranges(); (n == 1) != (got == nil) {
					t.Errorf("%d ranges at once", n)
				}
			}
			if n := f.requests.Load(); n != 1 {
				t.Errorf("%d requests", n)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
			// After every fault, one more try brings the ranges.
			f.set(asBlob(serveContent(layer)))
			got, err = readRanges(r, l.Digest, ranges)
			if err != nil || got != nil && !bytes.Equal(got, all) {
				t.Errorf("then %d bytes, %v", len(got), err)
			}
			for _, x := range ranges {
				if b, err := readRange(t.Context(), r, l.Digest, x.Start, x.Len()); err != nil || !bytes.Equal(b, layer[x.Start:x.End]) {
					t.Errorf("one of them: %v", err)
				}
			}
		})
	}
}

// While it is unknown whether a server gives several ranges, one request finds out, and
// the other requests do not wait for it. If it fails, the answer stays unknown.
func TestRangesAskedOnce(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{})
	var arrived sync.WaitGroup
	release := make(chan bool)
	arrived.Add(1)
	f.set(asBlob(func(w http.ResponseWriter, _ *http.Request) {
		arrived.Done()
		<-release
		w.WriteHeader(503)
	}))
	first := make(chan error)
	go func() {
		_, err := readRanges(r, l.Digest, someRanges)
		first <- err
	}()
	arrived.Wait()
	if n := r.Ranges(); n != 1 {
		t.Errorf("%d ranges at once while it is not known", n)
	}
	if b, err := readRanges(r, l.Digest, someRanges); b != nil || err != nil || f.requests.Load() != 1 {
		t.Errorf("a second one asked too: %d bytes, %v, %d requests", len(b), err, f.requests.Load())
	}
	close(release)
	if err := <-first; !Temporary(err) {
		t.Error(err)
	}
	f.set(asBlob(serveContent(layer)))
	if n := r.Ranges(); n != maxRanges {
		t.Errorf("%d ranges at once after a failure", n)
	}
	if b, err := readRanges(r, l.Digest, someRanges); err != nil || !bytes.Equal(b, bytesOf(layer, someRanges)) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// A mirror that gives one range at a time gets requests for one range, and is not
// avoided. A mirror whose bytes are wrong is avoided.
func TestRangesOfMirrors(t *testing.T) {
	layer := noise(2<<20+3, 7)
	origin := newFaulty(t, memoryRegistry(t, true))
	mirror := newFaulty(t, origin.host())
	c := newClient(t, Options{Mirrors: Mirrors{origin.host(): {{URL: mirror.URL}}}})
	r := openRepo(t, c, origin.host()+"/app:v1")
	_, l := pushImage(t, t.Context(), r, "v1", layer, amd64)
	origin.set(asBlob(serveContent(layer)))
	mirror.set(asBlob(serveContent(layer)))

	rc, err := r.OpenRanges(t.Context(), digestOf(l.Digest), someRanges)
	if err != nil || rc.(*Body).Source() != mirror.URL {
		t.Fatalf("%v", err)
	}
	rc.(*Body).Distrust()
	rc.Close()
	if b, err := readRanges(r, l.Digest, someRanges); err != nil || !bytes.Equal(b, bytesOf(layer, someRanges)) {
		t.Errorf("from the registry: %d bytes, %v", len(b), err)
	}
	for _, s := range c.Stats() {
		if s.Resting != (s.MirrorOf != "") {
			t.Errorf("%+v", s)
		}
	}

	c = newClient(t, Options{Mirrors: Mirrors{origin.host(): {{URL: mirror.URL}}}})
	r = openRepo(t, c, origin.host()+"/app:v1")
	mirror.set(asBlob((&pullThrough{layer: layer, single: true}).answer))
	persist(t, r, l.Digest, layer, someRanges...)
	if b, err := readRanges(r, l.Digest, someRanges); b != nil || err != nil || r.Ranges() != 1 {
		t.Errorf("%d bytes, %v, %d ranges at once", len(b), err, r.Ranges())
	}
	for _, s := range c.Stats() {
		if s.Resting {
			t.Errorf("%+v", s)
		}
	}
}

// The connection is used again.
func TestRangesConnections(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{drain: time.Minute})
	f.set(asBlob(serveContent(layer)))
	f.conns.Store(0)
	for range 20 {
		if b, err := readRanges(r, l.Digest, someRanges); err != nil || !bytes.Equal(b, bytesOf(layer, someRanges)) {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
	}
	if n := f.conns.Load(); n > 2 {
		t.Errorf("%d connections for one reader", n)
	}
}

// A reader that has all bytes does not wait for a missing delimiter.
func TestRangesWithoutEnd(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{StallTimeout: time.Minute, HeaderTimeout: time.Minute})
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "multipart/byteranges; boundary=xyz")
		w.WriteHeader(http.StatusPartialContent)
		body := multipartBody("xyz", [2]string{contentRange(3, 5), string(layer[3:8])}, [2]string{contentRange(100, 9), string(layer[100:109])})
		io.WriteString(w, strings.TrimSuffix(body, "\r\n--xyz--\r\n"))
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	start := time.Now()
	ranges := []blockmap.Extent{blockmap.Range(3, 5), blockmap.Range(100, 9)}
	if b, err := readRanges(r, l.Digest, ranges); err != nil || !bytes.Equal(b, bytesOf(layer, ranges)) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

// The cost of requests at docker-registry: the same 150 ranges of 420 KiB, five
// requests at a time, with different numbers of ranges per request.
func BenchmarkRanges(b *testing.B) {
	const n, size, stride = 150, 420 << 10, 600 << 10
	r := openRepo(b, newClient(b, Options{}), dockerRegistry(b, "")+"/app:v1")
	_, l := pushImage(b, b.Context(), r, "v1", noise(n*stride, 5), amd64)
	for _, each := range []int{1, 2, 4, 8, maxRanges} {
		b.Run(fmt.Sprintf("ranges=%d", each), func(b *testing.B) {
			b.SetBytes(n * size)
			for b.Loop() {
				requests := make(chan []blockmap.Extent)
				var wg sync.WaitGroup
				for range 5 {
					wg.Go(func() {
						for ranges := range requests {
							if got, err := readAny(r, l.Digest, ranges); err != nil || got != int64(len(ranges))*size {
								b.Errorf("%d bytes, %v", got, err)
							}
						}
					})
				}
				for i := 0; i < n; i += each {
					var ranges []blockmap.Extent
					for j := i; j < min(i+each, n); j++ {
						ranges = append(ranges, blockmap.Range(int64(j)*stride, size))
					}
					requests <- ranges
				}
				close(requests)
				wg.Wait()
			}
		})
	}
}

// readAny reads ranges as a fetcher does, and counts their bytes.
func readAny(r *Repo, h v1.Hash, ranges []blockmap.Extent) (int64, error) {
	var rc io.ReadCloser
	var err error
	if len(ranges) == 1 {
		rc, err = r.OpenRange(context.Background(), digestOf(h), ranges[0].Start, ranges[0].Len())
	} else {
		rc, err = r.OpenRanges(context.Background(), digestOf(h), ranges)
	}
	if err != nil {
		return 0, err
	}
	if rc == nil { // while another one finds out whether they can be had
		var n int64
		for i := range ranges {
			m, err := readAny(r, h, ranges[i:i+1])
			if n += m; err != nil {
				return n, err
			}
		}
		return n, nil
	}
	defer rc.Close()
	return io.Copy(io.Discard, rc)
}

// The client remembers the target of a redirect, and asks the registry again when its
// signature has expired.
func TestRangesRedirected(t *testing.T) {
	layer := noise(2<<20+3, 7)
	var valid atomic.Int64
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("signature") != fmt.Sprint(valid.Load()) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		serveContent(layer)(w, r)
	}))
	f, r, l, _ := faultyRepo(t, Options{})
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("%s/blob?signature=%d", storage.URL, valid.Load()), http.StatusTemporaryRedirect)
	}))
	for i, want := range []int64{1, 0, 1, 0} {
		if i == 2 {
			valid.Add(1)
		}
		f.requests.Store(0)
		if b, err := readRanges(r, l.Digest, someRanges); err != nil || !bytes.Equal(b, bytesOf(layer, someRanges)) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		if n := f.requests.Load(); n != want {
			t.Errorf("call %d: %d requests of the registry, want %d", i, n, want)
		}
	}
}

// For any body, the read bytes have the expected length, or there is an error.
func FuzzParts(f *testing.F) {
	f.Add([]byte(multipartBody("b", [2]string{"Content-Range: bytes 2-4/*", "abc"}, [2]string{"Content-Range: bytes 9-9/10", "d"})), uint8(0))
	f.Add([]byte("--b\nContent-Range: bytes 2-4/*\n\nabc"), uint8(1))
	f.Fuzz(func(t *testing.T, body []byte, how uint8) {
		var in io.Reader = bytes.NewReader(body)
		if how%2 == 1 {
			in = iotest.OneByteReader(in)
		}
		ranges := []blockmap.Extent{blockmap.Range(2, 3), blockmap.Range(9, 1)}
		p := &parts{body: io.NopCloser(in), r: bufio.NewReaderSize(in, 64), boundary: []byte("--b"), ranges: ranges,
			src: &source{log: slog.New(slog.DiscardHandler)}}
		got, err := io.ReadAll(&Body{rc: p, left: 4})
		if err == nil && len(got) != 4 || len(got) > 4 {
			t.Errorf("%q: %d bytes, %v", body, len(got), err)
		}
		if err == nil && len(got) == 4 && !(bytes.Contains(body, got[:3]) && slices.Contains(body, got[3])) {
			t.Errorf("%q: %q is not in it", body, got)
		}
		if err != nil && !Temporary(err) && !errors.Is(err, io.ErrNoProgress) {
			t.Errorf("%q: %v", body, err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}
