package registry

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A registry mounts a blob that another of its repositories has. Where it cannot, that is
// no error.
func TestMount(t *testing.T) {
	ctx := t.Context()
	addr, other := dockerRegistry(t, ""), memoryRegistry(t, true)
	c := newClient(t, Options{})
	from, to := openRepo(t, c, addr+"/team/one"), openRepo(t, c, addr+"/team/two")
	data := bytes.Repeat([]byte("blob"), 1000)
	d, err := from.PushBytes(ctx, data, types.OCILayer)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := to.MountBlob(ctx, d, from); !ok || err != nil {
		t.Fatalf("%v, %v", ok, err)
	}
	if got, err := to.Blob(ctx, d); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the mounted blob: %d bytes, %v", len(got), err)
	}
	missing := d
	missing.Digest = hashOf([]byte("nowhere"))
	layout := openRepo(t, c, "oci:"+t.TempDir()+"/l")
	if _, err := layout.PushBytes(ctx, data, types.OCILayer); err != nil {
		t.Fatal(err)
	}
	for what, x := range map[string][2]*Repo{
		"from another registry": {to, openRepo(t, c, other+"/team/one")}, "from a layout": {to, layout}, "to a layout": {layout, from}, "from itself": {to, to},
	} {
		if ok, err := x[0].MountBlob(ctx, d, x[1]); ok || err != nil {
			t.Errorf("%s: %v, %v", what, ok, err)
		}
	}
	if ok, err := to.MountBlob(ctx, missing, from); ok || err != nil {
		t.Errorf("a blob that does not exist: %v, %v", ok, err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if ok, err := openRepo(t, c, addr+"/team/three").MountBlob(ended, d, from); ok || err == nil {
		t.Errorf("with an ended context: %v, %v", ok, err)
	}
}

// Registries that do not mount answer in several ways. An upload that one begins instead
// is cancelled, and one that claims to have mounted a blob is not believed.
func TestNoMount(t *testing.T) {
	backend := memoryRegistry(t, true)
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"begins an upload": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/v2/team/two/blobs/uploads/session")
			w.WriteHeader(http.StatusAccepted)
		},
		"without a location":  func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) },
		"400":                 func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadRequest) },
		"405":                 func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusMethodNotAllowed) },
		"403":                 func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"500":                 func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"says so and has not": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) },
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var cancelled []string
			s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.URL.Query().Get("mount") != "":
					answer(w, r)
				case r.Method == http.MethodDelete:
					mu.Lock()
					cancelled = append(cancelled, r.URL.Path)
					mu.Unlock()
				case r.Method == http.MethodHead:
					w.WriteHeader(http.StatusNotFound)
				default:
					http.Error(w, "", http.StatusTeapot)
				}
			}))
			c := newClient(t, Options{Attempts: 2})
			d, err := openRepo(t, c, backend+"/team/one").PushBytes(t.Context(), []byte(name), types.OCILayer)
			if err != nil {
				t.Fatal(err)
			}
			from, to := openRepo(t, c, hostOf(s)+"/team/one"), openRepo(t, c, hostOf(s)+"/team/two")
			if ok, err := to.MountBlob(t.Context(), d, from); ok || err != nil {
				t.Errorf("%v, %v", ok, err)
			}
			c.FinishUploads()
			mu.Lock()
			defer mu.Unlock()
			if want := name == "begins an upload"; want != slices.Equal(cancelled, []string{"/v2/team/two/blobs/uploads/session"}) {
				t.Errorf("cancelled %q", cancelled)
			}
		})
	}
}

// The token for a mount is for both repositories; other tokens are for one.
func TestMountScope(t *testing.T) {
	s := newTokenServer(t, "secret", time.Minute)
	c := newClient(t, Options{Credentials: fixed(Login{Username: "alice", Password: "secret"})})
	addr := hostOf(s.registry)
	from, to := openRepo(t, c, addr+"/team/base"), openRepo(t, c, addr+"/team/app")
	d, err := to.PushBytes(t.Context(), []byte("blob"), types.OCILayer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := to.MountBlob(t.Context(), d, from); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	both := 0
	for _, g := range s.valid {
		scopes := fmt.Sprint(g.scopes)
		if strings.Contains(scopes, "repository:team/base:pull") {
			both++
			if !slices.Contains(g.scopes, "repository:team/app:pull,push") {
				t.Errorf("a token for %s", scopes)
			}
		}
	}
	if both != 1 {
		t.Errorf("%d tokens for both repositories", both)
	}
}
