package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A pull-through cache copies a blob from the registry when it is first asked for it. Until it
// has all of it, most caches answer a request for a range with 200 and the whole blob, which
// comes straight from the registry: docker-registry, Harbor and Nexus do. If each reader took
// its range from such an answer, the registry would send the blob once per range; if each
// turned to the registry, a cold cache would save nothing. So thaw closes the answer, which
// has made the cache begin to copy, and asks again a little later, when the cache has the
// blob and answers with 206. Meanwhile readers wait.
//
// That must not hold up starts for long. So thaw waits for a mirror only for some time, and
// then reads from the next source until the mirror has the blob. It waits less often for a
// mirror that never gives a range.
//
// Images are also named by the address of such a cache, which is the registry then. There is no
// next source, so thaw waits longer for it, and takes ranges from whole blobs at last. Servers
// that do not know ranges are told from caches by a header that the latter inherit from
// docker-registry, which knows them.

const (
	// firstPull is how long after a whole blob the mirror is asked for a range again: twice
	// as long each time, up to maxPull.
	firstPull, maxPull = 250 * time.Millisecond, 2 * time.Minute
	// copySpeed, in bytes a second, is what a mirror is expected to copy at least: it is not
	// asked again before it can have all of the blob.
	copySpeed = 64 << 20
	// pollTime is how long others wait for the request that finds out whether a mirror gives
	// ranges of a blob; they look every lookTime.
	pollTime, lookTime = 100 * time.Millisecond, 20 * time.Millisecond
	// maxPatience is how long readers wait for a mirror, for all blobs together; not again
	// before restlessness is over, and twice that after each time in vain.
	maxPatience                   = 5 * time.Second
	originPatience                = 20 * time.Second // where there is no next source
	restlessness, maxRestlessness = time.Minute, time.Hour
	// smallBlob is the size up to which a range is taken from a whole blob: that costs less
	// than to ask again, and caches that only keep what was read to its end then have it.
	smallBlob = 1 << 20
)

// errPulling is a whole blob instead of a range.
var errPulling = fmt.Errorf("%w: the server sends whole blobs for ranges, as caches do that are still copying a blob", ErrUnavailable)

// errAsking is the error while another request finds out whether a mirror gives ranges of a blob.
var errAsking = fmt.Errorf("%w: another request is finding out whether the server gives ranges of the blob", errPulling)

// pulling says when to ask a cache for a range of a blob again.
type pulling struct {
	next  time.Time
	tries int  // whole blobs since the last range
	gives bool // it has given a range of this blob, and nothing else since
}

// until returns how long a cache is not to be asked for ranges of a blob.
func (p pulling) until(now time.Time) time.Duration {
	if p.gives {
		return 0
	}
	return max(p.next.Sub(now), 0)
}

// lateAfter is how long to wait for a range of a blob before the next source is asked. A mirror
// that has not given any may have to ask for the blob itself.
func (e *endpoint) lateAfter(h v1.Hash) time.Duration {
	d := e.src.lateAfter()
	if e.src.mirrorOf != "" && h != (v1.Hash{}) && !e.state(h).pulling.gives {
		d = max(d, lateFirst)
	}
	return d
}

// claim is until, but the caller for which it is zero is to ask, and the others wait a little
// longer for what it finds out.
func (e *endpoint) claim(h v1.Hash, now time.Time) (d time.Duration) {
	if e.state(h).pulling.gives {
		return 0
	}
	e.update(h, func(s *blobState) {
		if d = s.pulling.until(now); d == 0 {
			s.pulling.next = now.Add(pollTime)
		}
	})
	return d
}

// whole notes a whole blob instead of a range. The error says when to ask again.
func (e *endpoint) whole(h v1.Hash, resp *http.Response) error {
	resp.Body.Close() // the rest would be the whole blob
	e.src.succeeded() // it works
	now := time.Now()
	var d time.Duration
	e.update(h, func(s *blobState) {
		p := &s.pulling
		if p.gives = false; p.tries > 0 && p.next.Sub(now) > pollTime {
			d = p.next.Sub(now) // another request was under way at the same time
			return
		}
		d = min(firstPull<<min(p.tries, 16), maxPull)
		d = d/2 + rand.N(d/2)
		if p.tries == 0 && resp.ContentLength > 0 {
			d = max(d, time.Duration(float64(min(resp.ContentLength, 1<<40))/copySpeed*float64(time.Second)))
			d = min(d+rand.N(d/4+1), maxPull)
		}
		p.next = now.Add(d)
		p.tries++
	})
	if left := e.src.patience(now); left > 0 {
		d = min(d, left)
		e.client.log.Debug("a cache does not have a blob yet; thaw waits for it", "source", e.src.name, "blob", h.String(), "for", d)
	}
	return &httpError{method: http.MethodGet, url: redact(resp.Request.URL), err: errPulling, after: d}
}

// gives notes that a cache has given a range of a blob.
func (e *endpoint) gives(h v1.Hash) {
	if e.state(h).pulling.gives {
		return
	}
	e.update(h, func(s *blobState) { s.pulling = pulling{gives: true} })
	e.src.mu.Lock()
	e.src.mu.vain = 0
	e.src.mu.Unlock()
}

// maxPatience is how long readers wait for a source that is copying.
func (s *source) maxPatience() time.Duration {
	if s.mirrorOf == "" {
		return originPatience
	}
	return maxPatience
}

// patience returns how long readers still wait for a source that is copying: zero if they ask
// the next one, or take whole blobs.
func (s *source) patience(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !now.Before(s.mu.restless) {
		s.mu.patient = now.Add(s.maxPatience())
		s.mu.restless = now.Add(min(restlessness<<min(s.mu.vain, 16), maxRestlessness))
		s.mu.vain++
	}
	return max(s.mu.patient.Sub(now), 0)
}

// isCache says whether an answer without the range that was asked for is from a registry that
// may be a cache.
func isCache(h http.Header) bool { return h.Get("Docker-Distribution-Api-Version") != "" }

// caches are the sources that may have to copy a blob first: mirrors, and a registry that has
// shown that it does.
func (m *remote) caches(h v1.Hash) []*endpoint {
	list := m.mirrors(false)
	if m.origin.state(h).pulling.tries > 0 {
		list = append(list, m.origin)
	}
	return list
}

// patiently opens ranges, and waits while a cache is copying the blob.
func (m *remote) patiently(ctx context.Context, open func(patient bool) (*Body, error)) (*Body, error) {
	most := maxPatience
	if len(m.mirrors(false)) == 0 {
		most = originPatience
	}
	end := time.Now().Add(most)
	for {
		b, err := open(time.Now().Before(end))
		if !errors.Is(err, errPulling) || !time.Now().Before(end) {
			return b, err
		}
		t := time.NewTimer(RetryAfter(err))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
	}
}

// errOneRange: a cache is to be asked for one range, to find out whether it has copied a blob.
// To be asked for several, it may not be able to answer in any case.
var errOneRange = errors.New("one range is to be asked for")

// awaited says whether readers wait at present for the cache that would be asked first.
func (m *remote) awaited(h v1.Hash) bool {
	now := time.Now()
	for _, e := range m.caches(h) {
		s := e.state(h)
		if e.src.resting(now) || now.Before(s.missing) {
			continue
		}
		return s.pulling.tries > 0 && s.pulling.until(now) > 0 && e.src.patience(now) > 0
	}
	return false
}

// copying returns an error if a reader of ranges is to wait because the cache that would be
// asked first is copying the blob. Otherwise it returns the cache that is to be asked whether
// it still is, if any.
func (m *remote) copying(h v1.Hash, several bool) (asks *endpoint, err error) {
	now := time.Now()
	for _, e := range m.caches(h) {
		s := e.state(h)
		if e.src.resting(now) || now.Before(s.missing) {
			continue
		}
		if several && s.pulling.tries > 0 && s.pulling.until(now) == 0 {
			return nil, errOneRange
		}
		d := e.claim(h, now)
		if d == 0 {
			return e, nil
		}
		if s.pulling.tries == 0 {
			// Each request might make it copy the blob once more.
			return nil, &httpError{method: http.MethodGet, url: redact(e.url("blobs", h.String())), err: errAsking, after: min(d, lookTime)}
		}
		if left := e.src.patience(now); left > 0 {
			return nil, &httpError{method: http.MethodGet, url: redact(e.url("blobs", h.String())), err: errPulling, after: min(d, left)}
		}
	}
	return nil, nil
}

// isCopying says whether readers are to wait, after this error, for the cache that it is from.
func (e *endpoint) isCopying(err error) bool {
	return errors.Is(err, errPulling) && e.src.patience(time.Now()) > 0
}
