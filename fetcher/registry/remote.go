package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// remote is a repository over HTTP (the OCI distribution spec, 1.1).
type remote struct {
	client    *Client
	name      string
	endpoints []*endpoint // the mirrors, and then the origin
	origin    *endpoint
}

const acceptManifest = string(types.OCIManifestSchema1 + ", " + types.OCIImageIndex + ", " +
	types.DockerManifestSchema2 + ", " + types.DockerManifestList)

// try asks the mirrors that are well, then the origin, and only if that has
// no answer the mirrors that are not. It gives the origin's error.
func (m *remote) try(ctx context.Context, digest v1.Hash, ask func(*endpoint) error) error {
	now := time.Now()
	var resting []*endpoint
	for _, e := range m.endpoints {
		if e != m.origin && e.src.resting(now) {
			resting = append(resting, e)
			continue
		}
		if e != m.origin && now.Before(e.state(digest).missing) {
			continue
		}
		err := ask(e)
		if err == nil || ctx.Err() != nil {
			return err
		}
		e.failed(digest, err)
		if e == m.origin {
			if Temporary(err) {
				for _, e := range resting {
					if e.src.distrusted(now) || ask(e) != nil {
						continue
					}
					return nil
				}
			}
			return err
		}
		if errors.Is(err, ErrNotFound) && digest != (v1.Hash{}) {
			e.setState(digest, blobState{missing: now.Add(restAfterMissing)})
		}
		m.client.log.Debug("mirror has no answer", "mirror", e.src.name, "of", e.src.mirrorOf, "error", err)
	}
	panic("unreachable: the origin is the last endpoint")
}

func (m *remote) manifest(ctx context.Context, ref Ref) (raw []byte, mediaType string, err error) {
	err = m.client.retry(ctx, func() error {
		return m.try(ctx, ref.Digest, func(e *endpoint) error {
			raw, mediaType, err = e.manifest(ctx, ref.key())
			if err == nil && ref.Digest != (v1.Hash{}) && hashOf(raw) != ref.Digest {
				// A mirror's fault is not the end of it.
				e.src.distrust()
				return ErrDigest
			}
			return err
		})
	})
	return raw, mediaType, err
}

func (e *endpoint) manifest(ctx context.Context, key string) ([]byte, string, error) {
	u := e.url("manifests", key)
	raw, h, err := e.fetch(ctx, u, acceptManifest)
	if err != nil {
		return nil, "", err
	}
	if d := h.Get("Docker-Content-Digest"); strings.HasPrefix(d, "sha256:") && d != hashOf(raw).String() {
		return nil, "", fmt.Errorf("GET %s: %w: the manifest is %s, the registry says it is %s", redact(u), ErrDigest, hashOf(raw), d)
	}
	return raw, h.Get("Content-Type"), nil
}

// fetch gets a document of at most maxManifest bytes.
func (e *endpoint) fetch(ctx context.Context, u *url.URL, accept string) ([]byte, http.Header, error) {
	r := request{method: http.MethodGet, url: u, header: map[string]string{"Accept": accept}}
	resp, err := e.get(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, badStatus(resp)
	}
	if resp.ContentLength > maxManifest {
		return nil, nil, fmt.Errorf("GET %s: %d bytes are too many for a manifest", redact(u), resp.ContentLength)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return nil, nil, err
	}
	if len(b) > maxManifest {
		return nil, nil, fmt.Errorf("GET %s: more than %d bytes are too many for a manifest", redact(u), maxManifest)
	}
	e.src.succeeded()
	return b, resp.Header, nil
}

func (m *remote) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (b *Body, err error) {
	err = m.try(ctx, digest, func(e *endpoint) error {
		b, err = e.open(ctx, digest, off, n, whole)
		return err
	})
	return b, err
}

func (e *endpoint) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	span := ""
	if !whole {
		span = fmt.Sprintf("bytes=%d-%d", off, off+n-1)
	}
	resp, err := e.ask(ctx, digest, span)
	if err != nil {
		return nil, err
	}
	if err := e.checkBlob(resp, off, n, whole); err != nil {
		resp.Body.Close()
		return nil, err
	}
	e.remember(digest, resp)
	if resp.StatusCode == http.StatusOK && off > 0 {
		// Right, if slow: the server begins at the beginning.
		if _, err := io.CopyN(io.Discard, resp.Body, off); err != nil {
			resp.Body.Close()
			if err == io.EOF {
				err = fmt.Errorf("the blob has less than %d bytes: %w", off, ErrTruncated)
			}
			return nil, err
		}
	}
	return &Body{rc: resp.Body, left: n, e: e, digest: digest}, nil
}

// ask requests a blob, or what a Range header says of it, where the registry
// has redirected to before if it has.
func (e *endpoint) ask(ctx context.Context, digest v1.Hash, span string) (*http.Response, error) {
	r := request{method: http.MethodGet, header: map[string]string{"Accept-Encoding": "identity"}}
	if span != "" {
		r.header["Range"] = span
	}
	origin := e.url("blobs", digest.String())
	r.url = origin
	if at := e.state(digest).location; at != nil {
		r.url = at
	}
	resp, err := e.get(ctx, r)
	if err != nil || r.url == origin {
		return resp, err
	}
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusGone:
		// The signature of the remembered location has expired.
		resp.Body.Close()
		e.setState(digest, blobState{})
		r.url = origin
		return e.get(ctx, r)
	}
	return resp, nil
}

// remember keeps where a blob came from, if not from the registry itself.
func (e *endpoint) remember(digest v1.Hash, resp *http.Response) {
	if at := resp.Request.URL; at.Host != e.root.Host || at.Scheme != e.root.Scheme {
		if known := e.state(digest).location; known == nil || *known != *at {
			e.setState(digest, blobState{location: at})
		}
	}
}

// checkBlob looks at what is known of a blob's answer before its body.
func (e *endpoint) checkBlob(resp *http.Response, off, n int64, whole bool) error {
	where := func() string { return "GET " + redact(resp.Request.URL) }
	if c := resp.Header.Get("Content-Encoding"); c != "" && c != "identity" {
		return fmt.Errorf("%s: the blob is sent encoded as %q, which nobody asked for", where(), c)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		if whole {
			if l := resp.ContentLength; l >= 0 && l != n {
				return fmt.Errorf("%s: the blob has %d bytes, its descriptor says %d", where(), l, n)
			}
			return nil
		}
		if l := resp.ContentLength; l >= 0 && l < off+n {
			return fmt.Errorf("%s: the blob has %d bytes, those up to %d were asked for", where(), l, off+n)
		}
		if e.src.ignoresRange.CompareAndSwap(false, true) {
			e.client.log.Warn("server ignores range requests, which makes reads slow", "source", e.src.name, "url", redact(resp.Request.URL))
		}
		return nil
	case http.StatusPartialContent:
		if whole {
			return fmt.Errorf("%s: a part of the blob comes instead of all of it", where())
		}
		first, last, _, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			return fmt.Errorf("%s: %w: %w", where(), ErrUnavailable, err)
		}
		if first != off || last > off+n-1 {
			return fmt.Errorf("%s: %w: bytes %d-%d were asked for, %d-%d come", where(), ErrUnavailable, off, off+n-1, first, last)
		}
		if last < off+n-1 {
			return fmt.Errorf("%s: bytes %d-%d were asked for, %d-%d come: %w", where(), off, off+n-1, first, last, ErrTruncated)
		}
		return nil
	}
	return badStatus(resp)
}

// parseContentRange reads "bytes FIRST-LAST/SIZE" (RFC 9110, 14.4); size is -1
// for "*".
func parseContentRange(s string) (first, last, size int64, err error) {
	bad := fmt.Errorf("the Content-Range %q cannot be read", s)
	unit, rest, ok := strings.Cut(s, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return 0, 0, 0, bad
	}
	span, total, ok1 := strings.Cut(rest, "/")
	from, to, ok2 := strings.Cut(span, "-")
	if !ok1 || !ok2 {
		return 0, 0, 0, bad
	}
	var nums [3]int64
	for i, v := range []string{from, to, total} {
		if i == 2 && v == "*" {
			nums[i] = -1
			continue
		}
		u, err := strconv.ParseUint(v, 10, 63)
		if err != nil {
			return 0, 0, 0, bad
		}
		nums[i] = int64(u)
	}
	if nums[0] > nums[1] || nums[2] >= 0 && nums[1] >= nums[2] {
		return 0, 0, 0, bad
	}
	return nums[0], nums[1], nums[2], nil
}

func (m *remote) stat(ctx context.Context, digest v1.Hash) (size int64, err error) {
	err = m.client.retry(ctx, func() error {
		return m.try(ctx, digest, func(e *endpoint) error {
			size, err = e.stat(ctx, digest, false)
			return err
		})
	})
	return size, err
}

// stat is the size of a blob, -1 if the registry does not say.
func (e *endpoint) stat(ctx context.Context, digest v1.Hash, push bool) (int64, error) {
	resp, err := e.get(ctx, request{method: http.MethodHead, url: e.url("blobs", digest.String()), push: push})
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, badStatus(resp)
	}
	return resp.ContentLength, nil
}

// referrers asks each source in turn. A mirror that knows of none is not
// believed: it may be older than they are, or not know the API.
func (m *remote) referrers(ctx context.Context, subject v1.Descriptor, artifactTypes []string) (found []v1.Descriptor, err error) {
	err = m.client.retry(ctx, func() error {
		return m.try(ctx, v1.Hash{}, func(e *endpoint) error {
			found, err = e.referrers(ctx, subject.Digest)
			if err == nil && e != m.origin && !slices.ContainsFunc(found, func(d v1.Descriptor) bool {
				return len(artifactTypes) == 0 || slices.Contains(artifactTypes, d.ArtifactType) || untyped(d)
			}) {
				return ErrNotFound
			}
			return err
		})
	})
	return found, err
}

// maxPages of a list of referrers.
const maxPages = 64

// referrers gives them all, of whatever type: not every registry filters as
// the spec says. Unless the registry is known to have the API, the fallback tag
// is asked for at the same time: a start waits for the answer.
func (e *endpoint) referrers(ctx context.Context, subject v1.Hash) (found []v1.Descriptor, err error) {
	if e.src.listsReferrers.Load() {
		if found, err = e.listReferrers(ctx, subject); errors.Is(err, errNoReferrersAPI) {
			found, _, err = e.fallback(ctx, subject)
		}
		return found, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var tagged []v1.Descriptor
	var tagErr error
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { tagged, _, tagErr = e.fallback(ctx, subject) })
	if found, err = e.listReferrers(ctx, subject); !errors.Is(err, errNoReferrersAPI) {
		e.src.listsReferrers.Store(err == nil)
		return found, err
	}
	wg.Wait()
	return tagged, tagErr
}

var errNoReferrersAPI = errors.New("the registry has no referrers API")

// listReferrers asks the referrers API.
func (e *endpoint) listReferrers(ctx context.Context, subject v1.Hash) ([]v1.Descriptor, error) {
	u := e.url("referrers", subject.String())
	var all []v1.Descriptor
	for page := 0; page < maxPages; page++ {
		raw, h, err := e.fetch(ctx, u, string(types.OCIImageIndex))
		switch statusOf(err) {
		case http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable,
			http.StatusNotImplemented:
			if page == 0 {
				return nil, errNoReferrersAPI
			}
		}
		if err != nil {
			return nil, err
		}
		// Some answer everything with a page for browsers.
		if t, _, _ := strings.Cut(h.Get("Content-Type"), ";"); page == 0 && strings.TrimSpace(t) != string(types.OCIImageIndex) {
			return nil, errNoReferrersAPI
		}
		var index v1.IndexManifest
		if err := json.Unmarshal(raw, &index); err != nil {
			return nil, fmt.Errorf("GET %s: parse index: %w", redact(u), err)
		}
		all = append(all, index.Manifests...)
		next := nextPage(h.Values("Link"))
		if next == "" {
			return all, nil
		}
		n, err := u.Parse(next)
		if err != nil || n.Host != u.Host || n.Scheme != u.Scheme {
			return nil, fmt.Errorf("GET %s: the link to the next page leads elsewhere", redact(u))
		}
		u = n
	}
	return nil, fmt.Errorf("GET %s: there are more than %d pages", redact(u), maxPages)
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

// fallbackTag is the tag of the index that lists the referrers where there is
// no API (distribution spec, "Referrers Tag Schema").
func fallbackTag(subject v1.Hash) string { return subject.Algorithm + "-" + subject.Hex }

// fallback gives the manifests in that index, and its bytes, nil if there is
// none yet.
func (e *endpoint) fallback(ctx context.Context, subject v1.Hash) ([]v1.Descriptor, []byte, error) {
	raw, mediaType, err := e.manifest(ctx, fallbackTag(subject))
	if errors.Is(err, ErrNotFound) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	t, err := manifestType(raw, mediaType)
	if err == nil && !t.IsIndex() {
		err = fmt.Errorf("the tag %s is not of an index", fallbackTag(subject))
	}
	var index v1.IndexManifest
	if err == nil {
		err = json.Unmarshal(raw, &index)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("referrers of %s: %w", subject, err)
	}
	return index.Manifests, raw, nil
}
