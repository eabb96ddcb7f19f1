package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Options say how a Client works. The zero value is of use: anonymous, no
// mirrors, no proxy, HTTPS except to this host itself.
type Options struct {
	// Credentials are asked each time that a registry wants some: at the
	// first request, when a token has expired, and when what was sent is
	// refused. So they may change under way. Nil is nobody.
	Credentials Credentials
	// Insecure are the registries, HOST or HOST:PORT, that plain HTTP is
	// spoken to; "*" is all of them. To loopback addresses and localhost it
	// always is.
	Insecure []string
	// Mirrors are asked before the registries that they stand for.
	Mirrors Mirrors
	// Proxy as in http.Transport; nil is none.
	Proxy func(*http.Request) (*url.URL, error)
	// TLS has the certificates to trust and to show; nil is the system's.
	TLS *tls.Config
	// UserAgent is sent with every request; empty is "thaw".
	UserAgent string
	// DialTimeout bounds the making of a connection, HeaderTimeout the time
	// until an answer begins, StallTimeout the time between two bytes of a
	// body. Defaults: 10 s, 30 s, 20 s.
	DialTimeout, HeaderTimeout, StallTimeout time.Duration
	// IdleConns is how many connections to a host are kept between
	// requests; it should not be less than the requests at once. Default 64.
	IdleConns int
	// Attempts is how often what is retried here is tried: all but
	// OpenRange. Default 5.
	Attempts int
	// Log hears of mirrors that fail and servers that ignore ranges; nil is
	// silence.
	Log *slog.Logger

	backoff time.Duration // before the second attempt; tests lower it
}

// A Client holds what all repositories share: connections, tokens, mirrors and
// their health, counters.
type Client struct {
	opts      Options
	transport *http.Transport
	dialer    *dialer
	log       *slog.Logger

	mu struct {
		sync.Mutex
		sources   map[string]*source // by URL without the repository
		order     []*source
		endpoints map[string]*endpoint // by URL with the repository
		mirrors   Mirrors
	}
}

// New makes a client. It is to be closed.
func New(o Options) *Client {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&o.DialTimeout, 10*time.Second)
	def(&o.HeaderTimeout, 30*time.Second)
	def(&o.StallTimeout, 20*time.Second)
	def(&o.backoff, 200*time.Millisecond)
	if o.IdleConns <= 0 {
		o.IdleConns = 64
	}
	if o.Attempts <= 0 {
		o.Attempts = 5
	}
	if o.UserAgent == "" {
		o.UserAgent = "thaw"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{opts: o, log: o.Log, dialer: newDialer(net.Dialer{Timeout: o.DialTimeout, KeepAlive: 30 * time.Second})}
	c.transport = &http.Transport{
		Proxy:                  o.Proxy,
		DialContext:            c.dialer.dial,
		TLSClientConfig:        o.TLS.Clone(),
		TLSHandshakeTimeout:    o.DialTimeout,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           8 * o.IdleConns,
		MaxIdleConnsPerHost:    o.IdleConns,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		// A connection that has died unnoticed would hold up all that share it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		// A digest is of the bytes as they are stored.
		DisableCompression: true,
	}
	c.mu.sources = make(map[string]*source)
	c.mu.endpoints = make(map[string]*endpoint)
	c.mu.mirrors = o.Mirrors
	return c
}

// SetMirrors replaces the mirrors of all registries.
func (c *Client) SetMirrors(m Mirrors) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.mirrors = m
}

// OpenRangeElsewhere is OpenRange from another source than avoid, or nil where
// there is none.
func (r *Repo) OpenRangeElsewhere(context.Context, v1.Hash, int64, int64, string) (io.ReadCloser, error) {
	return nil, nil
}

// Close closes the connections that are idle. Bodies that are still open stay
// good until they are closed.
func (c *Client) Close() {
	c.dialer.close()
	c.transport.CloseIdleConnections()
}

// Open gives the repository, layout or archive that ref is in. No request is
// made yet, so it need not exist.
func (c *Client) Open(ref Ref) (*Repo, error) {
	r := &Repo{ref: ref, client: c}
	switch {
	case ref.Layout != "":
		l := &layout{dir: ref.Layout}
		r.reader, r.finder, r.target = l, l, l
	case ref.Archive != "":
		a := &archive{file: ref.Archive}
		r.reader, r.finder = a, a
	case ref.Registry != "" && ref.Repository != "":
		m, err := c.remote(ref)
		if err != nil {
			return nil, err
		}
		r.reader, r.finder, r.target = m, m, m
	default:
		return nil, errors.New("open: the image reference is empty")
	}
	return r, nil
}

func (c *Client) remote(ref Ref) (*remote, error) {
	m := &remote{client: c, name: ref.Place()}
	c.mu.Lock()
	mirrors := c.mu.mirrors[ref.Registry]
	c.mu.Unlock()
	for _, mirror := range mirrors {
		u, err := url.Parse(mirror)
		if err != nil {
			return nil, fmt.Errorf("mirror of %s: %w", ref.Registry, err)
		}
		m.endpoints = append(m.endpoints, c.endpoint(u, ref.Repository, ref.Registry))
	}
	scheme := "https"
	if c.insecure(ref.Registry) {
		scheme = "http"
	}
	m.origin = c.endpoint(&url.URL{Scheme: scheme, Host: ref.Registry}, ref.Repository, "")
	m.endpoints = append(m.endpoints, m.origin)
	return m, nil
}

// endpoint is the repository at base, made once, so that tokens are shared.
func (c *Client) endpoint(base *url.URL, repository, mirrorOf string) *endpoint {
	path := strings.Trim(base.Path, "/")
	if path != "" {
		path += "/"
	}
	path += repository
	root := &url.URL{Scheme: base.Scheme, Host: base.Host}

	c.mu.Lock()
	defer c.mu.Unlock()
	// A host may be the mirror of one registry and a registry itself: its
	// health is another matter in each role.
	role := root.String() + " " + mirrorOf
	src := c.mu.sources[role]
	if src == nil {
		src = &source{name: root.String(), mirrorOf: mirrorOf, log: c.log}
		c.mu.sources[role] = src
		c.mu.order = append(c.mu.order, src)
	}
	key := role + " " + path
	e := c.mu.endpoints[key]
	if e == nil {
		e = &endpoint{client: c, src: src, root: root, path: path, turn: make(chan struct{}, 1)}
		e.auth = &authorizer{client: c, root: root, repository: path}
		c.mu.endpoints[key] = e
	}
	return e
}

func (c *Client) insecure(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.Trim(name, "[]")
	if isLoopback(name) {
		return true
	}
	return slices.ContainsFunc(c.opts.Insecure, func(s string) bool { return s == "*" || s == host || s == name })
}

func isLoopback(name string) bool {
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && ip.IsLoopback()
}

// retry calls try until it succeeds, fails for good, or has been called
// Options.Attempts times.
func (c *Client) retry(ctx context.Context, try func() error) error {
	for n := 1; ; n++ {
		err := try()
		if err == nil || !Temporary(err) || n >= c.opts.Attempts {
			return err
		}
		if c.pause(ctx, n, err) != nil {
			return err
		}
	}
}

// pause waits before attempt n+1: longer each time, at random so that many
// clients do not return at once, and as long as the server asked for.
func (c *Client) pause(ctx context.Context, n int, err error) error {
	d := c.opts.backoff << min(n-1, 6)
	d = d/2 + rand.N(d)
	d = max(d, RetryAfter(err))
	if end, ok := ctx.Deadline(); ok && time.Until(end) < d {
		return context.DeadlineExceeded
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
