package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Login is what a registry may be shown: a user's name and password, or a
// token to be exchanged (IdentityToken), or the token itself (RegistryToken).
// The zero Login is nobody.
type Login struct {
	Username, Password, IdentityToken, RegistryToken string
}

// Credentials give the login for a repository of a registry (HOST or
// HOST:PORT, "index.docker.io" for Docker Hub). They are asked often enough
// that what they give may change, and seldom enough that they may run a
// program: see Options.
type Credentials func(ctx context.Context, registry, repository string) (Login, error)

// authorizer gets the Authorization header for one repository at one source:
// the distribution spec's token authentication, OAuth2 for identity tokens,
// and basic authentication.
//
// A host that the registry redirects to has an authorizer of its own, with the
// credentials for that host, once it has asked for some by a challenge.
//
// What a registry wants is learned from its first 401. Tokens are got anew a
// little before they expire, and whatever was refused is got anew once. One
// request does so while the others wait for it.
type authorizer struct {
	client     *Client
	root       *url.URL
	repository string
	foreign    bool // a host that the registry redirected to

	mu struct {
		sync.Mutex
		challenge *challenge
		tokens    [2]token // to pull, to push
		flights   [2]*flight
		login     *loginCall // under way
		broken    error      // why the credentials could not be read, the last time
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
	renew  time.Time // zero: when it is refused
}

// flight is a token on its way.
type flight struct {
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

// header is the Authorization header to send, empty if none is known to be
// wanted.
func (a *authorizer) header(ctx context.Context, push bool) (string, error) {
	a.mu.Lock()
	t, ch := a.mu.tokens[slot(push)], a.mu.challenge
	a.mu.Unlock()
	if ch == nil || t.header != "" && (t.renew.IsZero() || time.Now().Before(t.renew)) {
		return t.header, nil
	}
	return a.obtain(ctx, push, t.header, ch)
}

// renew gives another header than the refused one, or the same if that is all
// there is.
func (a *authorizer) renew(ctx context.Context, push bool, refused string, h http.Header) (string, error) {
	ch := readChallenge(h.Values("Www-Authenticate"))
	if ch == nil {
		if refused == "" {
			return "", nil // nothing to go by
		}
		a.mu.Lock()
		ch = a.mu.challenge
		a.mu.Unlock()
	}
	return a.obtain(ctx, push, refused, ch)
}

// obtain gives a header that is not the refused one. A challenge that cannot be
// met is forgotten: it may be that of one operation, in a registry that wants
// nothing for the others.
func (a *authorizer) obtain(ctx context.Context, push bool, refused string, ch *challenge) (string, error) {
	i := slot(push)
	for {
		a.mu.Lock()
		if t := a.mu.tokens[i]; t.header != "" && t.header != refused {
			a.mu.Unlock()
			return t.header, nil
		}
		f := a.mu.flights[i]
		if f == nil {
			f = &flight{done: make(chan struct{})}
			a.mu.flights[i] = f
			a.mu.Unlock()
			a.fly(ctx, f, i, ch)
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
		// Whoever asked has gone away: ask for oneself.
	}
}

func (a *authorizer) fly(ctx context.Context, f *flight, i int, ch *challenge) {
	t, err := a.fetch(ctx, i == slot(true), ch)
	f.header, f.err = t.header, err
	a.mu.Lock()
	a.mu.tokens[i], a.mu.flights[i] = t, nil
	if err == nil {
		a.mu.challenge = ch
	}
	a.mu.Unlock()
	close(f.done)
}

// fetch reads the credentials and makes a header of them. Where they cannot be
// read it goes on as nobody: most images are public.
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
		a.client.warnOnce("credentials "+a.root.Host, "cannot read the credentials, trying without", "host", a.root.Host, "err", broken)
	}
	switch {
	case login.RegistryToken != "":
		return token{header: "Bearer " + login.RegistryToken}, nil
	case ch.scheme == "basic":
		if login.Username == "" && login.Password == "" {
			err := fmt.Errorf("%w: %s wants a user and a password, and there are none for it", ErrUnauthorized, a.root.Host)
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

// credentials calls Options.Credentials. It may run a program that ignores its
// context, so nobody waits for it longer than for an answer of the registry,
// and while it runs it is not called again.
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

// explain makes an error of a refusal if the credentials could not be read, and
// leaves it to the caller otherwise.
func (a *authorizer) explain(resp *http.Response) (*http.Response, error) {
	a.mu.Lock()
	broken := a.mu.broken
	a.mu.Unlock()
	if broken == nil {
		return resp, nil
	}
	return nil, a.because(badStatus(resp))
}

func basic(l Login) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(l.Username+":"+l.Password))
}

// exchange gets a token from the realm that the registry named.
func (a *authorizer) exchange(ctx context.Context, push bool, ch *challenge, login Login) (token, error) {
	realm, err := url.Parse(ch.params["realm"])
	if err != nil || realm.Host == "" || realm.User != nil {
		return token{}, errors.New("the realm in its challenge is not a URL")
	}
	// The password goes there.
	if realm.Scheme != "https" && (realm.Scheme != "http" || a.root.Scheme != "http" && !isLoopback(realm.Hostname())) {
		return token{}, fmt.Errorf("the realm in its challenge, %s, is not HTTPS", redact(realm))
	}
	actions := "pull"
	if push {
		actions = "pull,push"
	}
	var scopes []string
	if !a.foreign { // who knows what the repository is called there
		scopes = []string{"repository:" + a.repository + ":" + actions}
	}
	if s := ch.params["scope"]; s != "" && !slices.Contains(scopes, s) && len(s) < 1024 {
		scopes = append(scopes, s)
	}
	if login.IdentityToken != "" {
		form := url.Values{
			"grant_type":    {"refresh_token"},
			"refresh_token": {login.IdentityToken},
			"client_id":     {"thaw"},
			"scope":         {strings.Join(scopes, " ")},
		}
		if s := ch.params["service"]; s != "" {
			form.Set("service", s)
		}
		t, err := a.ask(ctx, http.MethodPost, realm, form, "")
		if s := statusOf(err); s != http.StatusNotFound && s != http.StatusMethodNotAllowed {
			return t, err
		}
	}
	q := realm.Query()
	q["scope"] = scopes
	if s := ch.params["service"]; s != "" {
		q.Set("service", s)
	}
	auth := ""
	if login.Username != "" || login.Password != "" {
		q.Set("account", login.Username)
		auth = basic(login)
	}
	u := *realm
	u.RawQuery = q.Encode()
	return a.ask(ctx, http.MethodGet, &u, nil, auth)
}

// ask requests a token, and follows redirects. The password goes to another host
// than the one that the registry named in no case, nor does the refresh token.
func (a *authorizer) ask(ctx context.Context, method string, u *url.URL, form url.Values, auth string) (token, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, a.client.opts.HeaderTimeout, errStalled)
	defer cancel()
	sent := time.Now()
	resp, err := a.send(ctx, method, u, form, auth)
	for n := 0; err == nil && isRedirect(resp.StatusCode); n++ {
		v := resp.Header.Get("Location")
		resp.Body.Close()
		next, bad := u.Parse(v)
		switch {
		case bad != nil, v == "", next.Host == "", next.Scheme != "https" && next.Scheme != u.Scheme, n == maxRedirects:
			return token{}, fmt.Errorf("%s: the token service redirects to no usable place", redact(u))
		case next.Host != u.Host || next.Scheme != u.Scheme && u.Scheme == "https":
			if form != nil {
				return token{}, fmt.Errorf("%s: the token service redirects to %s, which must not have the identity token", redact(u), next.Host)
			}
			auth = ""
		}
		if resp.StatusCode == http.StatusSeeOther && form != nil {
			return token{}, fmt.Errorf("%s: the token service redirects to no usable place", redact(u))
		}
		next.User = nil
		u = next
		resp, err = a.send(ctx, method, u, form, auth)
	}
	if err != nil {
		return token{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		err := badStatus(resp)
		a.client.toldToWait(u.Host, RetryAfter(err))
		return token{}, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 256<<10))
	if err != nil {
		return token{}, noAnswer(resp.Request, err)
	}
	t, err := readToken(b, sent)
	if err != nil {
		return token{}, fmt.Errorf("%s: %w", redact(u), err)
	}
	return t, nil
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

func (a *authorizer) send(ctx context.Context, method string, u *url.URL, form url.Values, auth string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return nil, errors.New("the realm in its challenge is not a URL")
	}
	req.Header.Set("User-Agent", a.client.opts.UserAgent)
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	resp, err := a.client.transport.RoundTrip(req)
	if err != nil {
		return nil, noAnswer(req, err)
	}
	return resp, nil
}

// readToken reads what a token service answers. Some write the seconds as a
// string, or null.
func readToken(b []byte, sent time.Time) (token, error) {
	var answer struct {
		Token       string          `json:"token"`
		AccessToken string          `json:"access_token"`
		ExpiresIn   json.RawMessage `json:"expires_in"`
	}
	// Not the error of the parser: it may quote the token.
	if json.Unmarshal(b, &answer) != nil {
		return token{}, errors.New("the answer cannot be read")
	}
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if answer.Token == "" || strings.ContainsFunc(answer.Token, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return token{}, errors.New("there is no token in the answer")
	}
	// The token spec: 60 seconds where nothing is said.
	life := 60 * time.Second
	if s, err := strconv.ParseFloat(strings.Trim(string(answer.ExpiresIn), `" `), 64); err == nil && s > 0 {
		life = time.Duration(min(s, 30*24*3600) * float64(time.Second))
	}
	return token{header: "Bearer " + answer.Token, renew: sent.Add(life - min(life/10, 10*time.Second))}, nil
}

// challenge is what a registry wants.
type challenge struct {
	scheme string // "bearer" or "basic"
	params map[string]string
}

// readChallenge takes the first bearer challenge of the WWW-Authenticate
// headers, or else the first basic one (RFC 9110, 11.6.1).
func readChallenge(headers []string) *challenge {
	var found *challenge
	for _, h := range headers {
		for h = strings.TrimLeft(h, " \t,"); h != ""; h = strings.TrimLeft(h, " \t,") {
			var c challenge
			c.scheme, h = cutToken(h)
			if c.scheme == "" {
				break
			}
			c.scheme = strings.ToLower(c.scheme)
			c.params, h = readParams(h)
			if c.scheme == "bearer" && c.params["realm"] != "" {
				return &c
			}
			if c.scheme == "basic" && found == nil {
				found = &c
			}
		}
	}
	return found
}

// readParams reads name=value pairs up to the next scheme.
func readParams(s string) (map[string]string, string) {
	params := make(map[string]string)
	for {
		s = strings.TrimLeft(s, " \t,")
		name, rest := cutToken(s)
		rest = strings.TrimLeft(rest, " \t")
		if name == "" || !strings.HasPrefix(rest, "=") {
			return params, s
		}
		rest = strings.TrimLeft(rest[1:], " \t")
		var value string
		if strings.HasPrefix(rest, `"`) {
			value, rest = cutQuoted(rest[1:])
		} else {
			value, rest = cutToken(rest)
			if value == "" {
				return params, ""
			}
		}
		params[strings.ToLower(name)] = value
		s = rest
	}
}

// cutToken cuts off a token (RFC 9110, 5.6.2), leniently.
func cutToken(s string) (string, string) {
	i := strings.IndexFunc(s, func(c rune) bool { return c <= ' ' || c >= 0x7f || strings.ContainsRune(`",=`, c) })
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

func cutQuoted(s string) (string, string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:]
		case '\\':
			if i++; i == len(s) {
				return b.String(), ""
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}
