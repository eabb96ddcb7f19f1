package registry

import (
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
)

// A list of referrers whose pages never end does not fill the memory.
func TestReferrersEndless(t *testing.T) {
	f, r, _, _ := faultyRepo(t, Options{Attempts: 1})
	img, err := r.Resolve(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	entry := fmt.Sprintf(`{"mediaType":"a/b","size":1,"digest":"sha256:%064d","artifactType":"c/d"},`, 7)
	page := `{"schemaVersion":2,"manifests":[` + strings.TrimSuffix(strings.Repeat(entry, maxManifest/len(entry)-1), ",") + `]}`
	var pages atomic.Int64
	f.set(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, "/referrers/") {
			return false
		}
		w.Header().Set("Link", fmt.Sprintf(`<%s?page=%d>; rel="next"`, req.URL.Path, pages.Add(1)))
		w.Write([]byte(page))
		return true
	})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	// What is there is used.
	found, err := r.Referrers(t.Context(), img.Descriptor, "c/d")
	runtime.ReadMemStats(&after)
	if n := pages.Load(); n > maxPageBytes/maxManifest+2 {
		t.Errorf("%d pages were read", n)
	}
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 512<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	t.Logf("%d entries, %v, the heap grew by %d MiB", len(found), err, (int64(after.HeapSys)-int64(before.HeapSys))>>20)
}
