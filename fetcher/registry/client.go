package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
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
	// Mirrors are asked before the registries that they stand for; see
	// Client.SetMirrors.
	Mirrors Mirrors
	// Proxy as in http.Transport; nil is none.
	Proxy func(*http.Request) (*url.URL, error)
	// TLS has the certificates to trust and to show; nil is the system's.
	TLS *tls.Config
	// UserAgent is sent with every request; empty is "thaw".
	UserAgent string
	// DialTimeout bounds the making of a connection, HeaderTimeout the time
	// until an answer begins. In each StallTimeout a body must bring 16 KiB, or
	// what is left of it; from a mirror, in half the time. Defaults: 10 s, 30 s,
	// 20 s.
	DialTimeout, HeaderTimeout, StallTimeout time.Duration
	// IdleConns is how many connections to a host are kept between
	// requests; it should not be less than the requests at once. Default 64.
	IdleConns int
	// Attempts is how often what is retried here is tried: all but
	// OpenRange. Default 5.
	Attempts int
	// TempDir is where archives that are compressed are decompressed to; empty
	// is the system's.
	TempDir string
	// Log hears of mirrors that fail, servers that ignore ranges or ask to be
	// left alone, and credentials that cannot be read; nil is silence.
	Log *slog.Logger

	// Settle is how long whoever has changed a list of referrers under a
	// fallback tag makes sure that it stays, against others that may change it
	// at the same time: 2.5 s unless it is set, which only tests do.
	Settle time.Duration

	backoff time.Duration // before the second attempt; tests lower it
}

// A Client holds what all repositories share: connections, tokens, mirrors and
// their health, counters.
type Client struct {
	opts      Options
	transport *http.Transport
	dialer    *dialer
	log       *slog.Logger
	mirrors   atomic.Pointer[Mirrors]
	overtaken sync.WaitGroup // requests that were given up, as they end

	cancelling cancelling

	mu struct {
		sync.Mutex
		sources   map[string]*source // by URL without the repository
		order     []*source
		endpoints map[string]*endpoint // by URL with the repository
		warned    map[string]bool      // by what was warned of
		waits     map[string]time.Time // by host, until when it asked to be left alone
	}
}

// Bounds of what a client remembers. What is beyond is made anew, which costs a
// token or a line in the log.
const (
	maxEndpoints = 16 << 10
	maxSources   = 4 << 10
	maxNotes     = 1 << 10
)

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
	def(&o.Settle, settleTime)
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
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		// A connection that has died unnoticed would hold up all that share it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		// A digest is of the bytes as they are stored.
		DisableCompression: true,
	}
	c.cancelling.ctx, c.cancelling.end = context.WithCancel(context.Background())
	c.mu.sources = make(map[string]*source)
	c.mu.endpoints = make(map[string]*endpoint)
	c.mu.warned = make(map[string]bool)
	c.mu.waits = make(map[string]time.Time)
	c.SetMirrors(o.Mirrors)
	return c
}

// SetMirrors replaces Options.Mirrors. It takes effect with the next request of
// every repository; requests under way are left to end. A mirror whose URL
// ParseMirrors would refuse is left out, with a warning.
func (c *Client) SetMirrors(m Mirrors) {
	checked := make(Mirrors, len(m))
	for host, list := range m {
		for _, mirror := range list {
			if err := checkMirror(mirror.URL); err != nil {
				c.log.Warn("leaving out a mirror", "mirror", mirror.URL, "of", host, "err", err)
				continue
			}
			checked[host] = append(checked[host], mirror)
		}
	}
	c.mirrors.Store(&checked)
}

// Close closes the connections that are idle. Bodies that are still open stay
// good until they are closed.
func (c *Client) Close() {
	c.dialer.close()
	c.overtaken.Wait()
	c.cancelling.end()
	c.cancelling.wg.Wait()
	c.transport.CloseIdleConnections()
}

// Open gives the repository, layout or archive that ref is in. No request is
// made yet, so it need not exist.
func (c *Client) Open(ref Ref) (*Repo, error) {
	r := &Repo{ref: ref, client: c}
	switch {
	case ref.Layout != "":
		l := newLayout(ref.Layout)
		r.reader, r.finder, r.target = l, l, l
	case ref.Archive != "":
		t := newTarFile(ref.Archive, c.opts.TempDir)
		if ref.OCI {
			r.reader, r.finder = &view{t}, &view{t}
		} else {
			a := newArchive(t)
			r.reader, r.finder = a, a
		}
	case ref.Registry != "" && ref.Repository != "":
		m := c.remote(ref)
		r.reader, r.finder, r.target = m, m, m
	default:
		return nil, errors.New("open: the image reference is empty")
	}
	return r, nil
}

func (c *Client) remote(ref Ref) *remote {
	scheme := "https"
	if c.insecure(ref.Registry) {
		scheme = "http"
	}
	m := &remote{client: c, ref: ref}
	m.mirrors(false) // so that Stats has them first
	m.origin = c.endpoint(&url.URL{Scheme: scheme, Host: ref.Registry}, ref.Repository, "")
	return m
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
		if len(c.mu.order) < maxSources {
			c.mu.sources[role] = src
			c.mu.order = append(c.mu.order, src)
		}
	}
	key := role + " " + path
	e := c.mu.endpoints[key]
	if e == nil {
		if len(c.mu.endpoints) >= maxEndpoints {
			clear(c.mu.endpoints)
		}
		e = &endpoint{client: c, src: src, root: root, path: path}
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

// warnOnce logs a warning the first time that it is about key.
func (c *Client) warnOnce(key, message string, args ...any) {
	c.mu.Lock()
	if len(c.mu.warned) >= maxNotes {
		clear(c.mu.warned)
	}
	known := c.mu.warned[key]
	c.mu.warned[key] = true
	c.mu.Unlock()
	if !known {
		c.log.Warn(message, args...)
	}
}

// toldToWait logs that a host asks to be left alone, once for all requests that
// it says so to in the meantime.
func (c *Client) toldToWait(host string, d time.Duration) {
	if d <= 0 {
		return
	}
	now := time.Now()
	c.mu.Lock()
	told := now.Before(c.mu.waits[host])
	if !told {
		if len(c.mu.waits) >= maxNotes {
			clear(c.mu.waits)
		}
		c.mu.waits[host] = now.Add(d)
	}
	c.mu.Unlock()
	if !told {
		c.log.Info("the server asks to wait before the next request", "host", host, "seconds", math.Ceil(d.Seconds()))
	}
}

// retry calls try until it succeeds, fails for good, or has been called
// Options.Attempts times. A wait that the server asks for is an attempt too, but
// only one in four: it says that there is more to come.
func (c *Client) retry(ctx context.Context, try func() error) error {
	told := 0
	for n := 1; ; n++ {
		err := try()
		if err == nil || !Temporary(err) {
			return err
		}
		if RetryAfter(err) > 0 && told < 3*c.opts.Attempts {
			told++
		}
		if n-told*3/4 >= c.opts.Attempts {
			return err
		}
		if c.pause(ctx, n-told*3/4, err) != nil {
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
