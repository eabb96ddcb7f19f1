package registry

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// remote is a repository over HTTP (the OCI distribution spec, 1.1), at the registry and at
// its mirrors.
type remote struct {
	client *Client
	ref    Ref
	origin *endpoint
}

// mirrors are the endpoints at the present mirrors of the registry; with resolve, only at
// those that are trusted to resolve.
func (m *remote) mirrors(resolve bool) (list []*endpoint) {
	for _, x := range (*m.client.mirrors.Load())[m.ref.Registry] {
		if resolve && !x.Resolve {
			continue
		}
		u, err := url.Parse(x.URL)
		if err != nil {
			continue // SetMirrors has checked it
		}
		list = append(list, m.client.endpoint(u, m.ref.Repository, m.ref.Registry))
	}
	return list
}

// first is the endpoint that is asked first for a blob at present.
func (m *remote) first() *endpoint {
	now := time.Now()
	for _, e := range m.mirrors(false) {
		if !e.src.resting(now) {
			return e
		}
	}
	return m.origin
}

// holders are the endpoints that may have what a digest names, in the order in which to ask
// them: mirrors that work, the origin, and then mirrors that rest, in case the origin does
// not answer, but not those that sent wrong bytes. The source named avoid is left out.
func (m *remote) holders(digest v1.Hash, avoid string) []*endpoint {
	return m.order(m.mirrors(false), digest, avoid, nil)
}

// givers are holders for ranges of a blob, without the mirrors that are copying it, unless this
// call is to find out whether one still is.
func (m *remote) givers(digest v1.Hash, avoid string, asks *endpoint) []*endpoint {
	return m.order(m.mirrors(false), digest, avoid, func(e *endpoint, now time.Time) bool { return e == asks || e.claim(digest, now) == 0 })
}

// resolvers are the endpoints that are trusted to answer without a digest: what a tag leads
// to, what refers to an image. These are the origin and the mirrors that are marked so. No
// other mirror is asked, even if the origin does not work.
func (m *remote) resolvers() []*endpoint {
	return m.order(m.mirrors(true), v1.Hash{}, "", nil)
}

func (m *remote) order(mirrors []*endpoint, digest v1.Hash, avoid string, gives func(*endpoint, time.Time) bool) []*endpoint {
	now := time.Now()
	var list, resting []*endpoint
	for _, e := range mirrors {
		switch {
		case e.src.name == avoid && avoid != "":
		case e.src.resting(now):
			if !e.src.distrusted(now) {
				resting = append(resting, e)
			}
		case digest != v1.Hash{} && now.Before(e.state(digest).missing):
		case gives != nil && !gives(e, now):
		default:
			list = append(list, e)
		}
	}
	if m.origin.src.name != avoid || avoid == "" {
		list = append(list, m.origin)
	}
	return append(list, resting...)
}

// An answer is what a source gave, or why it failed.
type answer[T any] struct {
	i     int
	value T
	err   error
}

// race asks sources in order for the same thing until one has it. It asks the next one when
// one fails, and also when one is late, without cancelling that. The first answer wins, and
// the other requests are cancelled. If none has it, the error is the origin's.
//
// drop disposes of an answer that comes too late. The winner's context ends when release is
// called.
func race[T any](ctx context.Context, m *remote, digest v1.Hash, list []*endpoint,
	ask func(context.Context, *endpoint) (T, error), drop func(T)) (value T, release func(), err error) {
	if len(list) == 1 {
		value, err = ask(ctx, list[0])
		if err != nil && ctx.Err() == nil {
			list[0].failed(digest, err)
		}
		return value, func() {}, err
	}
	r := runners[T]{m: m, digest: digest, list: list, ask: ask, answers: make(chan answer[T], len(list)), at: make([]runner, len(list))}
	late := time.NewTimer(time.Hour)
	defer late.Stop()
	next := func() {
		if i, ok := r.start(ctx); ok {
			late.Reset(list[i].lateAfter(digest))
		} else {
			late.Stop()
		}
	}
	defer func() { r.giveUp(drop) }()
	for next(); r.running > 0; {
		select {
		case a := <-r.answers:
			e := list[a.i]
			r.running--
			if a.err == nil {
				if !r.at[a.i].overtaken {
					e.src.inTime()
				}
				release, r.at[a.i].cancel = r.at[a.i].cancel, nil
				return a.value, release, nil
			}
			r.at[a.i].cancel()
			r.at[a.i].cancel = nil
			if err == nil || e == m.origin {
				err = a.err
			}
			if ctx.Err() != nil {
				return value, nil, err
			}
			if r.failed(e, a.err) {
				err = a.err
			}
			if r.done {
				late.Reset(maxLate) // for those that were asked before
			} else {
				next()
			}
		case <-late.C:
			if r.done {
				return value, nil, err
			}
			last := r.last
			if r.at[last].cancel != nil && !r.at[last].overtaken {
				if wait := list[last].src.holdHedge(time.Now(), r.at[last].asked); wait > 0 {
					late.Reset(wait)
					continue
				}
				r.at[last].overtaken = true
				list[last].src.overtaken()
			}
			next()
		}
	}
	if err == nil {
		err = errNoSource
	}
	return value, nil, err
}

// errNoSource: none of the sources may be asked. It does not occur if the origin is one of
// them.
var errNoSource = fmt.Errorf("%w: there is no source to ask", ErrUnavailable)

// runners are the requests of a race.
type runners[T any] struct {
	m       *remote
	digest  v1.Hash
	list    []*endpoint
	ask     func(context.Context, *endpoint) (T, error)
	answers chan answer[T]
	at      []runner

	next, last int  // to ask, and the one asked last
	running    int  // without an answer
	done       bool // an answer leaves nothing to ask the others
}

type runner struct {
	cancel    context.CancelFunc // nil if it does not run
	asked     time.Time
	overtaken bool
}

// start asks the next source that may be asked.
func (r *runners[T]) start(ctx context.Context) (int, bool) {
	for !r.done && r.next < len(r.list) {
		i := r.next
		r.next++
		e := r.list[i]
		// Mirrors behind the origin rest, and are asked all the same.
		origin := slices.Index(r.list, r.m.origin)
		force := origin >= 0 && origin <= i
		entered := e.src.enter(time.Now())
		if !entered && !force {
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		r.at[i].cancel, r.at[i].asked, r.last = cancel, time.Now(), i
		r.running++
		r.m.client.overtaken.Go(func() {
			v, err := r.ask(ctx, e)
			if entered {
				e.src.leave()
			}
			r.answers <- answer[T]{i, v, err}
		})
		return i, true
	}
	return 0, false
}

// failed notes how a source has failed, and says whether this error is the one to return,
// whatever others were before.
func (r *runners[T]) failed(e *endpoint, err error) bool {
	e.failed(r.digest, err)
	if e == r.m.origin {
		// Its permanent answer is final. Mirrors that rest would not know better.
		r.done = !Temporary(err)
		return true
	}
	if e.isCopying(err) {
		r.done = true
		return true
	}
	if errors.Is(err, ErrNotFound) && r.digest != (v1.Hash{}) {
		e.update(r.digest, func(s *blobState) { s.missing = time.Now().Add(restAfterMissing) })
	}
	r.m.client.log.Debug("a mirror has no answer", "mirror", e.src.name, "of", e.src.mirrorOf, "err", err)
	return false
}

// giveUp cancels the requests that still run, and drops their answers.
func (r *runners[T]) giveUp(drop func(T)) {
	for _, x := range r.at {
		if x.cancel != nil {
			x.cancel()
		}
	}
	if n := r.running; n > 0 {
		r.m.client.overtaken.Go(func() {
			for range n {
				if a := <-r.answers; a.err == nil && drop != nil {
					drop(a.value)
				}
			}
		})
	}
}
