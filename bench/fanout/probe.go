package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"thaw/bench"
)

// peerChunk measures what a chunk from a peer takes, one after the other, on two idle hosts
// whose link has no limit: the time to the first byte and to the last one, beside the round trip
// of TCP.
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
	var first, last []time.Duration
	for round := range 4 {
		for i := range s.index.Streams {
			table := &s.index.Streams[i]
			for c := range table.Chunks {
				if table.Chunks[c].Size() != chunkBytes {
					continue
				}
				u := url.URL{Scheme: "https", Host: peer.addr + ":7946", Path: fmt.Sprintf("/v1/streams/%s/chunks/%d-%d", table.ID(), c, c),
					RawQuery: url.Values{"image": {image}, "zone": {"bench"}, "from": {asker.name}}.Encode()}
				a, z, ok, err := ask(ctx, client, u.String())
				if err != nil {
					return err
				}
				if ok && round > 0 {
					first, last = append(first, a), append(last, z)
				}
			}
		}
	}
	if len(first) == 0 {
		return errors.New("the peer has answered with no chunk")
	}
	trip, a, z := median(trips), median(first), median(last)
	progress("a chunk from a peer: round trip %v, first byte %v, all %v (p50 of %d)", trip, a, z, len(first))
	return b.rec.Add("Peer/image="+s.Name, bench.Measure{Value: float64(trip), Unit: "round-trip-ns"}, bench.Measure{Value: float64(a), Unit: "first-byte-ns"},
		bench.Measure{Value: float64(z), Unit: bench.Wall})
}

// chunkBytes is the size of the chunks that peerChunk asks for: that of most.
const chunkBytes = 1 << 20

// ask asks for a chunk. ok is false if the peer does not have it.
func ask(ctx context.Context, client *http.Client, u string) (first, last time.Duration, ok bool, err error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return 0, 0, false, err
	}
	began := time.Now()
	r, err := client.Do(q)
	if err != nil {
		return 0, 0, false, err
	}
	defer r.Body.Close()
	first = time.Since(began)
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return 0, 0, false, err
	}
	if r.StatusCode == http.StatusNotFound {
		return 0, 0, false, nil
	}
	if r.StatusCode != http.StatusOK || n != r.ContentLength {
		return 0, 0, false, fmt.Errorf("GET %s: %s, %d bytes", u, r.Status, n)
	}
	return first, time.Since(began), true, nil
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
	t := &http.Transport{
		DialContext:       func(_ context.Context, _, addr string) (net.Conn, error) { return m.dial(addr) },
		TLSClientConfig:   &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13},
		ForceAttemptHTTP2: true,
	}
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
	c.SetDeadline(time.Now().Add(10 * time.Second))
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
