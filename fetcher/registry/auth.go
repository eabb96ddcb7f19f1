package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// Login is a user name and password, or a token to be exchanged for another one
// (IdentityToken), or the token to be sent (RegistryToken). The zero Login is anonymous.
type Login struct {
	Username, Password, IdentityToken, RegistryToken string
}

// Credentials returns the login for a repository of a registry (HOST or HOST:PORT,
// "index.docker.io" for Docker Hub). It is called for each new token, so the login may
// change, and not for each request, so it may run a program: see Options.
type Credentials func(ctx context.Context, registry, repository string) (Login, error)

// authorizer gets the Authorization header for one repository at one source: by the
// distribution spec's token authentication, by OAuth2 for identity tokens, or by basic
// authentication.
//
// A host that the registry redirects to has its own authorizer, with the credentials for
// that host, once it has sent a challenge.
//
// The registry's first 401 says what it requires. Tokens are renewed a little before they
// expire, and once when they are refused. One request renews a token, and the others wait
// for it.
type authorizer struct {
	client     *Client
	root       *url.URL
	repository string
	also       string // another repository, to pull from
	foreign    bool   // it is for a host that the registry redirected to

	mu struct {
		sync.Mutex
		challenge *challenge
		tokens    [2]token // to pull, to push
		renewals  [2]*renewal
		login     *loginCall // in progress
		broken    error      // why the credentials could not be read last time
	}
}

// loginCall is a call of Options.Credentials.
type loginCall struct {
	done  chan struct{}
	login Login
	err   error
}

type token struct {
	header string
	renew  time.Time // when to renew it; zero: when it is refused
}

// renewal is a token that one request gets while others wait for it.
type renewal struct {
	done   chan struct{}
	header string
	err    error
}

func slot(push bool) int {
	if push {
		return 1
	}
	return 0
}

// header is the Authorization header to send, or empty if the registry has not asked for
// one.
func (a *authorizer) header(ctx context.Context, push bool) (string, error) {
	a.mu.Lock()
	t, ch := a.mu.tokens[slot(push)], a.mu.challenge
	a.mu.Unlock()
	if ch == nil || t.header != "" && (t.renew.IsZero() || time.Now().Before(t.renew)) {
		return t.header, nil
	}
	return a.obtain(ctx, push, t.header, ch)
}

// renew returns another header than the refused one, or the same if there is no other.
func (a *authorizer) renew(ctx context.Context, push bool, refused string, h http.Header) (string, error) {
	ch := readChallenge(h.Values("Www-Authenticate"))
	if ch == nil {
		if refused == "" {
			return "", nil // it does not say what it requires
		}
		a.mu.Lock()
		ch = a.mu.challenge
		a.mu.Unlock()
	}
	return a.obtain(ctx, push, refused, ch)
}

// obtain returns a header other than the refused one. A challenge that cannot be met is
// forgotten: the registry may require credentials for one operation only.
func (a *authorizer) obtain(ctx context.Context, push bool, refused string, ch *challenge) (string, error) {
	i := slot(push)
	for {
		a.mu.Lock()
		if t := a.mu.tokens[i]; t.header != "" && t.header != refused {
			a.mu.Unlock()
			return t.header, nil
		}
		f := a.mu.renewals[i]
		if f == nil {
			f = &renewal{done: make(chan struct{})}
			a.mu.renewals[i] = f
			a.mu.Unlock()
			a.complete(ctx, f, i, ch)
			return f.header, f.err
		}
		a.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return "", ctx.Err()
		}
		if f.err == nil || !errors.Is(f.err, context.Canceled) && !errors.Is(f.err, context.DeadlineExceeded) {
			return f.header, f.err
		}
		// The caller that asked has gone away, so this one asks.
	}
}

// complete gets the token of a renewal, and tells those who wait.
func (a *authorizer) complete(ctx context.Context, f *renewal, i int, ch *challenge) {
	t, err := a.fetch(ctx, i == slot(true), ch)
	f.header, f.err = t.header, err
	a.mu.Lock()
	a.mu.tokens[i], a.mu.renewals[i] = t, nil
	if err == nil {
		a.mu.challenge = ch
	}
	a.mu.Unlock()
	close(f.done)
}

// fetch reads the credentials and makes a header of them. If they cannot be read it tries
// anonymous access: most images are public.
func (a *authorizer) fetch(ctx context.Context, push bool, ch *challenge) (token, error) {
	if ch == nil {
		return token{}, nil
	}
	login, broken := a.credentials(ctx)
	if err := ctx.Err(); err != nil {
		return token{}, err
	}
	a.mu.Lock()
	a.mu.broken = broken
	a.mu.Unlock()
	if broken != nil {
		a.client.warnOnce("credentials "+a.root.Host, "cannot read the credentials; trying without", "host", a.root.Host, "err", broken)
	}
	switch {
	case login.RegistryToken != "":
		return token{header: "Bearer " + login.RegistryToken}, nil
	case ch.scheme == "basic":
		if login.Username == "" && login.Password == "" {
			err := fmt.Errorf("%w: %s requires a user name and a password, and there are none for it: run docker login", ErrUnauthorized, a.root.Host)
			return token{}, a.because(err)
		}
		return token{header: basic(login)}, nil
	}
	t, err := a.exchange(ctx, push, ch, login)
	if err != nil {
		return token{}, fmt.Errorf("get a token for %s: %w", a.root.Host, a.because(err))
	}
	return t, nil
}

// credentials calls Options.Credentials. That may run a program that ignores its context, so
// callers wait for HeaderTimeout at most, and it is not called again while it runs.
func (a *authorizer) credentials(ctx context.Context) (Login, error) {
	f := a.client.opts.Credentials
	if f == nil {
		return Login{}, nil
	}
	a.mu.Lock()
	c := a.mu.login
	if c == nil {
		c = &loginCall{done: make(chan struct{})}
		a.mu.login = c
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.client.opts.HeaderTimeout)
			defer cancel()
			c.login, c.err = f(ctx, a.root.Host, a.repository)
			a.mu.Lock()
			a.mu.login = nil
			a.mu.Unlock()
			close(c.done)
		}()
	}
	a.mu.Unlock()
	t := time.NewTimer(a.client.opts.HeaderTimeout)
	defer t.Stop()
	select {
	case <-c.done:
		return c.login, c.err
	case <-ctx.Done():
		return Login{}, ctx.Err()
	case <-t.C:
		return Login{}, errors.New("the credential program does not answer")
	}
}

// because adds to a refusal that the credentials could not be read.
func (a *authorizer) because(err error) error {
	a.mu.Lock()
	broken := a.mu.broken
	a.mu.Unlock()
	if broken == nil || !errors.Is(err, ErrUnauthorized) {
		return err
	}
	return fmt.Errorf("%w (the credentials for %s could not be read: %w)", err, a.root.Host, broken)
}

// explain makes an error of a refusal if the credentials could not be read. Otherwise it
// leaves the answer to the caller.
func (a *authorizer) explain(resp *http.Response) (*http.Response, error) {
	a.mu.Lock()
	broken := a.mu.broken
	a.mu.Unlock()
	if broken == nil {
		return resp, nil
	}
	return nil, a.because(badStatus(resp))
}
