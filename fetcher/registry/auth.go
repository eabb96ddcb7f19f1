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
// What a registry wants is learned from its first 401. Tokens are got anew a
// little before they expire, and whatever was refused is got anew once. One
// request does so while the others wait for it.
type authorizer struct {
	client     *Client
	root       *url.URL
	repository string

	mu struct {
		sync.Mutex
		challenge *challenge
		tokens    [2]token // to pull, to push
		flights   [2]*flight
	}
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
	t, known := a.mu.tokens[slot(push)], a.mu.challenge != nil
	a.mu.Unlock()
	if !known || t.header != "" && (t.renew.IsZero() || time.Now().Before(t.renew)) {
		return t.header, nil
	}
	return a.obtain(ctx, push, t.header)
}

// renew gives another header than the refused one, or the same if that is all
// there is.
func (a *authorizer) renew(ctx context.Context, push bool, refused string, h http.Header) (string, error) {
	if ch := readChallenge(h.Values("Www-Authenticate")); ch != nil {
		a.mu.Lock()
		a.mu.challenge = ch
		a.mu.Unlock()
	} else if refused == "" {
		return "", nil // nothing to go by
	}
	return a.obtain(ctx, push, refused)
}

// obtain gives a header that is not the refused one.
func (a *authorizer) obtain(ctx context.Context, push bool, refused string) (string, error) {
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
			ch := a.mu.challenge
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
	a.mu.Unlock()
	close(f.done)
}

// fetch reads the credentials and makes a header of them.
func (a *authorizer) fetch(ctx context.Context, push bool, ch *challenge) (token, error) {
	var login Login
	if f := a.client.opts.Credentials; f != nil {
		var err error
		if login, err = f(ctx, a.root.Host, a.repository); err != nil {
			return token{}, fmt.Errorf("credentials for %s: %w", a.root.Host, err)
		}
	}
	switch {
	case ch == nil:
		return token{}, nil
	case login.RegistryToken != "":
		return token{header: "Bearer " + login.RegistryToken}, nil
	case ch.scheme == "basic":
		if login.Username == "" && login.Password == "" {
			return token{}, fmt.Errorf("%w: %s wants a user and a password, and there are none for it", ErrUnauthorized, a.root.Host)
		}
		return token{header: basic(login)}, nil
	}
	t, err := a.exchange(ctx, push, ch, login)
	if err != nil {
		return token{}, fmt.Errorf("get a token for %s: %w", a.root.Host, err)
	}
	return t, nil
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
	scopes := []string{"repository:" + a.repository + ":" + actions}
	if s := ch.params["scope"]; s != "" && s != scopes[0] && len(s) < 1024 {
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

func (a *authorizer) ask(ctx context.Context, method string, u *url.URL, form url.Values, auth string) (token, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, a.client.opts.HeaderTimeout, errStalled)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return token{}, errors.New("the realm in its challenge is not a URL")
	}
	req.Header.Set("User-Agent", a.client.opts.UserAgent)
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	sent := time.Now()
	resp, err := a.client.transport.RoundTrip(req)
	if err != nil {
		return token{}, noAnswer(req, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return token{}, badStatus(resp)
	}
	var answer struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 256<<10))
	if err != nil {
		return token{}, noAnswer(req, err)
	}
	// Not the error of the parser: it may quote the token.
	if json.Unmarshal(b, &answer) != nil {
		return token{}, fmt.Errorf("%s: the answer cannot be read", redact(u))
	}
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if answer.Token == "" || strings.ContainsFunc(answer.Token, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return token{}, fmt.Errorf("%s: there is no token in the answer", redact(u))
	}
	// The token spec: 60 seconds where nothing is said.
	life := 60 * time.Second
	if answer.ExpiresIn > 0 {
		life = time.Duration(min(answer.ExpiresIn, 30*24*3600) * float64(time.Second))
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
