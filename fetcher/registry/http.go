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
	root   *url.URL // scheme and host
	path   string   // of the repository
	auth   *authorizer
	turn   chan struct{} // of who changes a list of referrers

	mu struct {
		sync.Mutex
		blobs map[v1.Hash]blobState
	}
}

// blobState is what an endpoint knows of a blob.
type blobState struct {
	location *url.URL  // where the registry redirected to
	missing  time.Time // the mirror has not got it; do not ask before
}

// maxBlobStates bounds what is remembered; a repository that is served from
// has a few blobs per image.
const maxBlobStates = 4096

func (e *endpoint) state(h v1.Hash) blobState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.blobs[h]
}

func (e *endpoint) setState(h v1.Hash, s blobState) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.mu.blobs) >= maxBlobStates {
		clear(e.mu.blobs)
	}
	if e.mu.blobs == nil {
		e.mu.blobs = make(map[v1.Hash]blobState)
	}
	e.mu.blobs[h] = s
}

// url is that of an operation on the repository.
func (e *endpoint) url(operation, key string) *url.URL {
	u := *e.root
	u.Path = "/v2/" + e.path + "/" + operation + "/" + key
	return &u
}

// request is what there is to say about one, so that it can be said again.
type request struct {
	method string
	url    *url.URL
	header map[string]string
	body   func() (io.ReadCloser, error) // nil for none
	size   int64
	push   bool // needs the right to push
	slow   bool // the answer may take minutes
}

// do makes a request. If it goes to the registry itself it is authorized, with
// credentials read anew when they are refused; to any other host they are not
// shown. Whatever the status is, the caller gets it and closes the body,
// except where no credentials help.
func (e *endpoint) do(ctx context.Context, r request) (*http.Response, error) {
	if r.url.Host != e.root.Host || r.url.Scheme != e.root.Scheme {
		return e.roundTrip(ctx, r, "")
	}
	auth, err := e.auth.header(ctx, r.push)
	if err != nil {
		return nil, err
	}
	resp, err := e.roundTrip(ctx, r, auth)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
	case resp.StatusCode == http.StatusForbidden && strings.HasPrefix(auth, "Basic "):
		// Some registries say so of a password that has expired.
	default:
		return resp, nil
	}
	renewed, err := e.auth.renew(ctx, r.push, auth, resp.Header)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	if renewed == auth || renewed == "" {
		return resp, nil
	}
	resp.Body.Close()
	return e.roundTrip(ctx, r, renewed)
}

// roundTrip makes one request, counts it, and ends it when nothing moves.
func (e *endpoint) roundTrip(ctx context.Context, r request, auth string) (*http.Response, error) {
	o := &e.client.opts
	patience := o.HeaderTimeout
	if r.slow {
		patience = max(patience, 5*time.Minute)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{cancel: cancel}
	w.timer = time.AfterFunc(patience, func() { cancel(errStalled) })

	req, err := http.NewRequestWithContext(ctx, r.method, r.url.String(), nil)
	if err != nil {
		w.end()
		return nil, err
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
			return nil, err
		}
		req.ContentLength = r.size
		req.Body = &sentBody{rc: rc, w: w, left: r.size, stall: o.StallTimeout, patience: patience}
		if r.size == 0 {
			rc.Close()
			req.Body = http.NoBody
		}
	}
	e.src.requests.Add(1)
	resp, err := e.client.transport.RoundTrip(req)
	w.answered()
	if err != nil {
		err = noAnswer(req, err)
		w.end()
		if errors.Is(err, ErrUnavailable) {
			e.src.count(0)
		}
		return nil, err
	}
	if resp.StatusCode >= 400 {
		e.src.count(resp.StatusCode)
	}
	resp.Body = &watchedBody{rc: resp.Body, w: w, req: req, src: e.src, stall: o.StallTimeout}
	return resp, nil
}

// get makes a GET or HEAD request and follows redirects, starting at from if
// that is not nil. It gives the answer to the last request, and its URL.
func (e *endpoint) get(ctx context.Context, r request) (*http.Response, error) {
	for range 10 {
		resp, err := e.do(ctx, r)
		if err != nil {
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, nil
		}
		io.CopyN(io.Discard, resp.Body, 8<<10)
		resp.Body.Close()
		next, err := e.location(r.url, resp.Header.Get("Location"))
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", r.method, redact(r.url), err)
		}
		r.url = next
	}
	return nil, fmt.Errorf("%s %s: redirected too often", r.method, redact(r.url))
}

// location reads a Location header.
func (e *endpoint) location(at *url.URL, v string) (*url.URL, error) {
	if v == "" {
		return nil, errors.New("a redirect without a location")
	}
	u, err := at.Parse(v)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		// Not err: it quotes the URL, which may be signed.
		return nil, errors.New("the location of a redirect cannot be read")
	}
	u.User = nil
	if u.Scheme == "http" && at.Scheme == "https" && !isLoopback(u.Hostname()) {
		// A registry behind a TLS proxy may not know that it is.
		if u.Hostname() != e.root.Hostname() {
			return nil, fmt.Errorf("redirected from HTTPS to plain HTTP at %s", u.Host)
		}
		u.Scheme, u.Host = e.root.Scheme, e.root.Host
	}
	return u, nil
}

// watch ends a request that makes no progress.
type watch struct {
	cancel context.CancelCauseFunc
	mu     struct {
		sync.Mutex
		answered bool
	}
	timer *time.Timer
}

// sent tells of progress in sending, which no longer counts once there is an
// answer.
func (w *watch) sent(next time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.mu.answered {
		w.timer.Reset(next)
	}
}

func (w *watch) answered() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.answered = true
	w.timer.Stop()
}

func (w *watch) end() {
	w.timer.Stop()
	w.cancel(nil)
}

// sentBody is the body of a request.
type sentBody struct {
	rc              io.ReadCloser
	w               *watch
	left            int64
	stall, patience time.Duration
}

func (b *sentBody) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	b.left -= int64(n)
	next := b.stall
	if b.left <= 0 {
		next = b.patience
	}
	b.w.sent(next)
	return n, err
}

func (b *sentBody) Close() error { return b.rc.Close() }

// watchedBody is the body of an answer: counted, ended when it stalls, and
// with errors that say what happened.
type watchedBody struct {
	rc    io.ReadCloser
	w     *watch
	req   *http.Request
	src   *source
	stall time.Duration
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.w.timer.Reset(b.stall)
	n, err := b.rc.Read(p)
	b.w.timer.Stop()
	b.src.bytes.Add(int64(n))
	switch {
	case err == nil, err == io.EOF:
		return n, err
	case errors.Is(err, io.ErrUnexpectedEOF) && context.Cause(b.req.Context()) == nil:
		err = &httpError{method: b.req.Method, url: redact(b.req.URL), err: ErrTruncated}
	default:
		err = noAnswer(b.req, err)
	}
	return n, err
}

func (b *watchedBody) Close() error {
	err := b.rc.Close()
	b.w.end()
	return err
}

// Body is a run of the bytes of a blob: exactly as long as was asked for, or
// it ends in an error.
type Body struct {
	rc   io.ReadCloser
	left int64
	err  error // what the last Read returned

	// Where it comes from over HTTP; nil otherwise.
	e      *endpoint
	digest v1.Hash
}

// Read never returns io.EOF before the last byte.
func (b *Body) Read(p []byte) (int, error) {
	if b.err != nil || b.left == 0 {
		if b.err == nil {
			return 0, io.EOF
		}
		return 0, b.err
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.rc.Read(p)
	b.left -= int64(n)
	switch {
	case b.left == 0:
		err = nil
		if b.e != nil {
			b.e.src.succeeded()
		}
	case err == io.EOF:
		err = fmt.Errorf("%d bytes are missing: %w", b.left, ErrTruncated)
	}
	if b.err = err; err != nil && b.e != nil {
		b.e.failed(b.digest, err)
	}
	return n, err
}

// Close ends the request if there are bytes left.
func (b *Body) Close() error { return b.rc.Close() }

// Source is the scheme and host of the mirror or registry that the bytes come
// from, or empty where they come from a file.
func (b *Body) Source() string {
	if b.e == nil {
		return ""
	}
	return b.e.src.name
}

// Distrust says that the bytes were not what the digest of the chunk or blob
// says. A mirror is then left alone for a while, longer each time; a
// location that a registry redirected to is forgotten.
func (b *Body) Distrust() {
	if b.e == nil {
		return
	}
	b.e.setState(b.digest, blobState{})
	b.e.src.distrust()
}

// failed takes note of a request for a blob that did not go well. That there
// is no such blob says nothing of a source's health, nor do ranges that it does
// not give, or a caller that has gone away.
func (e *endpoint) failed(h v1.Hash, err error) {
	if errors.Is(err, ErrNotFound) || errors.Is(err, errParts) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return
	}
	// The location may be what does not work.
	if e.state(h).location != nil {
		e.setState(h, blobState{})
	}
	e.src.failed(RetryAfter(err), err)
}
