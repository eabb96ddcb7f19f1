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
	"time"
)

func basic(l Login) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(l.Username+":"+l.Password))
}

// exchange gets a token from the realm that the challenge names.
func (a *authorizer) exchange(ctx context.Context, push bool, ch *challenge, login Login) (token, error) {
	realm, err := url.Parse(ch.params["realm"])
	if err != nil || realm.Host == "" || realm.User != nil {
		return token{}, errors.New("the realm in its challenge is not a URL")
	}
	// The password is sent there.
	if realm.Scheme != "https" && (realm.Scheme != "http" || a.root.Scheme != "http" && !isLoopback(realm.Hostname())) {
		return token{}, fmt.Errorf("the realm in its challenge, %s, is not HTTPS", redact(realm))
	}
	if realm.Host != a.root.Host && a.client.outside(a.root) {
		ctx = outward(ctx)
	}
	actions := "pull"
	if push {
		actions = "pull,push"
	}
	var scopes []string
	if !a.foreign { // there the repository may have another name
		scopes = []string{"repository:" + a.repository + ":" + actions}
	}
	if a.also != "" {
		scopes = append(scopes, "repository:"+a.also+":pull")
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

// ask requests a token, and follows redirects. It sends the password and the refresh token
// only to the host that the registry named.
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
			return token{}, fmt.Errorf("%s: the token service sends a redirect that cannot be followed", redact(u))
		case a.client.outside(a.root) && isHere(next.Hostname()):
			return token{}, fmt.Errorf("%s: %w", redact(u), errInside)
		case next.Host != u.Host || next.Scheme != u.Scheme && u.Scheme == "https":
			if form != nil {
				return token{}, fmt.Errorf("%s: the token service redirects to another host, %s, which must not get the identity token", redact(u), next.Host)
			}
			auth = ""
		}
		if resp.StatusCode == http.StatusSeeOther && form != nil {
			return token{}, fmt.Errorf("%s: the token service sends a redirect that cannot be followed", redact(u))
		}
		next.User = nil
		if next.Host != a.root.Host && a.client.outside(a.root) {
			ctx = outward(ctx)
		}
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
	if ctx.Value(outwardKey{}) == true {
		if isHere(u.Hostname()) {
			return nil, fmt.Errorf("%s: %w", redact(u), errInside)
		}
		if proxied(a.client.opts.Proxy, req) {
			req = req.WithContext(context.WithValue(ctx, outwardKey{}, nil))
		}
	}
	circuit, b := "tokens "+u.Host, &a.client.breakers
	if err := b.pass(circuit, time.Now(), method, u); err != nil {
		return nil, err
	}
	resp, err := a.client.transport.RoundTrip(req)
	if err != nil {
		err = noAnswer(req, err)
		if errors.Is(err, ErrUnavailable) {
			b.failed(circuit, time.Now(), 0, err)
		} else {
			b.unknown(circuit)
		}
		return nil, err
	}
	b.settle(circuit, resp)
	return resp, nil
}

// readToken reads the answer of a token service. Some write the seconds as a string, or
// null.
func readToken(b []byte, sent time.Time) (token, error) {
	var answer struct {
		Token       string          `json:"token"`
		AccessToken string          `json:"access_token"`
		ExpiresIn   json.RawMessage `json:"expires_in"`
	}
	// Without the parser's error, which may quote the token.
	if json.Unmarshal(b, &answer) != nil {
		return token{}, errors.New("the answer cannot be read")
	}
	if answer.Token == "" {
		answer.Token = answer.AccessToken
	}
	if answer.Token == "" || strings.ContainsFunc(answer.Token, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return token{}, errors.New("there is no token in the answer")
	}
	// The token spec: 60 seconds by default.
	life := 60 * time.Second
	if s, err := strconv.ParseFloat(strings.Trim(string(answer.ExpiresIn), `" `), 64); err == nil && s > 0 {
		life = time.Duration(min(s, 30*24*3600) * float64(time.Second))
	}
	return token{header: "Bearer " + answer.Token, renew: sent.Add(life - min(life/10, 10*time.Second))}, nil
}
