package registry

import (
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// A source is a registry or a mirror: its health and its counters.
type source struct {
	name     string // scheme and host
	mirrorOf string // empty for a registry itself
	log      *slog.Logger

	leastLate, leastRest time.Duration // see Options

	requests, bytes atomic.Int64
	ignoresRange    atomic.Bool  // and that was logged
	listsReferrers  atomic.Bool  // has an API that lists referrers
	noExpect        atomic.Bool  // refuses Expect: 100-continue
	maxBody         atomic.Int64 // largest body of an upload's request, once it has refused a larger one; 0: not known
	several         several      // ranges in one answer

	mu struct {
		sync.Mutex
		errors   map[int]int64
		failure  error // of the last request that failed
		failedAt time.Time
		fails    int           // failures since it last worked
		wrong    int           // bodies with wrong bytes, in all
		until    time.Time     // a mirror rests until then
		noRange  time.Time     // its ranges were wrong: whole blobs are read until then
		usual    time.Duration // from a request to its answer; 0 before the first
		waiting  int           // requests for blobs without an answer yet
		heard    time.Time     // when the last answer came
		late     int           // late requests since one was answered in time
		hedged   float64       // late requests that were asked of the next source early, less those that were earned
		probing  bool          // a request finds out whether a mirror works again
		patient  time.Time     // until then readers wait while a mirror copies blobs
		restless time.Time     // they do not wait again before that
		vain     int           // times that they have waited since the mirror gave a range
	}
}

// How long a mirror rests: twice as long with each failure.
const (
	restAfterFailure, maxRestAfterFailure = time.Second, 2 * time.Minute
	restAfterWrong, maxRestAfterWrong     = time.Minute, time.Hour
	restAfterMissing                      = time.Minute // the mirror may still pull it
	noRangeTime                           = time.Minute
)

// If an answer has not begun after lateFactor times the source's usual latency, within
// limits, the next source is asked too. A healthy server seldom takes four times as long as
// usual, and a reader can lose 250 ms.
const (
	lateFactor       = 4
	minLate, maxLate = 250 * time.Millisecond, 2 * time.Second
	lateFirst        = time.Second // for the first answer of a source, which includes the handshakes
	maxLateInARow    = 4           // then a mirror that answers nothing rests
	maxWaiting       = 16          // requests that wait for a mirror that answers none
)

// When many hosts start at once, all are late at a mirror that works, and if all of them then
// asked the registry too, the mirror would be of no use just when it is needed. So only
// maxHedges late requests, and one for every hedgeEvery that were in time, are asked of the
// next source before maxLate, or before maxBusy if the mirror answers others meanwhile.
const (
	maxHedges, hedgeEvery = 2, 20
	maxBusy               = 3 * maxLate
)

// lateAfter is how long to wait for an answer before the next source is asked.
func (s *source) lateAfter() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.usual == 0 {
		return max(lateFirst, s.leastLate)
	}
	return max(min(lateFactor*s.mu.usual, maxLate), minLate, s.leastLate)
}

// enter says whether a source may be asked for a blob now, and counts the request if so. A
// mirror may not be while it rests; after a failure, while another request finds out whether
// it works again; and while maxWaiting requests wait and none is answered.
func (s *source) enter(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mirrorOf != "" {
		silent := now.Sub(s.mu.heard) > max(minLate, s.leastLate, 2*s.mu.usual)
		if now.Before(s.mu.until) || s.mu.probing || s.mu.waiting >= maxWaiting && silent {
			return false
		}
		s.mu.probing = s.mu.fails > 0
	}
	s.mu.waiting++
	return true
}

// leave ends what enter began.
func (s *source) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.waiting--
	s.mu.probing = false
}

// answered notes how long a source took to answer, whatever the answer is.
func (s *source) answered(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.heard = time.Now()
	if s.mu.usual == 0 {
		s.mu.usual = max(took, 1)
	} else {
		s.mu.usual += (took - s.mu.usual) / 8
	}
}

var errLate = errors.New("its answers take much longer than usual")

// overtaken notes that another source was asked because this one did not answer. After
// several in a row a mirror rests, if it has not answered anything for maxLate: one that is only
// busy would be of no use just when many hosts need it.
func (s *source) overtaken() {
	s.mu.Lock()
	s.mu.late++
	hangs := s.mu.late >= maxLateInARow && time.Since(s.mu.heard) >= maxLate
	s.mu.Unlock()
	if hangs {
		s.failed(0, errLate)
	}
}

// holdHedge returns how long not to ask the next source yet although this one is late: zero if
// it may be asked, which counts. A source that rests anyway is not waited for.
func (s *source) holdHedge(now, asked time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.mu.until) {
		return 0
	}
	if s.mu.hedged <= maxHedges-1 {
		s.mu.hedged++
		return 0
	}
	limit := maxLate
	if now.Sub(s.mu.heard) < maxLate {
		limit = maxBusy // it answers others
	}
	return max(asked.Add(limit).Sub(now), 0)
}

// inTime notes an answer that came before another source was asked.
func (s *source) inTime() {
	s.mu.Lock()
	s.mu.late = 0
	s.mu.hedged = max(s.mu.hedged-1.0/hedgeEvery, 0)
	s.mu.Unlock()
}

// ignoreRanges has whole blobs read from the source for noRangeTime.
func (s *source) ignoreRanges(why string) {
	now := time.Now()
	s.mu.Lock()
	first := !now.Before(s.mu.noRange)
	s.mu.noRange = now.Add(noRangeTime)
	s.mu.Unlock()
	if first {
		s.log.Warn("the server's answers to range requests are wrong; thaw reads whole blobs from it, which is slow", "source", s.name, "for", noRangeTime, "err", why)
	}
}

func (s *source) givesRanges() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !time.Now().Before(s.mu.noRange)
}

// resting says whether a mirror rests: it is not asked. A registry never rests.
func (s *source) resting(now time.Time) bool {
	if s.mirrorOf == "" {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Before(s.mu.until)
}

// distrusted says whether a mirror rests because of wrong bytes.
func (s *source) distrusted(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.wrong > 0 && now.Before(s.mu.until)
}

// failed takes note of a request that failed. A mirror rests then.
func (s *source) failed(after time.Duration, cause error) {
	now := time.Now()
	s.mu.Lock()
	s.mu.failure, s.mu.failedAt = cause, now
	if s.mirrorOf == "" {
		s.mu.Unlock()
		return
	}
	// Requests that were under way together fail together, once.
	first := !now.Before(s.mu.until)
	d := after
	if first {
		s.mu.fails++
		rest := min(restAfterFailure<<min(s.mu.fails-1, 16), maxRestAfterFailure)
		d = max(d, s.leastRest, rest/2+rand.N(rest/2+1)) // so that hosts do not return all at once
	}
	if t := now.Add(d); t.After(s.mu.until) {
		s.mu.until = t
	}
	s.mu.Unlock()
	if first {
		s.log.Warn("a mirror fails; thaw does not use it for now", "mirror", s.name, "of", s.mirrorOf, "for", d, "err", cause)
	}
}

func (s *source) distrust() {
	s.mu.Lock()
	s.mu.wrong++
	d := min(restAfterWrong<<min(s.mu.wrong-1, 16), maxRestAfterWrong)
	s.mu.until = time.Now().Add(d)
	s.mu.Unlock()
	if s.mirrorOf != "" {
		s.log.Warn("a mirror sends wrong bytes; thaw does not use it for now", "mirror", s.name, "of", s.mirrorOf, "for", d)
	} else {
		s.log.Warn("the registry sends wrong bytes", "registry", s.name)
	}
}

func (s *source) succeeded() {
	if s.mirrorOf == "" {
		return
	}
	s.mu.Lock()
	s.mu.fails, s.mu.late = 0, 0
	s.mu.Unlock()
}

// count counts an error by its status, 0 for no answer.
func (s *source) count(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.errors == nil {
		s.mu.errors = make(map[int]int64)
	}
	s.mu.errors[status]++
}

// SourceStats are the counters of a registry or a mirror.
type SourceStats struct {
	// Source is a scheme and a host; MirrorOf is empty for a registry.
	Source, MirrorOf string
	// Requests counts the requests sent, redirected ones included, but not those for
	// tokens. Bytes counts the bytes received in bodies.
	Requests, Bytes int64
	// Errors counts answers by status, from 400 on, and requests without an answer under
	// 0. Answers that only asked for credentials are included.
	Errors map[int]int64
	// Wrong counts the bodies with wrong bytes.
	Wrong int64
	// Resting is set while a mirror is not used.
	Resting bool
}

// Stats returns the counters of every source in use, mirrors before their registry.
func (c *Client) Stats() []SourceStats {
	c.mu.Lock()
	order := c.mu.order[:len(c.mu.order):len(c.mu.order)]
	c.mu.Unlock()
	var all []SourceStats
	for _, s := range order {
		st := SourceStats{Source: s.name, MirrorOf: s.mirrorOf, Requests: s.requests.Load(), Bytes: s.bytes.Load(),
			Resting: s.resting(time.Now())}
		s.mu.Lock()
		st.Errors, st.Wrong = maps.Clone(s.mu.errors), int64(s.mu.wrong)
		s.mu.Unlock()
		all = append(all, st)
	}
	return all
}
