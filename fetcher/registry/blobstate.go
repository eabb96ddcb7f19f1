package registry

import (
	"net/url"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// blobState is what an endpoint knows about a blob.
type blobState struct {
	location *location // where the registry redirected to
	missing  time.Time // the mirror does not have it; it is not asked again before
	pulling  pulling   // the mirror is copying it from the registry
	size     int64     // of the blob, as a mirror's ranges said; 0: not known
}

// location is where a registry redirected to.
type location struct {
	url     *url.URL
	expires time.Time // zero: the URL does not say
}

const (
	// maxBlobStates is how many blobs an endpoint remembers. A repository has a few per image.
	maxBlobStates = 4096
	// maxLocation is the length of a URL that is remembered.
	maxLocation = 16 << 10
)

func (e *endpoint) state(h v1.Hash) blobState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.mu.blobs[h]
}

// update changes what is known about a blob.
func (e *endpoint) update(h v1.Hash, change func(*blobState)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.mu.blobs) >= maxBlobStates {
		clear(e.mu.blobs)
	}
	if e.mu.blobs == nil {
		e.mu.blobs = make(map[v1.Hash]blobState)
	}
	s := e.mu.blobs[h]
	change(&s)
	e.mu.blobs[h] = s
}

// forget removes the location of a blob.
func (e *endpoint) forget(h v1.Hash) {
	e.update(h, func(s *blobState) { s.location = nil })
}

// located returns the location of a blob that can still be used, or nil.
func (e *endpoint) located(h v1.Hash) *url.URL {
	at := e.state(h).location
	if at == nil || !at.expires.IsZero() && !time.Now().Before(at.expires) {
		return nil
	}
	return at.url
}
