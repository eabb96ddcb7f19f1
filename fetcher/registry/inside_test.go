package registry

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A registry on another machine cannot direct requests to this one: by a redirect, by its token
// service, by an address or by a name that leads there.
func TestInside(t *testing.T) {
	var asked atomic.Int64
	inside := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Write([]byte(`{"token":"x"}`))
	}))
	_, port, _ := net.SplitHostPort(hostOf(inside))
	h := hashOf([]byte("x"))
	for name, to := range map[string]string{
		"address":            "http://127.0.0.1:" + port + "/x",
		"another address":    "http://127.8.8.8:" + port + "/x",
		"mapped address":     "http://[::ffff:127.0.0.1]:" + port + "/x",
		"no address":         "http://0.0.0.0:" + port + "/x",
		"localhost":          "http://localhost:" + port + "/x",
		"cloud":              "http://169.254.169.254/latest/meta-data/",
		"link-local":         "http://[fe80::1]/x",
		"a name":             "http://inside.example:" + port + "/x",
		"a name, over HTTPS": "https://inside.example:" + port + "/x",
	} {
		for _, how := range []string{"redirect", "realm", "redirect of the realm"} {
			t.Run(name+", "+how, func(t *testing.T) {
				s := hostOf(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case how == "redirect" || r.URL.Path == "/token":
						http.Redirect(w, r, to, http.StatusTemporaryRedirect)
					default:
						realm := to
						if how != "realm" {
							realm = "http://registry.example/token"
						}
						w.Header().Set("Www-Authenticate", `Bearer realm="`+realm+`"`)
						w.WriteHeader(http.StatusUnauthorized)
					}
				})))
				c := newClient(t, Options{Attempts: 1, Insecure: []string{"*"}, DialTimeout: time.Second})
				// The names are made up, so the dialer knows their addresses.
				c.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
					to := addr
					switch {
					case strings.HasPrefix(addr, "registry.example"):
						to = s
					case strings.HasPrefix(addr, "inside.example"):
						to = "127.0.0.1:" + port
					}
					return c.dialer.dial(ctx, network, to)
				}
				// The registry itself is on loopback here, which only its own requests may reach.
				if how == "redirect of the realm" {
					c.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
						if strings.HasPrefix(addr, "registry.example") {
							return new(net.Dialer).DialContext(ctx, network, s)
						}
						return c.dialer.dial(ctx, network, strings.Replace(addr, "inside.example", "127.0.0.1", 1))
					}
				}
				r := openRepo(t, c, "registry.example/app:v1")
				asked.Store(0)
				_, err := readRange(t.Context(), r, h, 0, 1)
				if !errors.Is(err, errInside) || Temporary(err) {
					t.Errorf("%v", err)
				}
				if n := asked.Load(); n != 0 {
					t.Errorf("this machine was asked %d times", n)
				}
			})
		}
	}
	// A registry on this machine may direct requests to it, and so may a proxy be there.
	here := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, inside.URL+"/x", http.StatusTemporaryRedirect)
	}))
	r := openRepo(t, newClient(t, Options{}), hostOf(here)+"/app")
	if b, err := r.Blob(t.Context(), v1.Descriptor{Digest: hashOf([]byte(`{"token":"x"}`)), Size: 13}); err != nil || len(b) != 13 {
		t.Error(err)
	}
	proxy, _ := url.Parse(inside.URL)
	r = openRepo(t, newClient(t, Options{Insecure: []string{"*"}, Proxy: func(*http.Request) (*url.URL, error) { return proxy, nil }}), "registry.example/app")
	if b, err := r.Blob(t.Context(), v1.Descriptor{Digest: hashOf([]byte(`{"token":"x"}`)), Size: 13}); err != nil || len(b) != 13 {
		t.Error(err)
	}
}

// A registry that redirects without end, slowly, takes little more than the time for one answer.
func TestRedirectsSlow(t *testing.T) {
	f, r, l, _ := faultyRepo(t, Options{HeaderTimeout: 500 * time.Millisecond})
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(400 * time.Millisecond):
		case <-r.Context().Done():
		}
		http.Redirect(w, r, r.URL.String()+"x", http.StatusTemporaryRedirect)
	}))
	if _, err := readRange(t.Context(), r, l.Digest, 0, 10); err == nil {
		t.Error("no error")
	}
	// The second answer has a fifth of the time for one.
	if n := f.requests.Load(); n > 3 {
		t.Errorf("it followed %d redirects", n)
	}
}
