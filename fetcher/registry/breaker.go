package registry

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"
)

// breakers keep requests from hosts that cannot answer them: from one that has asked to wait,
// until that time is over, and from one that has failed several times in a row, for a short
// time that grows. All requests of a client share them. Mirrors are not among these hosts: see
// source, which has them rest after the first failure, since there is another host to ask.
//
// A circuit is closed while requests pass. It is open while they fail at once, with the time to
// wait. Then it is half open: one request finds out how the host does, and the others wait a
// little longer. A request whose answer takes longer than trialTime no longer keeps others
// back.
//
// There is a circuit for each kind of request of a host, because registries limit them apart:
// Docker Hub counts manifests and not blobs. So a host whose images may not be resolved for an
// hour still sends the blocks of those that run.
type breakers struct {
	backoff time.Duration // of the first time that a circuit is open

	mu struct {
		sync.Mutex
		circuits map[string]*circuit // those of hosts that have failed
	}
}

type circuit struct {
	fails  int       // in a row
	opened int       // times in a row that it was opened for failures
	until  time.Time // it is open until then; zero: it is closed
	trial  time.Time // when the request that finds out began; zero: there is none
	cause  error     // of the last failure
}

const (
	// maxFails is how many failures in a row open a circuit.
	maxFails = 5
	// maxOpen bounds how long it is open, unless the host says how long.
	maxOpen = 5 * time.Second
	// maxBlobWait bounds how long blobs are not asked for although a host has asked to wait
	// longer: readers of a disk get I/O errors after half a minute.
	maxBlobWait = 10 * time.Second
	// trialTime is how long one request keeps the others back; they ask every trialWait.
	trialTime, trialWait = time.Second, 50 * time.Millisecond
)

// kindOf is the kind of a request to a registry or to a host that one redirects to.
func kindOf(u *url.URL) string {
	switch dir := path.Dir(u.Path); {
	case strings.Contains(u.Path, "/blobs/uploads/"):
		return "uploads"
	case strings.HasPrefix(dir, "/v2/") && (path.Base(dir) == "manifests" || path.Base(dir) == "referrers"):
		return "manifests"
	}
	return "blobs"
}

// circuitOf is the name of the circuit of a request, empty for none.
func (e *endpoint) circuitOf(u *url.URL) string {
	if e.src.mirrorOf != "" && u.Host == e.root.Host {
		return ""
	}
	return kindOf(u) + " " + u.Host
}

// pass says whether a request may be made now. If it may not, the error is ErrUnavailable and
// has the time to wait.
func (b *breakers) pass(name string, now time.Time, method string, u *url.URL) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.mu.circuits[name]
	if c == nil || c.until.IsZero() {
		return nil
	}
	wait := c.until.Sub(now)
	if wait <= 0 {
		if c.trial.IsZero() || now.Sub(c.trial) >= trialTime {
			c.trial = now
			return nil
		}
		wait = trialWait
	}
	return &httpError{method: method, url: redact(u), after: wait,
		err: fmt.Errorf("%w: thaw does not ask %s for now, because of an earlier answer: %w", ErrUnavailable, u.Host, c.cause)}
}

// works notes an answer.
func (b *breakers) works(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.mu.circuits, name)
}

// unknown notes that a request has ended without saying anything about its host.
func (b *breakers) unknown(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.mu.circuits[name]; c != nil {
		c.trial = time.Time{}
	}
}

// settle notes what an answer says about its host.
func (b *breakers) settle(name string, resp *http.Response) {
	switch s := resp.StatusCode; s {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		now := time.Now()
		b.failed(name, now, retryAfter(resp.Header.Get("Retry-After"), now),
			fmt.Errorf("%s %s: %d %s", resp.Request.Method, redact(resp.Request.URL), s, http.StatusText(s)))
	case http.StatusInternalServerError:
		b.unknown(name) // it may be about this request
	default:
		b.works(name)
	}
}

// failed notes that a host does not answer, or is overloaded. after is how long it asked to
// wait, if it did.
func (b *breakers) failed(name string, now time.Time, after time.Duration, cause error) {
	if name == "" {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.mu.circuits[name]
	if c == nil {
		if b.mu.circuits == nil || len(b.mu.circuits) >= maxNotes {
			b.mu.circuits = make(map[string]*circuit)
		}
		c = new(circuit)
		b.mu.circuits[name] = c
	}
	c.cause = cause
	c.fails++
	open := now.Before(c.until)
	c.trial = time.Time{}
	if after > 0 {
		if !strings.HasPrefix(name, "manifests ") && !strings.HasPrefix(name, "uploads ") {
			after = min(after, maxBlobWait)
		}
		if t := now.Add(after); t.After(c.until) {
			c.until = t
		}
		return
	}
	if open || c.until.IsZero() && c.fails < maxFails {
		return // those that were under way together fail together
	}
	d := min(b.backoff<<min(c.opened, 16), maxOpen)
	c.opened++
	c.until = now.Add(d/4 + rand.N(d-d/4+1))
}
