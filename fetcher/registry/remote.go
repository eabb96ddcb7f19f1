package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const acceptManifest = string(types.OCIManifestSchema1 + ", " + types.OCIImageIndex + ", " +
	types.DockerManifestSchema2 + ", " + types.DockerManifestList)

// document is a manifest as it was sent.
type document struct {
	raw       []byte
	mediaType string
}

// manifest asks any source by digest, and by tag those that are trusted to resolve.
func (m *remote) manifest(ctx context.Context, ref Ref) ([]byte, string, error) {
	var doc document
	err := m.client.retry(ctx, func() error {
		list := m.resolvers()
		if ref.Digest != (v1.Hash{}) {
			list = m.holders(ref.Digest, "")
		}
		got, release, err := race(ctx, m, ref.Digest, list, func(ctx context.Context, e *endpoint) (document, error) {
			raw, mediaType, err := e.manifest(ctx, ref.key())
			if err == nil && ref.Digest != (v1.Hash{}) && hashOf(raw) != ref.Digest {
				// A mirror may be wrong, and the others right.
				e.src.distrust()
				err = ErrDigest
			}
			return document{raw, mediaType}, err
		}, nil)
		if err == nil {
			release()
		}
		doc = got
		return err
	})
	return doc.raw, doc.mediaType, err
}

func (e *endpoint) manifest(ctx context.Context, key string) ([]byte, string, error) {
	u := e.url("manifests", key)
	raw, h, err := e.fetch(ctx, u, acceptManifest)
	if err != nil {
		return nil, "", err
	}
	if isPage(h) && e.src.mirrorOf != "" {
		return nil, "", fmt.Errorf("GET %s: %w: the answer is a web page, not a manifest", redact(u), ErrUnavailable)
	}
	if d := h.Get("Docker-Content-Digest"); strings.HasPrefix(d, "sha256:") && d != hashOf(raw).String() {
		return nil, "", fmt.Errorf("GET %s: %w: the manifest is %s, the registry says it is %s", redact(u), ErrDigest, hashOf(raw), d)
	}
	return raw, h.Get("Content-Type"), nil
}

// isPage says whether an answer is a web page: some mirrors and proxies answer every request
// with one, to log in for example.
func isPage(h http.Header) bool {
	t, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(t), "text/html")
}

// fetch gets a document of at most maxManifest bytes.
func (e *endpoint) fetch(ctx context.Context, u *url.URL, accept string) ([]byte, http.Header, error) {
	r := request{method: http.MethodGet, url: u, header: map[string]string{"Accept": accept}}
	resp, err := e.follow(ctx, r)
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
	// Few are longer than some kilobytes, and the caller waits for all of it.
	limitBody(resp, 4*e.client.opts.StallTimeout)
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

func (m *remote) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	if whole {
		return m.openFrom(ctx, m.holders(digest, ""), digest, off, n, whole)
	}
	return m.patiently(ctx, func(patient bool) (b *Body, err error) {
		var asks *endpoint
		if patient {
			if asks, err = m.copying(digest, false); err != nil {
				return nil, err
			}
		}
		return m.openFrom(ctx, m.givers(digest, "", asks), digest, off, n, whole)
	})
}

func (m *remote) openFrom(ctx context.Context, list []*endpoint, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	b, release, err := race(ctx, m, digest, list, func(ctx context.Context, e *endpoint) (*Body, error) {
		return e.open(ctx, digest, off, n, whole)
	}, func(b *Body) { b.rc.Close() })
	if err != nil {
		return nil, err
	}
	b.release = release
	return b, nil
}

func (e *endpoint) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	if !whole && !e.src.givesRanges() {
		return e.openAll(ctx, digest, off, n)
	}
	span := ""
	if !whole {
		span = fmt.Sprintf("bytes=%d-%d", off, off+n-1)
	}
	resp, err := e.ask(ctx, digest, span)
	if err != nil {
		return nil, err
	}
	skip, err := e.checkBlob(resp, digest, off, n, whole)
	if errors.Is(err, errWrongRange) {
		resp.Body.Close()
		if whole || e.src.mirrorOf != "" {
			return nil, err // others may do better
		}
		e.src.ignoreRanges(err.Error())
		return e.openAll(ctx, digest, off, n)
	}
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	b, err := e.body(resp, digest, skip, n)
	if err == nil && resp.StatusCode == http.StatusPartialContent {
		b.guessed = resp.Header.Get("Content-Range") == ""
		if e.src.mirrorOf != "" || e.state(digest).pulling.tries > 0 {
			e.gives(digest)
		}
	}
	return b, err
}

// openAll reads a range of a blob from a source whose ranges are wrong: it reads and skips
// the bytes before it.
func (e *endpoint) openAll(ctx context.Context, digest v1.Hash, off, n int64) (*Body, error) {
	resp, err := e.ask(ctx, digest, "")
	if err != nil {
		return nil, err
	}
	skip, err := e.checkBlob(resp, digest, off, n, false)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	return e.body(resp, digest, skip, n)
}

// body returns n bytes of an answer, behind the first skip.
func (e *endpoint) body(resp *http.Response, digest v1.Hash, skip, n int64) (*Body, error) {
	e.remember(digest, resp)
	watched, _ := resp.Body.(*watchedBody)
	if skip > 0 {
		// To the caller the answer has not begun until these are skipped, so the time
		// for all of them is limited.
		limitBody(resp, e.client.opts.StallTimeout+time.Duration(skip/prefixSpeed)*time.Second)
		if _, err := io.CopyN(io.Discard, resp.Body, skip); err != nil {
			resp.Body.Close()
			if err == io.EOF {
				err = fmt.Errorf("the answer has less than %d bytes: %w", skip, ErrTruncated)
			}
			return nil, err
		}
		if watched != nil {
			watched.unlimit()
		}
	}
	return &Body{rc: resp.Body, left: n, e: e, digest: digest, watched: watched}, nil
}

// ask requests a blob, or a range of it, from the location that the registry has redirected
// to before, if any.
func (e *endpoint) ask(ctx context.Context, digest v1.Hash, span string) (*http.Response, error) {
	r := request{method: http.MethodGet, header: map[string]string{"Accept-Encoding": "identity"}}
	if span != "" {
		r.header["Range"] = span
	}
	origin := e.url("blobs", digest.String())
	r.url = origin
	if at := e.located(digest); at != nil {
		r.url, r.located = at, true
	}
	resp, err := e.follow(ctx, r)
	if r.url == origin {
		return resp, err
	}
	status := statusOf(err)
	if err == nil {
		status = resp.StatusCode
	} else if errors.Is(err, ErrUnauthorized) {
		status = http.StatusUnauthorized
	}
	if isExpired(status) {
		if err == nil {
			discard(resp)
		}
		e.forget(digest)
		r.url, r.located = origin, false
		return e.follow(ctx, r)
	}
	return resp, err
}

// remember keeps the location that the registry redirected to for a blob, until it expires.
func (e *endpoint) remember(digest v1.Hash, resp *http.Response) {
	at := resp.Request.URL
	if e.auth == nil || at.Host == e.root.Host && at.Scheme == e.root.Scheme || len(at.String()) > maxLocation {
		return
	}
	if known := e.state(digest).location; known != nil && *known.url == *at {
		return
	}
	l := &location{url: at}
	if life, known := lifeOf(at, clockOf(resp)); known {
		if life <= 0 {
			return // it serves for this answer, or the clocks differ
		}
		l.expires = time.Now().Add(life)
	}
	e.update(digest, func(s *blobState) { s.location = l })
}

// errWrongRange is an answer to a range request with other bytes, or without saying which.
var errWrongRange = fmt.Errorf("%w: the range in the answer is not the one asked for", ErrUnavailable)

// checkBlob checks the header of an answer with a blob. It returns how many bytes come
// before those that were asked for.
//
// A registry has no substitute, so its answers are used where the bytes can be right: the
// digest will tell. A mirror has one, the registry, so its answer to a range request must have
// the status 206 and exactly the range that was asked for. Caches and peer-to-peer proxies
// have sent a part with 200, other parts, and the beginning of the blob in the place of each
// part; some lose bytes without an error.
func (e *endpoint) checkBlob(resp *http.Response, digest v1.Hash, off, n int64, whole bool) (skip int64, err error) {
	where := func() string { return "GET " + redact(resp.Request.URL) }
	status, mirror := resp.StatusCode, e.src.mirrorOf != ""
	if status != http.StatusOK && status != http.StatusPartialContent {
		return 0, e.refusal(resp)
	}
	if mirror {
		if isPage(resp.Header) {
			return 0, fmt.Errorf("%s: %w: the answer is a web page, not the blob", where(), ErrUnavailable)
		}
		// The label of a registry may be wrong, since the digest is of the bytes as they come.
		if s := encodingOf(resp.Header); s != "" {
			return 0, fmt.Errorf("%s: %w: the answer has the encoding %.40q, which thaw did not ask for", where(), ErrUnavailable, s)
		}
	}
	span := resp.Header.Get("Content-Range")
	switch {
	case status == http.StatusPartialContent && whole:
		return 0, fmt.Errorf("%s: the answer is a part of the blob, not all of it", where())
	case status == http.StatusPartialContent:
		if span == "" && resp.ContentLength == n && !mirror {
			return 0, nil // as many as were asked for: the digest will tell
		}
		return e.checkRange(resp, span, digest, off, n)
	case span != "":
		// Is it the range or the blob? The status and the header contradict each other.
		first, last, _, err := parseContentRange(span)
		if !whole || err != nil || first != 0 || last != n-1 {
			return 0, fmt.Errorf("%s: %w: the status is 200, but there is a Content-Range, %.80q", where(), errWrongRange, span)
		}
	}
	l := resp.ContentLength
	switch {
	case whole:
		if l >= 0 && l != n {
			return 0, fmt.Errorf("%s: the blob has %d bytes, its descriptor says %d", where(), l, n)
		}
		return 0, nil
	case l >= 0 && l < off+n:
		return 0, fmt.Errorf("%s: the blob has %d bytes, asked for those up to byte %d", where(), l, off+n)
	case off == 0 && l == n, l >= 0 && l <= smallBlob:
		return off, nil
	case mirror || isCache(resp.Header) && e.src.patience(time.Now()) > 0:
		return 0, e.whole(digest, resp)
	}
	if e.src.ignoresRange.CompareAndSwap(false, true) {
		e.client.log.Warn("the server ignores range requests, which makes reads slow", "source", e.src.name, "url", redact(resp.Request.URL))
	}
	return off, nil
}

// refusal makes an error of an answer without a blob.
func (e *endpoint) refusal(resp *http.Response) error {
	err := badStatus(resp)
	switch x, ok := errors.AsType[*httpError](err); {
	case !ok:
	case e.src.mirrorOf == "":
		x.after = min(x.after, maxBlobWait)
	case x.status == http.StatusRequestedRangeNotSatisfiable:
		// It has something else under this digest, a beginning perhaps.
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// checkRange checks the Content-Range of a part of a blob.
func (e *endpoint) checkRange(resp *http.Response, span string, digest v1.Hash, off, n int64) (skip int64, err error) {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("GET %s: %w: %w", redact(resp.Request.URL), errWrongRange, fmt.Errorf(format, args...))
	}
	first, last, size, err := parseContentRange(span)
	switch {
	case err != nil:
		return 0, wrong("%w", err)
	case first > off || last < off+n-1,
		e.src.mirrorOf != "" && (first != off || last != off+n-1): // a registry may round ranges up
		return 0, wrong("asked for bytes %d-%d, got %d-%d", off, off+n-1, first, last)
	case resp.ContentLength >= 0 && resp.ContentLength != last-first+1:
		return 0, wrong("bytes %d-%d, but %d of them", first, last, resp.ContentLength)
	}
	if e.src.mirrorOf != "" {
		if err := e.checkSize(digest, size); err != nil {
			return 0, wrong("%w", err)
		}
	}
	return off - first, nil
}

// checkSize compares the size of a blob, -1 if not known, with what the mirror said before.
func (e *endpoint) checkSize(digest v1.Hash, size int64) error {
	if size < 0 {
		return nil
	}
	known := e.state(digest).size
	if known == size {
		return nil
	}
	e.update(digest, func(s *blobState) { s.size = size })
	if known != 0 {
		return fmt.Errorf("the blob has %d bytes, and %d in an earlier answer", size, known)
	}
	return nil
}

// encodingOf is the encoding of an answer, empty for none.
func encodingOf(h http.Header) string {
	s := strings.Join(h.Values("Content-Encoding"), ",")
	if strings.EqualFold(strings.TrimSpace(s), "identity") {
		return ""
	}
	return s
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

// stat asks the registry itself: a mirror may have a blob that the registry has not.
func (m *remote) stat(ctx context.Context, digest v1.Hash) (size int64, err error) {
	err = m.client.retry(ctx, func() error {
		size, err = m.origin.stat(ctx, digest, false)
		return err
	})
	return size, err
}

// stat returns the size of a blob, -1 if the registry does not say. It asks by HEAD. Some
// registries refuse that, or redirect to a URL that is signed for GET only, or give a length
// of 0 or none; then it asks for the first byte by GET, and Content-Range has the size.
func (e *endpoint) stat(ctx context.Context, digest v1.Hash, push bool) (int64, error) {
	u := e.url("blobs", digest.String())
	resp, refused := e.follow(ctx, request{method: http.MethodHead, url: u, push: push})
	if refused == nil {
		defer resp.Body.Close()
		switch {
		case resp.StatusCode == http.StatusOK && resp.ContentLength > 0:
			return resp.ContentLength, nil
		case resp.StatusCode/100 != 2:
			refused = badStatus(resp)
		}
	}
	// The registry's own 404, or a request to wait, is believed.
	if ctx.Err() != nil || RetryAfter(refused) > 0 || errors.Is(refused, ErrNotFound) && resp != nil && resp.Request.URL.Host == u.Host {
		return 0, refused
	}
	size, err := e.sizeByGet(ctx, digest, push)
	if refused != nil && (errors.Is(err, errPage) || errors.Is(err, ErrUnauthorized)) {
		err = refused
	}
	return size, err
}

// errPage is a web page where a blob should be.
var errPage = errors.New("the answer is a web page, not the blob")

// sizeByGet finds the size of a blob by asking for its first byte.
func (e *endpoint) sizeByGet(ctx context.Context, digest v1.Hash, push bool) (int64, error) {
	u := e.url("blobs", digest.String())
	resp, err := e.follow(ctx, request{method: http.MethodGet, url: u, push: push,
		header: map[string]string{"Accept-Encoding": "identity", "Range": "bytes=0-0"}})
	if err != nil {
		return 0, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		resp.Body.Close() // the rest would be the whole blob
		if isPage(resp.Header) {
			return 0, fmt.Errorf("GET %s: %w", redact(u), errPage)
		}
		return resp.ContentLength, nil
	case http.StatusPartialContent:
		discard(resp)
		_, _, size, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil {
			size = -1
		}
		return size, nil
	case http.StatusRequestedRangeNotSatisfiable:
		discard(resp)
		return 0, nil // it is empty
	}
	return 0, badStatus(resp)
}
