package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// An endpoint is a repository at one of the sources that have it.
type endpoint struct {
	client *Client
	src    *source
	root   *url.URL // scheme and host; empty for the URLs of a layer
	away   bool     // the URLs of a layer may lead to other machines only
	path   string   // of the repository
	auth   *authorizer

	mu struct {
		sync.Mutex
		blobs     map[v1.Hash]blobState
		foreign   map[string]*authorizer // of other hosts that want a token
		mounting  map[string]*authorizer // for mounts from other repositories
		referrers map[v1.Hash]*listing   // lists of referrers that are being changed
	}
}

// maxForeign is how many other hosts with tokens an endpoint remembers. A registry redirects
// to a few.
const maxForeign = 64

// url returns the URL of an operation on the repository.
func (e *endpoint) url(operation, key string) *url.URL {
	u := *e.root
	u.Path = "/v2/" + e.path + "/" + operation + "/" + key
	return &u
}

// request describes a request, so that it can be repeated.
type request struct {
	method string
	url    *url.URL
	header map[string]string
	body   func() (io.ReadCloser, error) // nil for none
	size   int64
	push   bool   // needs the right to push
	slow   bool   // the answer may take minutes
	from   string // a repository that the request needs the right to pull from, besides

	located bool          // the URL is a location from before, which may have expired
	spent   time.Duration // on redirects, of the time for an answer
}

// authorizer returns the authorizer for a host: the registry's own, that of a host that the
// registry redirected to and that has sent a challenge, or nil.
func (e *endpoint) authorizer(u *url.URL) *authorizer {
	if e.auth == nil {
		return nil
	}
	if u.Host == e.root.Host && u.Scheme == e.root.Scheme {
		return e.auth
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.foreign[u.Scheme+"://"+u.Host]
}

// foreign makes an authorizer for a host that the registry redirected to, with the
// credentials for that host and the scopes that it names.
func (e *endpoint) foreign(u *url.URL) *authorizer {
	key := u.Scheme + "://" + u.Host
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.mu.foreign[key]
	if a == nil {
		if len(e.mu.foreign) >= maxForeign {
			clear(e.mu.foreign)
		}
		if e.mu.foreign == nil {
			e.mu.foreign = make(map[string]*authorizer)
		}
		a = &authorizer{client: e.client, root: &url.URL{Scheme: u.Scheme, Host: u.Host}, repository: e.path, foreign: true}
		e.mu.foreign[key] = a
	}
	return a
}

// do makes a request, with the credentials for its host; if they are refused, it reads them
// again and repeats the request. A host that the registry redirects to, such as object
// storage, gets credentials only if it has sent a challenge. do returns the answer whatever
// its status, and the caller closes its body. A refusal is an error if the credentials could
// not be read.
func (e *endpoint) do(ctx context.Context, r request) (*http.Response, error) {
	a, auth := e.authorizer(r.url), ""
	if r.from != "" && a != nil && a == e.auth {
		a = e.mounting(r.from)
	}
	if a != nil {
		var err error
		if auth, err = a.header(ctx, r.push); err != nil {
			return nil, err
		}
	}
	resp, err := e.roundTrip(ctx, r, auth)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
	case resp.StatusCode == http.StatusForbidden && strings.HasPrefix(auth, "Basic "):
		// Some registries answer so if a password has expired.
	case resp.StatusCode == http.StatusForbidden && a != nil:
		return a.explain(resp)
	default:
		return resp, nil
	}
	if a == nil {
		// Credentials go over plain HTTP only if the user allows that for this host.
		safe := r.url.Scheme == "https" || e.client.insecure(r.url.Host)
		if e.auth == nil || !safe || readChallenge(resp.Header.Values("Www-Authenticate")) == nil {
			return resp, nil
		}
		a = e.foreign(r.url)
	}
	renewed, err := a.renew(ctx, r.push, auth, resp.Header)
	if err != nil {
		discard(resp)
		return nil, err
	}
	if renewed == auth || renewed == "" {
		return a.explain(resp)
	}
	discard(resp)
	if resp, err = e.roundTrip(ctx, r, renewed); err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		return a.explain(resp)
	}
	return resp, nil
}

// roundTrip makes one request, counts it, and cancels it if it is too slow.
func (e *endpoint) roundTrip(ctx context.Context, r request, auth string) (*http.Response, error) {
	o := &e.client.opts
	limit := o.HeaderTimeout
	if r.slow {
		limit = max(limit, 5*time.Minute)
	}
	limit -= min(r.spent, limit*9/10)
	circuit, b := e.circuitOf(r.url), &e.client.breakers
	if err := b.pass(circuit, time.Now(), r.method, r.url); err != nil {
		return nil, err
	}
	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{cancel: cancel}
	w.timer = time.AfterFunc(limit, func() { cancel(errStalled) })

	req, err := http.NewRequestWithContext(ctx, r.method, r.url.String(), nil)
	if err != nil {
		w.end()
		b.unknown(circuit)
		return nil, err
	}
	if r.url.Host != e.root.Host && e.outside() && !proxied(o.Proxy, req) {
		req = req.WithContext(outward(ctx))
	}
	req.Header.Set("User-Agent", o.UserAgent)
	for k, v := range r.header {
		req.Header.Set(k, v)
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	if r.body != nil {
		rc, err := r.body()
		if err != nil {
			w.end()
			b.unknown(circuit)
			return nil, err
		}
		req.ContentLength = r.size
		req.Body = &sentBody{rc: rc, w: w, left: r.size, stall: o.StallTimeout, limit: limit}
		if r.size == 0 {
			rc.Close()
			req.Body = http.NoBody
		}
		if r.size > monolithic && !e.src.noExpect.Load() {
			// A server that redirects, requires credentials or refuses a body of
			// this size says so before the body is sent.
			req.Header.Set("Expect", "100-continue")
		}
	}
	e.src.requests.Add(1)
	asked := time.Now()
	resp, err := e.client.transport.RoundTrip(req)
	w.answered()
	if err != nil {
		err = noAnswer(req, err)
		w.end()
		if errors.Is(err, ErrUnavailable) {
			e.src.count(0)
			b.failed(circuit, time.Now(), 0, err)
		} else {
			b.unknown(circuit)
		}
		return nil, err
	}
	b.settle(circuit, resp)
	if r.method == http.MethodGet {
		e.src.answered(time.Since(asked))
	}
	if resp.StatusCode >= 400 && !(r.located && isExpired(resp.StatusCode)) {
		e.src.count(resp.StatusCode)
		e.client.toldToWait(req.URL.Host, retryAfter(resp.Header.Get("Retry-After"), time.Now()))
	}
	window := o.StallTimeout
	if e.src.mirrorOf != "" {
		window /= 2 // there are other sources
	}
	resp.Body = &watchedBody{rc: resp.Body, w: w, req: req, src: e.src, drain: o.drain, window: window, left: window}
	if resp.StatusCode == http.StatusExpectationFailed && req.Header.Get("Expect") != "" {
		discard(resp)
		e.src.noExpect.Store(true)
		return e.roundTrip(caller, r, auth)
	}
	return resp, nil
}

// isExpired says whether an answer may mean that the signature of a URL has expired, or that
// what it leads to has moved.
func isExpired(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusGone:
		return true
	}
	return false
}

// maxRedirects of one request.
const maxRedirects = 10

// follow makes a request and follows redirects, repeating the same request with its body. It
// returns the last answer, whose Request has its URL.
func (e *endpoint) follow(ctx context.Context, r request) (*http.Response, error) {
	began := time.Now()
	for range maxRedirects {
		resp, err := e.do(ctx, r)
		if err != nil {
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		case http.StatusSeeOther:
			if r.body != nil {
				return resp, nil // it redirects to another resource, by GET
			}
		default:
			return resp, nil
		}
		discard(resp)
		next, err := e.location(r.url, resp.Header.Get("Location"))
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", r.method, redact(r.url), err)
		}
		r.url, r.located, r.spent = next, false, time.Since(began)
	}
	return nil, fmt.Errorf("%s %s: redirected more than %d times", r.method, redact(r.url), maxRedirects)
}

// location reads a Location header.
func (e *endpoint) location(at *url.URL, v string) (*url.URL, error) {
	if v == "" {
		return nil, errors.New("the answer has no Location header")
	}
	u, err := at.Parse(v)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		// Without err, which quotes the URL, and that may be signed.
		return nil, errors.New("the Location header cannot be read")
	}
	u.User = nil
	if e.outside() && isHere(u.Hostname()) {
		return nil, fmt.Errorf("%w: to %s", errInside, u.Host)
	}
	if u.Scheme == "http" && at.Scheme == "https" && !isLoopback(u.Hostname()) {
		// A registry behind a TLS proxy may not know that it is behind one.
		if u.Hostname() != e.root.Hostname() {
			return nil, fmt.Errorf("redirected from HTTPS to plain HTTP at %s", u.Host)
		}
		u.Scheme, u.Host = e.root.Scheme, e.root.Host
	}
	return u, nil
}
