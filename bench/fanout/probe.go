package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"thaw/bench"
	"thaw/blockmap"
)

// peerChunk measures what a chunk from a peer takes, one after the other, on two idle hosts
// whose link has no limit: the time to the first byte, to the last one, to the last one of the
// form in which the registry has it, and to the end of the leaf that a reader waits for, beside
// the round trip of TCP.
func (b *benchmark) peerChunk(ctx context.Context, s *site) (err error) {
	rate := b.hostRate
	b.hostRate = 0
	defer func() { b.hostRate = rate }()
	f, err := b.newFleet(ctx, s, withZone, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	asker, peer := f.hosts[0], f.hosts[1]
	x, err := f.start(ctx, plainTag, []*member{peer}, 1, nil)
	if err == nil {
		err = errors.Join(x.errs...)
	}
	if err != nil {
		return err
	}
	trips, err := roundTrips(asker.namespace, peer.namespace)
	if err != nil {
		return err
	}
	client, err := f.client(asker)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	ref, err := name.ParseReference(s.direct(plainTag), name.Insecure)
	if err != nil {
		return err
	}
	got, err := remote.Head(ref, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	image := s.at(f.addr, plainTag[:len(plainTag)-len(":thaw")]) + "@" + got.Digest.String()
	var first, last, stored, leaf []time.Duration
	for round := range 4 {
		for i := range s.index.Streams {
			table := &s.index.Streams[i]
			for c := range table.Chunks {
				if table.Chunks[c].Size() != chunkBytes {
					continue
				}
				get := func(more url.Values, upTo int64) (x timing, err error) {
					q := url.Values{"image": {image}, "zone": {"bench"}, "from": {asker.name}}
					maps.Copy(q, more)
					u := url.URL{Scheme: "https", Host: peer.addr + ":7946", Path: fmt.Sprintf("/v1/streams/%s/chunks/%d-%d", table.ID(), c, c), RawQuery: q.Encode()}
					return ask(ctx, client, u.String(), upTo)
				}
				plain, err := get(nil, 0)
				if err != nil {
					return err
				}
				if !plain.ok {
					continue
				}
				compressed, err := get(url.Values{"stored": {fmt.Sprint(table.Chunks[c].Stored)}}, 0)
				if err != nil {
					return err
				}
				early, err := get(url.Values{"stored": {fmt.Sprint(table.Chunks[c].Stored)}, "leaves": {"0-0"}}, leafEnd)
				if err != nil {
					return err
				}
				if round == 0 {
					continue // the peer makes the digests of leaves once
				}
				first, last = append(first, plain.first), append(last, plain.last)
				if compressed.form == "stored" {
					stored = append(stored, compressed.last)
				}
				if strings.HasPrefix(early.form, "leaves") {
					leaf = append(leaf, early.upTo)
				}
			}
		}
	}
	if len(first) == 0 || len(stored) == 0 || len(leaf) == 0 {
		return fmt.Errorf("the peer has answered with %d chunks, %d as they are stored, and %d with a leaf first", len(first), len(stored), len(leaf))
	}
	trip, a, z, c, l := median(trips), median(first), median(last), median(stored), median(leaf)
	progress("a chunk from a peer: round trip %v, first byte %v, first leaf %v, all compressed %v, all %v (p50 of %d)", trip, a, l, c, z, len(first))
	return b.rec.Add("Peer/image="+s.Name, bench.Measure{Value: float64(trip), Unit: "round-trip-ns"}, bench.Measure{Value: float64(a), Unit: "first-byte-ns"},
		bench.Measure{Value: float64(l), Unit: "first-leaf-ns"}, bench.Measure{Value: float64(c), Unit: "stored-ns"}, bench.Measure{Value: float64(z), Unit: bench.Wall})
}

const (
	// chunkBytes is the size of the chunks that peerChunk asks for: that of most.
	chunkBytes = 1 << 20
	// leafEnd is where a leaf that is asked for first ends: behind the digests of all.
	leafEnd = chunkBytes/blockmap.LeafSize*int64(len(blockmap.Digest{})) + blockmap.LeafSize
)

// timing is what a request took: to the header, to the byte that was asked for, and in all. ok is
// false if the peer does not have the chunk.
type timing struct {
	first, upTo, last time.Duration
	form              string
	ok                bool
}

// ask asks for a chunk.
func ask(ctx context.Context, client *http.Client, u string, upTo int64) (x timing, err error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return x, err
	}
	began := time.Now()
	r, err := client.Do(q)
	if err != nil {
		return x, err
	}
	defer r.Body.Close()
	x.first = time.Since(began)
	n, err := io.CopyN(io.Discard, r.Body, upTo)
	x.upTo = time.Since(began)
	if err != nil && err != io.EOF {
		return x, err
	}
	m, err := io.Copy(io.Discard, r.Body)
	if err != nil || r.StatusCode == http.StatusNotFound {
		return x, err
	}
	x.last, x.form, x.ok = time.Since(began), r.Header.Get("Thaw-Form"), true
	if r.StatusCode != http.StatusOK || n+m != r.ContentLength {
		return x, fmt.Errorf("GET %s: %s, %d bytes", u, r.Status, n+m)
	}
	return x, nil
}

// client returns a client that asks peers in the name of a host.
func (f *fleet) client(m *member) (*http.Client, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(f.dir, m.name+".pem"), filepath.Join(f.dir, m.name+".key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(f.ca.ca())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	t := &http.Transport{ // it speaks HTTP/1.1, as members do
		DialContext:     func(_ context.Context, _, addr string) (net.Conn, error) { return m.dial(addr) },
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13},
		Protocols:       new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	return &http.Client{Transport: t}, nil
}

// roundTrips measures the round trip of a byte by TCP.
func roundTrips(from, to *namespace) (trips []time.Duration, err error) {
	l, err := to.listen(to.addr + ":0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	go func() { // until the connection is closed
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := from.dial(l.Addr().String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	p := []byte{0}
	for range 200 {
		began := time.Now()
		if _, err := c.Write(p); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, p); err != nil {
			return nil, err
		}
		trips = append(trips, time.Since(began))
	}
	return trips, nil
}

func median(v []time.Duration) time.Duration { return slices.Sorted(slices.Values(v))[len(v)/2] }
