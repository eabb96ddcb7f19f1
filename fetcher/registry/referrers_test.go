package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Several independent programs add referrers at once, on a registry without the API.
func TestReferrersRace(t *testing.T) {
	ctx := context.Background()
	addr := dockerRegistry(t, "")
	r := openRepo(t, newClient(t, Options{}), addr+"/app:v1")
	img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	const clients, each = 4, 2
	var wg sync.WaitGroup
	for i := range clients {
		r := openRepo(t, newClient(t, Options{}), addr+"/app:v1")
		for j := range each {
			wg.Go(func() {
				raw, err := json.Marshal(artifact(img, "application/vnd.test", map[string]string{"n": fmt.Sprint(i, j)}))
				if err == nil {
					_, err = r.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	found, err := r.Referrers(ctx, img, "application/vnd.test")
	if err != nil || len(found) != clients*each {
		t.Errorf("%d referrers of %d, %v", len(found), clients*each, err)
	}
	tags, err := r.Lookup(ctx, r.Ref().WithTag(strings.Replace(img.Digest.String(), ":", "-", 1)))
	if err != nil || tags.MediaType != types.OCIImageIndex {
		t.Errorf("the fallback tag: %v, %v", tags, err)
	}
}

// A registry refuses an index with entries that it no longer has. Missing referrers of
// other programs must not prevent thaw from listing its own.
func TestReferrersGone(t *testing.T) {
	ctx := context.Background()
	addr := dockerRegistry(t, "") // which lets manifests be deleted only if told
	f := newFaulty(t, addr)
	r := openRepo(t, newClient(t, Options{}), f.host()+"/app:v1")
	img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	gone := describe([]byte("gone"), types.OCIManifestSchema1)
	stale, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{gone}})
	if err != nil {
		t.Fatal(err)
	}
	first := true
	f.set(func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, fallbackTag(img.Digest)) || !first {
			return false
		}
		first = false
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		w.Write(stale)
		return true
	})
	a := push(t, ctx, r, "", artifact(img, "application/vnd.test", nil))
	found, err := r.Referrers(ctx, img)
	if err != nil || len(found) != 1 || found[0].Digest != a.Digest {
		t.Errorf("%v, %v", found, err)
	}
}

// The referrers API of the spec: pages, filters that the registry does not apply, and
// OCI-Subject, which makes the fallback tag unnecessary.
func TestReferrersAPI(t *testing.T) {
	ctx := context.Background()
	subject := describe([]byte("subject"), types.OCIManifestSchema1)
	var all []v1.Descriptor
	for i := range 25 {
		d := describe([]byte(fmt.Sprint(i)), types.OCIManifestSchema1)
		d.ArtifactType = fmt.Sprintf("application/vnd.test.%d", i%2)
		all = append(all, d)
	}
	var puts []string
	loop := false
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut:
			puts = append(puts, r.URL.Path)
			w.Header().Set("OCI-Subject", subject.Digest.String())
			w.WriteHeader(http.StatusCreated)
		case strings.HasSuffix(r.URL.Path, "/referrers/"+subject.Digest.String()):
			from := 0
			fmt.Sscan(r.URL.Query().Get("from"), &from)
			to := min(from+10, len(all))
			if to < len(all) || loop {
				w.Header().Add("Link", fmt.Sprintf(`<%s?from=%d>; rel="next"`, r.URL.Path, to%len(all)))
			}
			w.Header().Set("Content-Type", string(types.OCIImageIndex)+"; charset=utf-8")
			json.NewEncoder(w).Encode(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: all[from:to]})
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	})
	r := openRepo(t, newClient(t, Options{}), hostOf(serve(t, h))+"/app:v1")
	if found, err := r.Referrers(ctx, subject); err != nil || len(found) != 25 {
		t.Errorf("%d, %v", len(found), err)
	}
	found, err := r.Referrers(ctx, subject, "application/vnd.test.1")
	if err != nil || len(found) != 12 || slices.ContainsFunc(found, func(d v1.Descriptor) bool { return d.ArtifactType != "application/vnd.test.1" }) {
		t.Errorf("%d, %v", len(found), err)
	}
	push(t, ctx, r, "", artifact(subject, "application/vnd.test.0", nil))
	if len(puts) != 1 {
		t.Errorf("put %v", puts)
	}
	loop = true
	// The client reads endless pages up to a bound, and uses what they list.
	if found, err := r.Referrers(ctx, subject); err != nil || len(found) != 25 {
		t.Errorf("pages without end: %d, %v", len(found), err)
	}
}

func TestNextPage(t *testing.T) {
	for in, want := range map[string]string{
		"":                                 "",
		`</v2/x?last=1>; rel="next"`:       "/v2/x?last=1",
		`</v2/x?last=1>;rel=next`:          "/v2/x?last=1",
		`<a>; rel="prev", <b>; rel="next"`: "b",
		`<a>; rel="prev"`:                  "",
		`a; rel="next"`:                    "",
	} {
		if got := nextPage([]string{in}); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// An index of platforms, as common tools make it.
func TestResolvePlatform(t *testing.T) {
	media(t, func(t *testing.T, place string) {
		ctx := context.Background()
		r := openRepo(t, newClient(t, Options{}), place+":multi")
		platforms := []v1.Platform{amd64, {OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "arm", Variant: "v6"},
			{OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "unknown", Architecture: "unknown"}}
		index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
		for _, p := range platforms {
			d, _ := pushImage(t, ctx, r, "", []byte(p.String()), p)
			d.Platform = &p
			index.Manifests = append(index.Manifests, d)
		}
		raw, err := json.Marshal(index)
		if err != nil {
			t.Fatal(err)
		}
		top, err := r.PushManifest(ctx, raw, types.OCIImageIndex, "multi")
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range []struct {
			platform string
			want     int
		}{{"linux/amd64", 0}, {"linux/arm64", 1}, {"linux/arm64/v8", 1}, {"linux/arm/v6", 2}, {"linux/arm/v7", 3}, {"linux/arm", 3}} {
			p, err := v1.ParsePlatform(x.platform)
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.Resolve(ctx, p)
			if err != nil || got.Digest != index.Manifests[x.want].Digest || got.Index == nil || got.Index.Digest != top.Digest {
				t.Errorf("%s: %v, %v", x.platform, got, err)
			}
		}
		_, err = r.Resolve(ctx, &v1.Platform{OS: "linux", Architecture: "s390x"})
		if err == nil || !strings.Contains(err.Error(), "no image for linux/s390x, there are: linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64") {
			t.Errorf("%v", err)
		}
		if _, err := r.Resolve(ctx, nil); err == nil || !strings.Contains(err.Error(), "choose a platform: linux/amd64") {
			t.Errorf("%v", err)
		}
		// An index in an index, without a platform.
		nested, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{top}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.PushManifest(ctx, nested, types.OCIImageIndex, "nested"); err != nil {
			t.Fatal(err)
		}
		got, err := openRepo(t, r.client, place+":nested").Resolve(ctx, &amd64)
		if err != nil || got.Digest != index.Manifests[0].Digest || got.Index.Digest != hashOf(nested) {
			t.Errorf("nested: %v, %v", got, err)
		}
	})
}
