package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var quiet = log.New(new(lockedBuffer), "", 0)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func fixed(l Login) Credentials {
	return func(context.Context, string, string) (Login, error) { return l, nil }
}

// htpasswd writes a file with the user alice for docker-registry.
func htpasswd(t *testing.T, password string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "htpasswd")
	setPassword(t, path, password)
	return path
}

func setPassword(t *testing.T, path, password string) {
	t.Helper()
	line := "alice:" + map[string]string{ // by bcrypt
		"secret":  "$2y$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW",
		"one":     "$2y$04$abcdefghijklmnopqrstuuuiMd1XkP3MYkehzxpPHB6m5Tr0FZSYG",
		"another": "$2y$04$abcdefghijklmnopqrstuuW839tY81OgYwy4gFNdslinRlf6MvQ8m",
	}[password]
	if err := os.WriteFile(path, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// docker-registry checks the modification time of the file.
	later := time.Now().Add(time.Duration(len(password)) * time.Second)
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
}

// Basic authentication at a real registry whose password changes meanwhile.
func TestBasic(t *testing.T) {
	ctx := context.Background()
	file := htpasswd(t, "one")
	addr := dockerRegistry(t, "auth: {htpasswd: {realm: test, path: "+file+"}}")
	var login atomic.Pointer[Login]
	login.Store(&Login{Username: "alice", Password: "one"})
	var asked atomic.Int64
	c := newClient(t, Options{Credentials: func(_ context.Context, registry, _ string) (Login, error) {
		if registry != addr {
			t.Errorf("credentials for %s are asked for", registry)
		}
		asked.Add(1)
		return *login.Load(), nil
	}})
	r := openRepo(t, c, addr+"/app:v1")
	layer := noise(50_000, 1)
	_, l := pushImage(t, ctx, r, "v1", layer, amd64)
	for range 20 {
		if _, err := readRange(ctx, r, l.Digest, 0, 100); err != nil {
			t.Fatal(err)
		}
	}
	if n := asked.Load(); n > 2 { // to pull and to push
		t.Errorf("credentials were asked for %d times", n)
	}

	setPassword(t, file, "another")
	_, err := readRange(ctx, r, l.Digest, 0, 100)
	if !errors.Is(err, ErrUnauthorized) || Temporary(err) {
		t.Errorf("with the old password: %v", err)
	}
	login.Store(&Login{Username: "alice", Password: "another"})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if b, err := readRange(ctx, r, l.Digest, 5, 100); err != nil || !bytes.Equal(b, layer[5:105]) {
				t.Errorf("with the new password: %v", err)
			}
		})
	}
	wg.Wait()

	for name, cred := range map[string]Credentials{"none": nil, "nobody": fixed(Login{}),
		"wrong": fixed(Login{Username: "alice", Password: "guess"})} {
		r := openRepo(t, newClient(t, Options{Credentials: cred}), addr+"/app:v1")
		if err := r.CheckAccess(ctx); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%s: access: %v", name, err)
		}
		if err := r.CheckPush(ctx); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%s: push: %v", name, err)
		}
	}
	broken := errors.New("the helper is not there")
	r = openRepo(t, newClient(t, Options{Credentials: func(context.Context, string, string) (Login, error) { return Login{}, broken }}), addr+"/app:v1")
	if err := r.CheckAccess(ctx); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}

// A tokenServer gives short-lived tokens to clients with the password, for a registry
// that requires tokens.
type tokenServer struct {
	t        *testing.T
	registry *httptest.Server
	tokens   *httptest.Server

	password atomic.Pointer[string]
	life     atomic.Int64 // nanoseconds
	issued   atomic.Int64
	refresh  atomic.Pointer[string] // the identity token that is taken
	noOAuth  atomic.Bool

	mu    sync.Mutex
	valid map[string]tokenGrant
}

type tokenGrant struct {
	until  time.Time
	scopes []string
}

func newTokenServer(t *testing.T, password string, life time.Duration) *tokenServer {
	s := &tokenServer{t: t, valid: make(map[string]tokenGrant)}
	s.password.Store(&password)
	s.life.Store(int64(life))
	transport := &http.Transport{DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: memoryRegistry(t, true)})
	proxy.Transport = transport
	s.tokens = serve(t, http.HandlerFunc(s.issue))
	s.registry = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		action := "pull"
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			action = "push"
		}
		if !s.allows(r.Header.Get("Authorization"), action) {
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token?x=1",service="a \"quoted\" service",scope="repository:team/app:%s"`,
				s.tokens.URL, action))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	return s
}

func (s *tokenServer) allows(header, action string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.valid[strings.TrimPrefix(header, "Bearer ")]
	return time.Now().Before(g.until) && strings.Contains(strings.Join(g.scopes, " ")+",", action)
}

func (s *tokenServer) issue(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	if got := r.Form.Get("service"); got != `a "quoted" service` {
		s.t.Errorf("service %q", got)
	}
	scopes := r.Form["scope"]
	if r.Method == http.MethodPost {
		if s.noOAuth.Load() {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		if t := s.refresh.Load(); t == nil || r.PostForm.Get("refresh_token") != *t || r.PostForm.Get("grant_type") != "refresh_token" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		scopes = strings.Fields(r.PostForm.Get("scope"))
	} else if _, p, _ := r.BasicAuth(); p != *s.password.Load() {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`)
		return
	}
	n := s.issued.Add(1)
	life := time.Duration(s.life.Load())
	token := fmt.Sprintf("token-%d", n)
	s.mu.Lock()
	s.valid[token] = tokenGrant{time.Now().Add(life), scopes}
	s.mu.Unlock()
	time.Sleep(5 * time.Millisecond)
	json.NewEncoder(w).Encode(map[string]any{"access_token": token, "expires_in": life.Seconds()})
}

func TestToken(t *testing.T) {
	ctx := context.Background()
	s := newTokenServer(t, "one", time.Minute)
	var login atomic.Pointer[Login]
	login.Store(&Login{Username: "alice", Password: "one"})
	c := newClient(t, Options{Credentials: func(context.Context, string, string) (Login, error) { return *login.Load(), nil }})
	place := hostOf(s.registry) + "/team/app"
	r := openRepo(t, c, place+":v1")
	layer := noise(2<<20, 1)
	_, l := pushImage(t, ctx, r, "v1", layer, amd64)
	if n := s.issued.Load(); n > 2 {
		t.Errorf("%d tokens to push an image", n)
	}
	read := func(r *Repo) error {
		b, err := readRange(ctx, r, l.Digest, 5, 100)
		if err == nil && !bytes.Equal(b, layer[5:105]) {
			t.Error("wrong bytes")
		}
		return err
	}
	if err := read(r); err != nil {
		t.Fatal(err)
	}

	t.Run("many at once ask for one token", func(t *testing.T) {
		s.mu.Lock()
		clear(s.valid) // all are refused now
		s.mu.Unlock()
		s.issued.Store(0)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				if err := read(r); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := s.issued.Load(); n != 1 {
			t.Errorf("%d tokens", n)
		}
	})
	t.Run("expiry, and another password", func(t *testing.T) {
		s.life.Store(int64(2 * time.Second))
		s.mu.Lock()
		clear(s.valid)
		s.mu.Unlock()
		for i := range 12 {
			if i == 6 {
				p := "two"
				s.password.Store(&p)
				login.Store(&Login{Username: "alice", Password: "two"})
			}
			if err := read(r); err != nil {
				t.Errorf("%d: %v", i, err)
			}
			time.Sleep(500 * time.Millisecond)
		}
		// The client renews the token before it expires: the registry has refused only
		// once.
		if st := c.Stats(); st[0].Errors[401] > 40 {
			t.Errorf("%+v", st)
		}
		s.life.Store(int64(time.Minute))
	})
	t.Run("the wrong password", func(t *testing.T) {
		r := openRepo(t, newClient(t, Options{Credentials: fixed(Login{Username: "alice", Password: "guess"})}), place)
		err := read(r)
		if !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "wrong password") {
			t.Errorf("%v", err)
		}
	})
	t.Run("the token service is down", func(t *testing.T) {
		down := s.tokens.URL
		s.tokens.URL = "http://" + freeAddr(t)
		defer func() { s.tokens.URL = down }()
		if err := read(openRepo(t, newClient(t, Options{}), place)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
	})
	t.Run("an identity token", func(t *testing.T) {
		id := "refresh me"
		s.refresh.Store(&id)
		defer s.refresh.Store(nil)
		o := Options{Credentials: fixed(Login{Username: "<token>", IdentityToken: id})}
		if err := read(openRepo(t, newClient(t, o), place)); err != nil {
			t.Error(err)
		}
		s.noOAuth.Store(true)
		defer s.noOAuth.Store(false)
		o = Options{Credentials: fixed(Login{Username: "alice", Password: "two", IdentityToken: id})}
		if err := read(openRepo(t, newClient(t, o), place)); err != nil {
			t.Errorf("without OAuth2: %v", err)
		}
	})
	t.Run("a registry token", func(t *testing.T) {
		s.mu.Lock()
		s.valid["mine"] = tokenGrant{time.Now().Add(time.Minute), []string{"repository:team/app:pull"}}
		s.mu.Unlock()
		if err := read(openRepo(t, newClient(t, Options{Credentials: fixed(Login{RegistryToken: "mine"})}), place)); err != nil {
			t.Error(err)
		}
		if err := read(openRepo(t, newClient(t, Options{Credentials: fixed(Login{RegistryToken: "other"})}), place)); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%v", err)
		}
	})
	t.Run("whoever asks for the token goes away", func(t *testing.T) {
		s.mu.Lock()
		clear(s.valid)
		s.mu.Unlock()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				ctx := ctx
				if i%2 == 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, 2*time.Millisecond)
					defer cancel()
				}
				if _, err := readRange(ctx, r, l.Digest, 0, 10); err != nil && i%2 == 1 {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

// The client does not send the password in the clear because a registry asks for it.
func TestTokenRealm(t *testing.T) {
	a := &authorizer{client: newClient(t, Options{}), root: &url.URL{Scheme: "https", Host: "registry.example"}, repository: "app"}
	for _, realm := range []string{"http://token.example/", "ftp://token.example/", "/token", "https://u:p@token.example/", "%", "http://10.0.0.1/"} {
		_, err := a.exchange(context.Background(), false, &challenge{"bearer", map[string]string{"realm": realm}}, Login{Username: "a", Password: "b"})
		if err == nil || !strings.Contains(err.Error(), "realm") {
			t.Errorf("%s: %v", realm, err)
		}
	}
}

func TestReadChallenge(t *testing.T) {
	for _, x := range []struct {
		in   []string
		want *challenge
	}{
		{nil, nil},
		{[]string{"Negotiate"}, nil},
		{[]string{`Basic realm="x"`}, &challenge{"basic", map[string]string{"realm": "x"}}},
		{[]string{`basic`}, &challenge{"basic", map[string]string{}}},
		{[]string{`Bearer realm="https://a/b?c=d,e",service=s,scope="repository:a/b:pull,push"`},
			&challenge{"bearer", map[string]string{"realm": "https://a/b?c=d,e", "service": "s", "scope": "repository:a/b:pull,push"}}},
		{[]string{`Basic realm="x", Bearer realm="y" , error = "insufficient_scope"`},
			&challenge{"bearer", map[string]string{"realm": "y", "error": "insufficient_scope"}}},
		{[]string{`Negotiate`, `Basic realm="a\"b"`}, &challenge{"basic", map[string]string{"realm": `a"b`}}},
		{[]string{`Bearer`, `=`, `"`, `,,,`, `Basic realm="`}, &challenge{"basic", map[string]string{"realm": ""}}},
	} {
		if got := readChallenge(x.in); !reflect.DeepEqual(got, x.want) {
			t.Errorf("%q: %+v, want %+v", x.in, got, x.want)
		}
	}
}

func FuzzReadChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://a/b",service=s`)
	f.Add(`Basic realm="a\"b", Bearer realm=x`)
	f.Add(`,=",\`)
	f.Fuzz(func(t *testing.T, s string) {
		if c := readChallenge([]string{s}); c != nil && c.scheme != "bearer" && c.scheme != "basic" {
			t.Errorf("%+v", c)
		}
	})
}

func TestBasicHeader(t *testing.T) {
	got := basic(Login{Username: "a", Password: "b:c"})
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("a:b:c")); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
