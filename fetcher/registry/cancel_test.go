package registry

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// The client cancels an abandoned upload at the registry, whichever of its requests
// hangs. FinishUploads waits for the cancellation, and Close does not.
func TestUploadsAreCancelled(t *testing.T) {
	for _, hangs := range []string{http.MethodPost, http.MethodPatch, http.MethodPut, http.MethodDelete} {
		t.Run(hangs, func(t *testing.T) {
			ctx, giveUp := context.WithCancel(t.Context())
			defer giveUp()
			deleted := make(chan string, 10)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				step := r.Method
				if step == http.MethodDelete {
					deleted <- r.URL.Path
				}
				// There is a DELETE only if another step fails.
				if step == hangs || hangs == http.MethodDelete && step == http.MethodPatch {
					giveUp()
					if step != http.MethodPost { // which is answered late
						<-r.Context().Done()
						return
					}
				}
				w.Header().Set("Location", "/v2/a/blobs/uploads/1")
				switch step {
				case http.MethodHead:
					w.WriteHeader(http.StatusNotFound)
				case http.MethodDelete:
					w.WriteHeader(http.StatusNoContent)
				default:
					w.WriteHeader(http.StatusAccepted)
				}
			}))
			defer s.Close()
			c := New(Options{CancelTime: 5 * time.Minute})
			ref, err := ParseRef(strings.TrimPrefix(s.URL, "http://") + "/a")
			if err != nil {
				t.Fatal(err)
			}
			repo, err := c.Open(ref)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := repo.PushBytes(ctx, make([]byte, 2*monolithic), "application/octet-stream"); ctx.Err() == nil || err == nil {
				t.Fatalf("the push was not cancelled: %v", err)
			}
			if hangs == http.MethodDelete {
				<-deleted
				began := time.Now()
				c.Close()
				if took := time.Since(began); took >= time.Minute {
					t.Errorf("Close waited %v for a registry that does not answer", took)
				}
				return
			}
			c.FinishUploads()
			c.Close()
			select {
			case at := <-deleted:
				if at != "/v2/a/blobs/uploads/1" {
					t.Errorf("DELETE %s", at)
				}
			default:
				t.Error("the upload was not cancelled")
			}
		})
	}
}
