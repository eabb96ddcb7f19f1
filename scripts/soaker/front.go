package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// front is a proxy before the registry that injects faults.
type front struct {
	host   string
	to     string
	server *http.Server

	mu     sync.Mutex
	rng    *rand.Rand
	faults int // per 100 requests
	counts map[string]int
}

func newFront(to string, rng *rand.Rand) *front {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err) // loopback
	}
	f := &front{host: l.Addr().String(), to: to, rng: rng, counts: make(map[string]int)}
	f.server = &http.Server{Handler: f}
	go f.server.Serve(l)
	return f
}

func (f *front) close() { f.server.Close() }

func (f *front) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var s []string
	for _, k := range slices.Sorted(maps.Keys(f.counts)) {
		s = append(s, fmt.Sprintf("%s %d", k, f.counts[k]))
	}
	return strings.Join(s, ", ")
}

// kinds of faults. "" is no fault.
var kinds = []string{"hang", "late", "trickle", "cut", "flip", "reset", "500", "503", "429", "403", "404", "html", "wrong range", "no range", "empty"}

// fault chooses the fault of a request.
func (f *front) fault() (kind string, delay time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	kind = ""
	if f.rng.IntN(100) < f.faults {
		kind = kinds[f.rng.IntN(len(kinds))]
	}
	f.counts[kind]++
	return kind, time.Duration(f.rng.IntN(1500)) * time.Millisecond
}

// weather changes the share of faults. An origin has none for half of the time:
// otherwise no source would have some of the chunks.
func (f *front) weather(ctx context.Context, origin bool) {
	for ctx.Err() == nil {
		f.mu.Lock()
		lasts := time.Duration(2000+f.rng.IntN(5000)) * time.Millisecond
		switch n := f.rng.IntN(10); {
		case n < 5 && origin, n < 2:
			f.faults = 0
		case n < 9:
			f.faults = 10 + f.rng.IntN(40)
		default:
			f.faults = 100
		}
		f.mu.Unlock()
		select {
		case <-time.After(lasts):
		case <-ctx.Done():
		}
	}
}

func (f *front) calm() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = 0
}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, delay := f.fault()
	status := map[string]int{"500": 500, "503": 503, "429": 429, "403": 403, "404": 404}[kind]
	switch {
	case kind == "hang":
		select { // with a bound, like everything here
		case <-r.Context().Done():
		case <-time.After(time.Minute):
		}
		return
	case kind == "late":
		time.Sleep(delay)
	case kind == "html":
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte("<html>please log in</html>"))
		return
	case kind == "reset":
		if c, _, err := http.NewResponseController(w).Hijack(); err == nil {
			if t, ok := c.(*net.TCPConn); ok {
				_ = t.SetLinger(0) // fails only if the client is gone
			}
			c.Close()
		}
		return
	case status != 0:
		if status == 503 || status == 429 {
			w.Header().Set("Retry-After", "1")
		}
		http.Error(w, "no", status)
		return
	}
	req, err := http.NewRequestWithContext(r.Context(), r.Method, "http://"+f.to+r.URL.RequestURI(), r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req.Header = r.Header.Clone()
	if kind == "no range" {
		req.Header.Del("Range")
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	maps.Copy(w.Header(), resp.Header)
	if kind == "wrong range" && w.Header().Get("Content-Range") != "" {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/*", len(body)-1))
	}
	w.WriteHeader(resp.StatusCode)
	if r.Method == http.MethodHead {
		return
	}
	switch kind {
	case "cut":
		w.Write(body[:len(body)/2])
		panic(http.ErrAbortHandler)
	case "empty":
		panic(http.ErrAbortHandler)
	case "flip":
		if len(body) > 0 {
			body[len(body)/2] ^= 4
		}
	case "trickle":
		for i := range min(len(body), 120) {
			if _, err := w.Write(body[i : i+1]); err != nil {
				return
			}
			http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(time.Second):
			}
		}
		return
	}
	w.Write(body)
}
