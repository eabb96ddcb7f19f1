package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Referrers returns the manifests with this subject, with their annotations; if artifact types
// are given, only those of the types. It asks the referrers API and the fallback tag, of the
// registry or of a mirror that is trusted to resolve.
//
// An entry of such a list is only a claim of anybody who may push there: the manifest itself
// says what it is and what its subject is.
func (r *Repo) Referrers(ctx context.Context, subject v1.Descriptor, artifactTypes ...string) ([]v1.Descriptor, error) {
	fail := func(err error) ([]v1.Descriptor, error) {
		return nil, fmt.Errorf("find referrers of %s in %s: %w", subject.Digest, r, err)
	}
	all, err := r.finder.referrers(ctx, subject, artifactTypes)
	if err != nil {
		return fail(err)
	}
	seen := make(map[v1.Hash]bool)
	all = slices.DeleteFunc(all, func(d v1.Descriptor) bool {
		again := d.Digest.Algorithm != "sha256" || seen[d.Digest]
		seen[d.Digest] = true
		return again
	})
	if len(artifactTypes) == 0 {
		return all, nil
	}
	lookErr := r.look(ctx, subject, all)
	if ctx.Err() != nil {
		return fail(lookErr)
	}
	found := slices.DeleteFunc(all, func(d v1.Descriptor) bool { return !slices.Contains(artifactTypes, d.ArtifactType) })
	// A manifest that cannot be read does not hide the others. Without others, the result
	// is not known.
	if len(found) == 0 && Temporary(lookErr) {
		return fail(lookErr)
	}
	return found, nil
}

// untyped says whether an entry of a list lacks its artifact type: some registries leave it
// out, and some give the type of the config, as drafts of the spec did.
func untyped(d v1.Descriptor) bool {
	return d.ArtifactType == "" || d.ArtifactType == string(types.OCIEmptyJSON) || d.ArtifactType == string(types.DockerConfigJSON) ||
		strings.Contains(d.ArtifactType, ".config.")
}

// Limits of the manifests that are read to find their types: in all, and at once.
const maxLooks, looksAtOnce = 64, 8

// look completes the entries of a list that lack their types, from their manifests. An entry
// with another subject loses its type. The error is that of the last manifest that could not be
// read.
func (r *Repo) look(ctx context.Context, subject v1.Descriptor, list []v1.Descriptor) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	slots := make(chan struct{}, looksAtOnce)
	looks := 0
	for i, d := range list {
		if !untyped(d) {
			continue
		}
		if looks++; looks > maxLooks {
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			raw, err := r.Manifest(ctx, d)
			if err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
				return
			}
			s, full, err := asReferrer(raw, d)
			switch {
			case err != nil || s == nil:
			case s.Digest != subject.Digest:
				list[i].ArtifactType = ""
			default:
				list[i] = full
			}
		})
	}
	wg.Wait()
	return failed
}

// referrers asks the origin and the mirrors that are trusted to resolve. If a mirror lists none,
// the next source is asked: the mirror may be out of date, or not support the API.
func (m *remote) referrers(ctx context.Context, subject v1.Descriptor, artifactTypes []string) (found []v1.Descriptor, err error) {
	err = m.client.retry(ctx, func() error {
		list, release, err := race(ctx, m, v1.Hash{}, m.resolvers(), func(ctx context.Context, e *endpoint) ([]v1.Descriptor, error) {
			list, err := e.referrers(ctx, subject.Digest)
			if err == nil && e != m.origin && !slices.ContainsFunc(list, func(d v1.Descriptor) bool {
				return len(artifactTypes) == 0 || slices.Contains(artifactTypes, d.ArtifactType) || untyped(d)
			}) {
				return nil, ErrNotFound
			}
			return list, err
		}, nil)
		if err == nil {
			release()
		}
		found = list
		return err
	})
	if errors.Is(err, errAPIDown) && ctx.Err() == nil {
		// The tag has answered, and leads to no list.
		m.client.log.Warn("the registry's referrers API fails; using only the fallback tag", "repository", m.ref.Place(), "subject", subject.Digest.String(), "err", err)
		return nil, nil
	}
	return found, err
}

const (
	// maxPages and maxPageBytes bound a list of referrers, which is in memory as a whole.
	maxPages, maxPageBytes = 64, 4 * maxManifest
	// tagWait is how long to wait for the fallback tag when the API has returned a list.
	tagWait = 2 * time.Second
)

// referrers returns all referrers, of any type: not every registry filters as the spec says. It
// asks the API and the tags at the same time, since a start waits for the answer, and adds up
// the answers: an API may not know what is listed under a tag. If one answer is unusable, the
// others count.
func (e *endpoint) referrers(ctx context.Context, subject v1.Hash) ([]v1.Descriptor, error) {
	tctx, cancel := context.WithCancel(ctx)
	tags := [...]string{fallbackTag(subject), ownTag(subject)}
	var tagged [len(tags)][]v1.Descriptor
	var tagErrs [len(tags)]error
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i, tag := range tags {
		if i > 0 && e.src.listsReferrers.Load() {
			break // thaw has never put a list there
		}
		wg.Go(func() {
			list, err := e.readListing(tctx, tag)
			tagged[i], tagErrs[i] = list.descriptors(), err
		})
	}
	listed, apiErr := e.listReferrers(ctx, subject)
	if len(listed) > 0 {
		e.src.listsReferrers.Store(true)
		t := time.AfterFunc(tagWait, cancel)
		defer t.Stop()
	}
	wg.Wait()
	if apiErr != nil && statusOf(tagErrs[0]) == http.StatusInternalServerError && e.failsForAbsent(ctx, subject) {
		tagErrs[0] = nil
	}
	all := append(append(listed, tagged[0]...), tagged[1]...)
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(apiErr, ctx.Err())
	case apiErr == nil, len(all) > 0:
		return all, nil
	case tagErrs[0] != nil && Temporary(tagErrs[0]):
		return nil, tagErrs[0]
	case Temporary(apiErr):
		// It may have referrers, and answer later.
		return nil, fmt.Errorf("%w: %w", errAPIDown, apiErr)
	case tagErrs[0] != nil:
		// Neither has a list. Some registries refuse access to what they do not have;
		// access to the subject was allowed.
		e.client.warnOnce("referrers "+e.root.Host+"/"+e.path, "the registry does not list referrers",
			"repository", e.root.Host+"/"+e.path, "err", errors.Join(apiErr, tagErrs[0]))
	}
	return nil, nil
}

// errAPIDown: the referrers API fails and may work later, and the fallback tag leads to no list.
var errAPIDown = errors.New("the referrers API has no answer")

// listReferrers asks the referrers API. If a later page cannot be read, it returns the pages
// before that with the error.
func (e *endpoint) listReferrers(ctx context.Context, subject v1.Hash) ([]v1.Descriptor, error) {
	u := e.url("referrers", subject.String())
	var all []v1.Descriptor
	read := 0
	for page := 0; page < maxPages; page++ {
		raw, h, err := e.fetch(ctx, u, string(types.OCIImageIndex))
		var list []v1.Descriptor
		if err == nil {
			// Its Content-Type does not tell whether this is a list: some send
			// application/json, and some a web page.
			if list, err = parseIndex(raw); err != nil {
				err = fmt.Errorf("GET %s: %w", redact(u), err)
			}
		}
		if err != nil {
			return all, err
		}
		all = append(all, list...)
		if read += len(raw); read > maxPageBytes {
			return all, fmt.Errorf("GET %s: the pages so far have more than %d bytes", redact(u), maxPageBytes)
		}
		next := nextPage(h.Values("Link"))
		if next == "" {
			return all, nil
		}
		n, err := u.Parse(next)
		if err != nil || n.Host != u.Host || n.Scheme != u.Scheme {
			return all, fmt.Errorf("GET %s: the link to the next page leads elsewhere", redact(u))
		}
		u = n
	}
	return all, fmt.Errorf("GET %s: there are more than %d pages", redact(u), maxPages)
}

// nextPage reads Link: <URL>; rel="next" (RFC 8288).
func nextPage(links []string) string {
	for _, l := range links {
		for part := range strings.SplitSeq(l, ",") {
			target, params, _ := strings.Cut(part, ";")
			target = strings.TrimSpace(target)
			params = strings.NewReplacer(`"`, "", " ", "").Replace(strings.ToLower(params))
			if strings.HasPrefix(target, "<") && strings.HasSuffix(target, ">") && slices.Contains(strings.Split(params, ";"), "rel=next") {
				return target[1 : len(target)-1]
			}
		}
	}
	return ""
}

// fallbackTag is the tag of the index that lists the referrers of a subject if there is no API
// (distribution spec, "Referrers Tag Schema").
func fallbackTag(subject v1.Hash) string { return subject.Algorithm + "-" + subject.Hex }

// ownTag is the tag of that index for registries that support neither: some take the fallback
// tag for the digest and return the image, and some refuse it.
func ownTag(subject v1.Hash) string { return "referrers-" + fallbackTag(subject) }
