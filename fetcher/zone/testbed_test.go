package zone

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

func TestMain(m *testing.M) { blocktest.Main(m) }

const (
	testZone = "zone-1"
	imageRef = "registry.example/team/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

// testStore is the Store of a host that has a cache, and a registry that can be slow or
// fail.
type testStore struct {
	t       testing.TB
	dir     string
	image   *blocktest.Image
	cache   *blockmap.Cache
	stream  *blockmap.Stream
	table   *blockmap.Table
	content []byte

	fetched, blobs atomic.Int64                  // chunks and blob pieces from the registry
	opening        atomic.Pointer[chan struct{}] // the image is opened when it is closed; nil: at once

	mu      sync.Mutex
	gate    chan struct{} // the registry answers when it is closed; nil: at once
	err     error         // of the registry
	absent  bool          // the host does not open the image
	flights map[int]chan struct{}
	waited  func() // called when a peer begins to wait for a flight; may be nil
}

func newTestStore(t testing.TB, o blockmap.CacheOptions) *testStore {
	t.Helper()
	m := blocktest.NewImage(t, 7, 2400)
	dir := t.TempDir()
	c, err := blockmap.OpenCache(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s := &testStore{t: t, dir: dir, image: m, cache: c, table: &m.Index.Streams[1], flights: make(map[int]chan struct{})}
	if s.stream, err = c.Stream(s.table); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stream.Release)
	for i := range s.table.Chunks {
		s.content = append(s.content, s.chunk(i)...)
	}
	return s
}

// chunk is the content of a chunk.
func (s *testStore) chunk(i int) []byte {
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	c := &s.table.Chunks[i]
	b, err := dec.Decode(c, s.image.Blobs[s.table.Blob][c.Offset:c.Offset+int64(c.Stored)], nil)
	if err != nil {
		s.t.Error(err)
	}
	return b
}

// part is the content of chunks first to last.
func (s *testStore) part(first, last int) []byte {
	return s.content[s.stream.ChunkRange(first).Start:s.stream.ChunkRange(last).End]
}

// block has the registry wait until the returned function is called.
func (s *testStore) block() (unblock func()) {
	gate := make(chan struct{})
	s.mu.Lock()
	s.gate = gate
	s.mu.Unlock()
	unblock = sync.OnceFunc(func() { close(gate) })
	s.t.Cleanup(unblock)
	return unblock
}

func (s *testStore) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// registry waits as the registry does.
func (s *testStore) registry(ctx context.Context) error {
	s.mu.Lock()
	gate, err := s.gate, s.err
	s.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return err
}

func (s *testStore) Allows(string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.absent {
		return ErrAbsent
	}
	return nil
}

func (s *testStore) Stream(_ context.Context, image string, stream blockmap.Digest) (StoredStream, func(), error) {
	if opened := s.opening.Load(); opened != nil {
		<-*opened
	}
	s.mu.Lock()
	absent := s.absent
	s.mu.Unlock()
	if absent || image != imageRef || stream != s.stream.ID() {
		return nil, nil, fmt.Errorf("%w: no such stream", ErrAbsent)
	}
	return testStream{s}, func() {}, nil
}

func (s *testStore) Blob(ctx context.Context, image string, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	b, ok := s.image.Blobs[blob]
	if !ok || image != imageRef || off+n > int64(len(b)) {
		return nil, ErrAbsent
	}
	if err := s.registry(ctx); err != nil {
		return nil, err
	}
	s.blobs.Add(1)
	return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
}

type testStream struct{ *testStore }

func (s testStream) Stream() *blockmap.Stream { return s.stream }

func (s testStream) FetchOwned(ctx context.Context, first, last int) error {
	if err := s.registry(ctx); err != nil {
		return err
	}
	for i := first; i <= last; i++ {
		s.fill(i)
	}
	return nil
}

// fill has a chunk come from the registry, unless it is here.
func (s *testStore) fill(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream.Has(i) {
		return
	}
	s.fetched.Add(1)
	if err := s.stream.Fill(i, s.chunk(i)); err != nil {
		s.t.Error(err)
	}
}

// flight has the host fetch a chunk by itself, until the returned function is called.
func (s *testStore) flight(i int) (ended func()) {
	done := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flights[i] = done
	return func() { close(done) }
}

func (s testStream) InFlight(first, last int) (func(context.Context) error, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []chan struct{}
	for i := first; i <= last; i++ {
		if s.stream.Has(i) {
			continue
		}
		c := s.flights[i]
		if c == nil {
			return nil, false
		}
		all = append(all, c)
	}
	waited := s.waited
	return func(ctx context.Context) error {
		if waited != nil {
			waited()
		}
		for _, c := range all {
			select {
			case <-c:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}, true
}

// quick has memberlist tell everything soon. It does not take a member for dead that is silent
// for a second or two, as all are on a busy machine.
func quick(c *memberlist.Config) {
	c.ProbeInterval, c.ProbeTimeout = 500*time.Millisecond, 400*time.Millisecond
	c.GossipInterval, c.PushPullInterval = 20*time.Millisecond, 500*time.Millisecond
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = 4, 2
	c.GossipToTheDeadTime, c.DeadNodeReclaimTime = time.Second, 100*time.Millisecond
	c.TCPTimeout = 10 * time.Second
}

// open opens a zone, which is closed with the test.
func open(t testing.TB, o Options) *Zone {
	t.Helper()
	if o.Zone == "" {
		o.Zone = testZone
	}
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	if o.timing == nil {
		o.timing = quick
	}
	o.Version = "v1.2.3"
	z, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(z.Close)
	return z
}

// seed is a zone as others join it.
func (z *Zone) seed(t testing.TB) Seed {
	t.Helper()
	s, err := ParseSeed(z.Addr())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// disown makes another host the owner of everything.
func (z *Zone) disown() { z.router.SetMembers([]string{"another"}) }

// chunksURL is a request for chunks.
func (z *Zone) chunksURL(s *testStore, first, last int, more string) string {
	return fmt.Sprintf("http://%s/v1/streams/%s/chunks/%d-%d?image=%s&zone=%s&from=peer-1%s", z.Addr(), s.stream.ID(), first, last, imageRef, testZone, more)
}

// firstPiece is the end of the first piece of the image's first blob.
func (s *testStore) firstPiece() int64 {
	return min(int64(len(s.image.Blobs[s.table.Blob])), PieceBytes)
}

// pieceURL is a request for a piece of the image's first blob.
func (z *Zone) pieceURL(blob blockmap.Digest, off, end int64, more string) string {
	return fmt.Sprintf("http://%s/v1/blobs/%s/%d-%d?image=%s&zone=%s&from=peer-1%s", z.Addr(), blob, off, end, imageRef, testZone, more)
}

// get asks by a client of its own.
func get(t testing.TB, url string) (code int, body []byte, header http.Header) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	return resp.StatusCode, body, resp.Header
}

// await waits until ok, for a minute at most.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// status returns the counts when no upload is under way any more. Who has asked has the last
// byte before the server has counted it.
func (z *Zone) status(t testing.TB) Status {
	t.Helper()
	await(t, "all uploads have ended", func() bool { return z.server.uploads.count() == 0 })
	return z.Status()
}

// authority issues certificates.
type authority struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	n    int64
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, dir: t.TempDir(), key: key, n: 1}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "zone test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func (a *authority) ca() string { return filepath.Join(a.dir, "ca.pem") }

// issue makes a certificate with these names, in files of the first one.
func (a *authority) issue(names ...string) (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.n++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.n), Subject: pkix.Name{CommonName: names[0]}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	file := strings.ReplaceAll(names[0], "*", "wildcard")
	return a.write(file+".pem", "CERTIFICATE", der), a.write(file+".key", "EC PRIVATE KEY", b)
}

// credentials are those of a certificate with these names.
func (a *authority) credentials(names ...string) *Credentials {
	a.t.Helper()
	cert, key := a.issue(names...)
	c, err := ReadCredentials(cert, key, a.ca())
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// secure is Options with these credentials.
func secure(c *Credentials, o Options) Options {
	o.TLS = func() *Credentials { return c }
	o.Secrets = func() ([]string, error) { return []string{"a secret of the test"}, nil }
	return o
}

// as is a client with a certificate; nil: without one.
func as(c *Credentials, server string) *http.Client {
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if c != nil {
		config = c.toPeer(server)
	}
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, Protocols: &p}, Timeout: time.Minute}
}

var errRegistry = errors.New("the registry of the test has failed")
