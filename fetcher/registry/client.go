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

// Options are the settings of a Client. The zero value works: no credentials, no mirrors,
// no proxy, and HTTPS except to loopback addresses.
type Options struct {
	// Credentials are called each time that a registry requires credentials: for the
	// first request, when a token has expired, and when a request is refused. So they
	// may change while the Client is in use. Nil means anonymous access.
	Credentials Credentials
	// Insecure lists the registries, HOST or HOST:PORT, that are accessed by plain HTTP;
	// "*" means all. Loopback addresses and localhost always are.
	Insecure []string
	// Mirrors are asked before their registries; see Client.SetMirrors.
	Mirrors Mirrors
	// Proxy is as in http.Transport; nil means none.
	Proxy func(*http.Request) (*url.URL, error)
	// TLS has the certificates to trust and to present; nil means the system's.
	TLS *tls.Config
	// UserAgent is sent with every request; "thaw" by default.
	UserAgent string
	// DialTimeout limits the time to connect, HeaderTimeout the time until an answer
	// begins. In each StallTimeout a body must bring 16 KiB, or the rest of it; a mirror
	// has half of that time. Defaults: 10 s, 30 s, 20 s.
	DialTimeout, HeaderTimeout, StallTimeout time.Duration
	// IdleConns is how many idle connections to a host are kept; 64 by default. It should
	// not be less than the number of requests at once.
	IdleConns int
	// Attempts is how often a call is tried, except for those that open ranges; 5 by
	// default.
	Attempts int
	// TempDir is the directory for decompressed archives; the system's by default.
	TempDir string
	// Log gets warnings: of mirrors that fail, servers that ignore ranges or ask to wait,
	// and credentials that cannot be read; nil for none.
	Log *slog.Logger

	// Settle is how long a list of referrers under a fallback tag is watched after a
	// change, in case another writer overwrites it; 2.5 s by default. Only tests set it.
	Settle time.Duration
	// CancelTime bounds how long cancelling an upload takes; 2 s by default. Only tests set
	// it.
	CancelTime time.Duration

	backoff time.Duration // before the second attempt; tests lower it
	// Tests raise these, so that a busy machine does not change what they count: the time to
	// read the rest of an answer, the least time until another source is asked, and the least
	// time that a mirror rests.
	drain, leastLate, leastRest time.Duration
}

// A Client holds what all repositories share: connections, tokens, mirrors, the health of
// sources, counters.
type Client struct {
	opts      Options
	transport *http.Transport
	dialer    *dialer
	log       *slog.Logger
	mirrors   atomic.Pointer[Mirrors]
	overtaken sync.WaitGroup // cancelled requests that have not ended yet

	cancelling cancelling
	breakers   breakers

	mu struct {
		sync.Mutex
		sources   map[string]*source // by URL without the repository
		order     []*source
		endpoints map[string]*endpoint // by URL with the repository
		warned    map[string]bool      // by key of warnOnce
		waits     map[string]time.Time // by host: until when it asked to wait
	}
}

// Limits of what a client remembers. What is forgotten is made again, at the cost of a
// token or a line in the log.
const (
	maxEndpoints = 16 << 10
	maxSources   = 4 << 10
	maxNotes     = 1 << 10
)

// New makes a client. The caller closes it.
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
	def(&o.drain, drainTime)
	def(&o.CancelTime, cancelTime)
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
		// A dead connection would delay all requests that share it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		// A digest is of the bytes as they are stored.
		DisableCompression: true,
	}
	c.breakers.backoff = o.backoff
	c.cancelling.time = o.CancelTime
	c.cancelling.ctx, c.cancelling.end = context.WithCancel(context.Background())
	c.mu.sources = make(map[string]*source)
	c.mu.endpoints = make(map[string]*endpoint)
	c.mu.warned = make(map[string]bool)
	c.mu.waits = make(map[string]time.Time)
	c.SetMirrors(o.Mirrors)
	return c
}

// SetMirrors replaces Options.Mirrors, from the next request on. It leaves out a mirror whose
// URL ParseMirrors would refuse, with a warning.
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

// Close closes idle connections. Open bodies can be read until they are closed.
func (c *Client) Close() {
	c.dialer.close()
	c.overtaken.Wait()
	c.cancelling.end()
	c.cancelling.wg.Wait()
	c.transport.CloseIdleConnections()
}

// Open returns the repository, layout or archive of ref. It makes no request, so that need
// not exist.
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
	m.mirrors(false) // so that Stats lists them first
	m.origin = c.endpoint(&url.URL{Scheme: scheme, Host: ref.Registry}, ref.Repository, "")
	return m
}

// endpoint returns the repository at base, always the same one, so that tokens are shared.
func (c *Client) endpoint(base *url.URL, repository, mirrorOf string) *endpoint {
	path := strings.Trim(base.Path, "/")
	if path != "" {
		path += "/"
	}
	path += repository
	root := &url.URL{Scheme: base.Scheme, Host: base.Host}

	c.mu.Lock()
	defer c.mu.Unlock()
	// A host may be both a mirror and a registry. Its health is kept apart for each role.
	role := root.String() + " " + mirrorOf
	src := c.mu.sources[role]
	if src == nil {
		src = &source{name: root.String(), mirrorOf: mirrorOf, log: c.log, leastLate: c.opts.leastLate, leastRest: c.opts.leastRest}
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

// warnOnce logs a warning, once for each key.
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

// toldToWait logs that a host asked for a pause, once for all requests in that time.
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

// retry calls try until it succeeds, fails with a permanent error, or has used up
// Options.Attempts. Of the attempts that the server answered by asking for a pause, only
// one in four counts: such a server is likely to answer later.
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

// maxBackoff bounds the pause between two attempts, unless the server asks for a longer one.
const maxBackoff = 20 * time.Second

// pause waits before attempt n+1. The limit of the pause doubles with each attempt, and its
// length is anything up to the limit, so that clients that failed together do not return
// together. It is at least as long as the server asked for, and a little longer, for the same
// reason.
func (c *Client) pause(ctx context.Context, n int, err error) error {
	d := rand.N(min(c.opts.backoff<<min(n-1, 16), max(maxBackoff, c.opts.backoff)))
	if after := RetryAfter(err); after > 0 {
		d = max(d, after+rand.N(after/8+1))
	}
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
