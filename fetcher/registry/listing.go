package registry

import (
	"context"
	crand "crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The protocol has no compare-and-swap for tags. A writer reads the index under a
// fallback tag, adds an entry, and writes the index back. Another writer that has
// read before and writes after removes that entry again. How late that can happen
// depends on the other writer's link, not on one's own latency. Therefore a writer
//
//   - reads the list again after 0.25 s, 0.9 s and 2.5 s (settleTime), and writes
//     its entry again if it is gone. Then the time starts over. It doubles once
//     another writer has been seen;
//   - remembers every entry that it sees, and restores the entries that its own
//     write removed. It keeps reading while its own write is slow, so that it sees
//     what others add in the meantime.
//
// A lost entry is noticed by its owner if the other write lands within settleTime,
// and by the other writer if it lands later. All writers of one process share one
// round of reads and writes for each list. A push without contention takes 2.5 s
// longer.
const settleTime = 2500 * time.Millisecond

// settleChecks are the shares of the settle time at which the list is read, in percent.
var settleChecks = [...]int{10, 36, 100}

// settleLimit is the number of settle times after which the push of a list fails.
const settleLimit = 24

// A listing is an index of referrers in the registry that this process adds to.
type listing struct {
	turn chan struct{} // a token for the push that reads and writes the list
	news chan struct{} // tells that push about a new claim

	mu struct {
		sync.Mutex
		claims []*claim
		refs   int
	}

	// Guarded by turn.
	tag   string
	seen  []json.RawMessage // every entry that was read or written
	wrote bool              // whether it was written since it was last read
	last  string            // the entries that were read last
	stuck int               // writes that changed nothing, in a row
}

// maxStuck is how many writes may change nothing until the registry counts as one that does not
// keep the tag.
const maxStuck = 3

// A claim is an entry that must stay in a list.
type claim struct {
	digest  v1.Hash
	entry   json.RawMessage
	done    chan struct{} // closed when the entry stays, or with err
	err     error
	written time.Time // zero: not yet
	checks  int       // reads that found it since
	settle  time.Duration
}

// listed is an index as it was read.
type listed struct {
	fields  map[string]json.RawMessage // nil if there is none yet
	entries []json.RawMessage
}

func (l listed) descriptors() (list []v1.Descriptor) {
	for _, e := range l.entries {
		if d, ok := parseEntry(e); ok {
			list = append(list, d)
		}
	}
	return list
}

// errNoList: the tag leads to something other than an index.
var errNoList = errors.New("the tag does not lead to an index")

// readListing reads the index under a tag, which is empty if there is none.
func (e *endpoint) readListing(ctx context.Context, tag string) (listed, error) {
	raw, mediaType, err := e.manifest(ctx, tag)
	if errors.Is(err, ErrNotFound) {
		return listed{}, nil
	}
	if err != nil {
		return listed{}, err
	}
	if t, err := manifestType(raw, mediaType); err != nil || !t.IsIndex() {
		return listed{}, fmt.Errorf("tag %s: %w", tag, errNoList)
	}
	var l listed
	if err := json.Unmarshal(raw, &l.fields); err != nil {
		return listed{}, fmt.Errorf("tag %s: %w", tag, errNoList)
	}
	if l.entries, err = indexEntries(raw); err != nil {
		return listed{}, fmt.Errorf("tag %s: %w: %w", tag, errNoList, err)
	}
	return l, nil
}

// addReferrer puts d into the list of the subject's referrers, and returns when it stays there.
func (e *endpoint) addReferrer(ctx context.Context, subject v1.Hash, d v1.Descriptor) error {
	entry, err := json.Marshal(d)
	if err != nil {
		return err
	}
	l := e.listing(subject)
	defer e.leaveListing(subject, l)
	c := &claim{digest: d.Digest, entry: entry, done: make(chan struct{}), settle: e.client.opts.Settle}
	l.mu.Lock()
	l.mu.claims = append(l.mu.claims, c)
	l.mu.Unlock()
	select {
	case l.news <- struct{}{}:
	default:
	}
	defer l.withdraw(c)
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return ctx.Err()
	}
	return e.settle(ctx, subject, l, c)
}

func (e *endpoint) listing(subject v1.Hash) *listing {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.mu.referrers[subject]
	if l == nil {
		l = &listing{turn: make(chan struct{}, 1), news: make(chan struct{}, 1), tag: fallbackTag(subject)}
		if e.mu.referrers == nil {
			e.mu.referrers = make(map[v1.Hash]*listing)
		}
		e.mu.referrers[subject] = l
	}
	l.mu.refs++ // under e.mu
	return l
}

func (e *endpoint) leaveListing(subject v1.Hash, l *listing) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if l.mu.refs--; l.mu.refs == 0 {
		delete(e.mu.referrers, subject)
	}
}

func (l *listing) withdraw(c *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.claims = slices.DeleteFunc(l.mu.claims, func(x *claim) bool { return x == c })
}

func (l *listing) open() []*claim {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.mu.claims)
}

// end ends a claim.
func (l *listing) end(c *claim, err error) {
	l.withdraw(c)
	c.err = err
	close(c.done)
}

// keep remembers entries, and returns how many of them are new.
func (l *listing) keep(entries []json.RawMessage) (fresh int) {
	have := digests(l.seen)
	for _, x := range entries {
		if h := digestIn(x); !have[h] {
			have[h] = true
			l.seen = append(l.seen, x)
			fresh++
		}
	}
	return fresh
}

// digestIn is the digest in an entry, by any algorithm, or else the entry itself.
func digestIn(entry json.RawMessage) string {
	var x struct {
		Digest string `json:"digest"`
	}
	if json.Unmarshal(entry, &x) != nil || x.Digest == "" {
		return string(entry)
	}
	return x.Digest
}

func digests(entries []json.RawMessage) map[string]bool {
	m := make(map[string]bool, len(entries))
	for _, x := range entries {
		m[digestIn(x)] = true
	}
	return m
}

// settle reads and writes the list, for all claims, until own has ended. The next push then goes
// on with the other claims.
func (e *endpoint) settle(ctx context.Context, subject v1.Hash, l *listing, own *claim) error {
	for end := time.Now().Add(settleLimit * e.client.opts.Settle); time.Now().Before(end); {
		select {
		case <-own.done:
			return own.err
		default:
		}
		list, err := e.readForUpdate(ctx, subject, l)
		if err != nil {
			return err
		}
		if stuck := l.note(list); stuck && l.tag == fallbackTag(subject) {
			l.use(ownTag(subject))
			continue
		} else if stuck {
			return errors.New("the registry accepts the list, but does not keep it")
		}
		there := digests(list.entries)
		first := len(l.seen) == 0
		others := l.keep(list.entries) > 0 && !first
		now := time.Now()
		var missing []json.RawMessage
		for _, c := range l.open() {
			switch {
			case !there[c.digest.String()]:
				missing = append(missing, c.entry)
				others = others || !c.written.IsZero()
			case c.written.IsZero():
				l.end(c, nil) // it was listed before
			default:
				for c.checks < len(settleChecks) && now.Sub(c.written) >= c.settle*time.Duration(settleChecks[c.checks])/100 {
					c.checks++
				}
				if c.checks == len(settleChecks) {
					l.end(c, nil)
				}
			}
		}
		// Entries of other writers that thaw's own write has removed.
		for _, x := range l.seen {
			if h := digestIn(x); !there[h] && !slices.ContainsFunc(missing, func(m json.RawMessage) bool { return digestIn(m) == h }) {
				missing = append(missing, x)
			}
		}
		if len(missing) > 0 {
			claims := l.open()
			l.keep(missing)
			wrote, err := e.writeListing(ctx, subject, l, list, missing)
			if err != nil {
				return err
			}
			l.wrote = wrote
			for _, c := range claims {
				if wrote && !there[c.digest.String()] {
					c.written, c.checks = time.Now(), 0
				}
			}
		}
		if others {
			for _, c := range l.open() {
				c.settle = 2 * e.client.opts.Settle
			}
		}
		if err := l.wait(ctx, own); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: other writers keep overwriting it", ErrUnavailable)
}

// note compares a list with the one read before, and says whether several writes in between
// have not changed it.
func (l *listing) note(list listed) (stuck bool) {
	now := fmt.Sprintf("%v %s", list.fields != nil, list.entries)
	if l.wrote && now == l.last {
		l.stuck++
	} else {
		l.stuck = 0
	}
	l.wrote, l.last = false, now
	return l.stuck >= maxStuck
}

// use goes on with another tag.
func (l *listing) use(tag string) {
	l.tag, l.wrote, l.stuck = tag, false, 0
	for _, c := range l.open() {
		c.written, c.checks = time.Time{}, 0
	}
}

// wait waits until a claim must be checked again, for a random time, so that two writers that
// have overwritten each other do not do so again.
func (l *listing) wait(ctx context.Context, own *claim) error {
	next := time.Duration(-1)
	for _, c := range l.open() {
		d := time.Duration(0)
		if !c.written.IsZero() {
			d = time.Until(c.written.Add(c.settle * time.Duration(settleChecks[c.checks]) / 100))
			d += rand.N(c.settle / 25)
		}
		if next < 0 || d < next {
			next = max(d, 0)
		}
	}
	if next < 0 {
		return nil
	}
	t := time.NewTimer(next)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.news:
	case <-own.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// readForUpdate reads the list. If the fallback tag leads to something else, it uses the other
// tag. A tag that may not be read counts as missing, since some registries answer so for a
// missing tag; if it does exist, the entry is not found after the write, and the push fails.
func (e *endpoint) readForUpdate(ctx context.Context, subject v1.Hash, l *listing) (list listed, err error) {
	err = e.client.retry(ctx, func() (err error) {
		list, err = e.readListing(ctx, l.tag)
		return err
	})
	switch {
	case err == nil:
		return list, nil
	case errors.Is(err, errNoList) && l.tag == fallbackTag(subject):
		l.use(ownTag(subject))
		return e.readForUpdate(ctx, subject, l)
	case errors.Is(err, ErrUnauthorized) && !slices.ContainsFunc(l.open(), func(c *claim) bool { return !c.written.IsZero() }):
		return listed{}, nil
	case statusOf(err) == http.StatusInternalServerError && e.failsForAbsent(ctx, l.open()[0].digest):
		return listed{}, nil
	}
	return listed{}, err
}

// failsForAbsent says whether the registry answers 500 for a tag that it does not have: it
// returns a manifest that exists, and answers 500 for a tag that cannot exist.
func (e *endpoint) failsForAbsent(ctx context.Context, known v1.Hash) bool {
	if _, _, err := e.manifest(ctx, known.String()); err != nil {
		return false
	}
	_, _, err := e.manifest(ctx, "absent-"+strings.ToLower(crand.Text()))
	return statusOf(err) == http.StatusInternalServerError
}

// writeListing writes the list with the missing entries. It returns false if the registry refuses
// the tag: the list must then be read under the other one.
func (e *endpoint) writeListing(ctx context.Context, subject v1.Hash, l *listing, list listed, missing []json.RawMessage) (bool, error) {
	entries := append(slices.Clip(list.entries), missing...)
	err := e.putListing(ctx, l, list.fields, entries)
	if s := statusOf(err); s == http.StatusBadRequest || s == http.StatusNotFound {
		// A registry refuses an index that lists manifests it no longer has.
		had := len(entries)
		gone := make(map[string]bool)
		for _, x := range entries {
			if d, ok := parseEntry(x); ok && e.lacks(ctx, d.Digest) {
				gone[d.Digest.String()] = true
			}
		}
		if len(gone) > 0 {
			lost := func(x json.RawMessage) bool { return gone[digestIn(x)] }
			entries, l.seen = slices.DeleteFunc(entries, lost), slices.DeleteFunc(l.seen, lost)
			e.client.log.Info("removing referrers that no longer exist from the list", "subject", subject.String(), "tag", l.tag, "gone", had-len(entries),
				"repository", e.root.Host+"/"+e.path)
			err = e.putListing(ctx, l, list.fields, entries)
		}
	}
	if s := statusOf(err); s >= 400 && s < 500 && !Temporary(err) && l.tag == fallbackTag(subject) && list.fields == nil {
		// The registry does not accept such a tag. If there is a list under it already,
		// one under another tag would not be found.
		l.use(ownTag(subject))
		return false, nil
	}
	return err == nil, err
}

// lacks says whether the registry answers that it has no such manifest.
func (e *endpoint) lacks(ctx context.Context, h v1.Hash) bool {
	for _, method := range []string{http.MethodHead, http.MethodGet} {
		resp, err := e.follow(ctx, request{method: method, url: e.url("manifests", h.String()), push: true, header: map[string]string{"Accept": acceptManifest}})
		if err != nil {
			return false
		}
		resp.Body.Close()
		switch resp.StatusCode {
		case http.StatusNotFound:
			return true
		case http.StatusOK:
			return false
		}
	}
	return false
}

// putListing writes an index. While the write takes long, it reads what others write.
func (e *endpoint) putListing(ctx context.Context, l *listing, fields map[string]json.RawMessage, entries []json.RawMessage) error {
	index := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + types.OCIImageIndex + `"`)}
	for k, v := range fields {
		index[k] = v
	}
	var err error
	if index["manifests"], err = json.Marshal(entries); err != nil {
		return err
	}
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if len(raw) > maxManifest {
		return fmt.Errorf("the list of %d referrers is too long for a manifest", len(entries))
	}
	mediaType, err := manifestType(raw, string(types.OCIImageIndex))
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	var seen struct {
		sync.Mutex
		entries []json.RawMessage
	}
	var reads sync.WaitGroup
	reads.Go(func() {
		every := time.NewTicker(e.client.opts.Settle / 10)
		defer every.Stop()
		rctx, cancel := context.WithTimeout(ctx, 4*e.client.opts.Settle)
		defer cancel()
		slots := make(chan struct{}, 8)
		var wg sync.WaitGroup
		defer wg.Wait()
		for {
			select {
			case <-stop:
				return
			case <-rctx.Done():
				return
			case <-every.C:
			}
			select {
			case slots <- struct{}{}:
			default:
				continue
			}
			wg.Go(func() {
				defer func() { <-slots }()
				if list, err := e.readListing(rctx, l.tag); err == nil {
					seen.Lock()
					seen.entries = append(seen.entries, list.entries...)
					seen.Unlock()
				}
			})
		}
	})
	err = e.client.retry(ctx, func() error {
		_, err := e.put(ctx, l.tag, raw, mediaType)
		return err
	})
	close(stop)
	reads.Wait()
	l.keep(seen.entries)
	return err
}
