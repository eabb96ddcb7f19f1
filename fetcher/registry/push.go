package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// blob is where the bytes of a blob to push are: in a file or in memory.
type blob struct {
	path string // empty: data
	data []byte
}

func (b blob) open(size int64) (io.ReadCloser, error) {
	if b.path == "" {
		return io.NopCloser(bytes.NewReader(b.data)), nil
	}
	f, has, err := openRegular(b.path)
	if err == nil && has != size {
		f.Close()
		err = fmt.Errorf("%s has %d bytes, its descriptor says %d", b.path, has, size)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// PushBlob brings the file at path to r as the blob that d describes. It says
// whether it had to: a blob that is there already is not sent again.
// progress, if not nil, is called with the bytes sent so far, from another
// goroutine than the caller's; a new attempt begins at zero again.
//
// A layout takes the file over by a link if it can: nobody may write to it
// afterwards, though its name may be removed.
func (r *Repo) PushBlob(ctx context.Context, d v1.Descriptor, path string, progress func(sent int64)) (bool, error) {
	return r.pushBlob(ctx, d, blob{path: path}, progress)
}

// PushBytes brings data to r as a blob, and gives its descriptor.
func (r *Repo) PushBytes(ctx context.Context, data []byte, mediaType types.MediaType) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Size: int64(len(data)), Digest: hashOf(data)}
	_, err := r.pushBlob(ctx, d, blob{data: data}, nil)
	return d, err
}

func (r *Repo) pushBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) (bool, error) {
	fail := func(err error) error { return fmt.Errorf("push blob %s to %s: %w", d.Digest, r, err) }
	if r.target == nil {
		return false, fail(errReadOnly)
	}
	if d.Digest.Algorithm != "sha256" || d.Size < 0 {
		return false, fail(errors.New("its descriptor has no digest and size"))
	}
	has, err := r.target.has(ctx, d)
	if err != nil {
		return false, fail(err)
	}
	if has {
		return false, nil
	}
	if err := r.target.putBlob(ctx, d, b, progress); err != nil {
		return false, fail(err)
	}
	return true, nil
}

var errReadOnly = errors.New("an archive can only be read: push to a registry or to oci:DIR")

// PushManifest brings a manifest to r, under a tag if that is not empty, and
// gives its descriptor. What it refers to must be there. If it has a subject,
// Referrers finds it when PushManifest has returned.
func (r *Repo) PushManifest(ctx context.Context, raw []byte, mediaType types.MediaType, tag string) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Size: int64(len(raw)), Digest: hashOf(raw)}
	name := r.Place(tag, d.Digest)
	fail := func(err error) (v1.Descriptor, error) {
		return v1.Descriptor{}, fmt.Errorf("push manifest to %s: %w", name, err)
	}
	if r.target == nil {
		return fail(errReadOnly)
	}
	if len(raw) > maxManifest {
		return fail(fmt.Errorf("%d bytes are too many for a manifest", len(raw)))
	}
	if t, err := manifestType(raw, string(mediaType)); err != nil {
		return fail(err)
	} else if t != mediaType {
		return fail(fmt.Errorf("it says that it is a %s", t))
	}
	if tag != "" && (r.ref.Layout == "" && !reTag.MatchString(tag) || !reRefName.MatchString(tag)) {
		return fail(fmt.Errorf("%q is not a tag", tag))
	}
	subject, listed, err := asReferrer(raw, d)
	if err != nil {
		return fail(err)
	}
	if err := r.target.putManifest(ctx, listed, raw, tag, subject); err != nil {
		return fail(err)
	}
	return d, nil
}

// Place is r's place and there tag, or else digest.
func (r *Repo) Place(tag string, digest v1.Hash) Ref {
	if tag == "" {
		return r.ref.WithDigest(digest)
	}
	return r.ref.WithTag(tag)
}

// asReferrer gives a manifest's subject, and d with what a list of referrers
// says of a manifest.
func asReferrer(raw []byte, d v1.Descriptor) (*v1.Descriptor, v1.Descriptor, error) {
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, d, fmt.Errorf("parse manifest: %w", err)
	}
	if m.Subject == nil {
		return nil, d, nil
	}
	if m.Subject.Digest.Algorithm != "sha256" {
		return nil, d, errors.New("its subject has no digest")
	}
	d.ArtifactType, d.Annotations = artifactType(&m), m.Annotations
	return m.Subject, d, nil
}

// CheckPush finds out whether r can be pushed to, at the cost of an upload
// that is begun and given up.
func (r *Repo) CheckPush(ctx context.Context) error {
	var err error
	switch t := r.target.(type) {
	case nil:
		err = errReadOnly
	case *remote:
		err = t.client.retry(ctx, func() error { return t.origin.checkPush(ctx) })
	case *layout:
		err = t.create()
	}
	if err != nil {
		return fmt.Errorf("check that %s can be pushed to: %w", r, err)
	}
	return nil
}

func (e *endpoint) checkPush(ctx context.Context) error {
	at, err := e.begin(ctx)
	if err != nil {
		return err
	}
	// Not all allow this; they clean up by themselves.
	if resp, err := e.do(ctx, request{method: http.MethodDelete, url: at, push: true}); err == nil {
		resp.Body.Close()
	}
	return nil
}

func (m *remote) has(ctx context.Context, d v1.Descriptor) (has bool, err error) {
	err = m.client.retry(ctx, func() error {
		size, err := m.origin.stat(ctx, d.Digest, true)
		has = err == nil
		switch {
		case errors.Is(err, ErrNotFound):
			return nil
		case err == nil && size >= 0 && size != d.Size:
			return fmt.Errorf("the registry has %d bytes under this digest, its descriptor says %d", size, d.Size)
		}
		return err
	})
	return has, err
}

func (m *remote) putBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error {
	again := false
	return m.client.retry(ctx, func() error {
		if again {
			// It may have arrived, and the answer have not.
			if has, err := m.has(ctx, d); err != nil || has {
				return err
			}
		}
		again = true
		return m.origin.upload(ctx, d, b, progress)
	})
}

// Blobs up to this size are sent in one request after the first; larger ones
// are streamed and then committed, which more registries take.
const monolithic = 1 << 20

func (e *endpoint) upload(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error {
	at, err := e.begin(ctx)
	if err != nil {
		return err
	}
	body := func() (io.ReadCloser, error) {
		rc, err := b.open(d.Size)
		if err != nil || progress == nil {
			return rc, err
		}
		return &counted{rc: rc, progress: progress}, nil
	}
	commit := request{method: http.MethodPut, url: at, push: true, slow: true,
		header: map[string]string{"Content-Type": "application/octet-stream"}}
	if d.Size <= monolithic {
		commit.body, commit.size = body, d.Size
	} else {
		patch := request{method: http.MethodPatch, url: at, push: true, slow: true, body: body, size: d.Size,
			header: map[string]string{"Content-Type": "application/octet-stream"}}
		resp, err := e.step(ctx, patch, http.StatusAccepted, http.StatusNoContent)
		if err != nil {
			return err
		}
		if v := resp.Header.Get("Location"); v != "" {
			if at, err = e.location(at, v); err != nil {
				return err
			}
		}
	}
	u := *at
	q := u.Query()
	q.Set("digest", d.Digest.String())
	u.RawQuery = q.Encode()
	commit.url = &u
	_, err = e.step(ctx, commit, http.StatusCreated, http.StatusNoContent)
	return err
}

// begin opens an upload and gives its location.
func (e *endpoint) begin(ctx context.Context) (*url.URL, error) {
	u := e.url("blobs", "uploads/")
	resp, err := e.do(ctx, request{method: http.MethodPost, url: u, push: true,
		body: func() (io.ReadCloser, error) { return http.NoBody, nil }})
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusAccepted {
		return nil, badStatus(resp)
	}
	resp.Body.Close()
	return e.location(u, resp.Header.Get("Location"))
}

// step makes a request of an upload. That the upload is not known, any more,
// is no reason not to begin another.
func (e *endpoint) step(ctx context.Context, r request, want ...int) (*http.Response, error) {
	resp, err := e.do(ctx, r)
	if err != nil {
		return nil, err
	}
	if slices.Contains(want, resp.StatusCode) {
		resp.Body.Close()
		return resp, nil
	}
	err = badStatus(resp)
	switch statusOf(err) {
	case http.StatusNotFound, http.StatusGone, http.StatusConflict, http.StatusRequestedRangeNotSatisfiable:
		err = fmt.Errorf("%w: the upload was lost: %w", ErrUnavailable, err)
	}
	return nil, err
}

// counted tells of the bytes that are read.
type counted struct {
	rc       io.ReadCloser
	n        int64
	progress func(int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.rc.Read(p)
	if c.n += int64(n); n > 0 {
		c.progress(c.n)
	}
	return n, err
}

func (c *counted) Close() error { return c.rc.Close() }

func (m *remote) putManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string, subject *v1.Descriptor) error {
	key := tag
	if key == "" {
		key = d.Digest.String()
	}
	var listed bool
	err := m.client.retry(ctx, func() error {
		h, err := m.origin.put(ctx, key, raw, d.MediaType)
		listed = h.Get("OCI-Subject") != ""
		return err
	})
	if err != nil || subject == nil || listed {
		return err
	}
	if err := m.origin.addReferrer(ctx, subject.Digest, d); err != nil {
		return fmt.Errorf("list it under the tag %s: %w", fallbackTag(subject.Digest), err)
	}
	return nil
}

func (e *endpoint) put(ctx context.Context, key string, raw []byte, mediaType types.MediaType) (http.Header, error) {
	resp, err := e.do(ctx, request{method: http.MethodPut, url: e.url("manifests", key), push: true, slow: true,
		header: map[string]string{"Content-Type": string(mediaType)},
		body:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
		size:   int64(len(raw))})
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted {
		return nil, badStatus(resp)
	}
	resp.Body.Close()
	return resp.Header, nil
}

// addReferrer puts d into the index under the fallback tag. The protocol has
// no compare-and-swap for tags, so two that do so at once may lose one of
// them. Within a process they take turns. Against others, whoever has written
// waits for longer than reading and writing took, which is what another needs
// to overwrite it, and looks whether d is still there; if not it starts again.
func (e *endpoint) addReferrer(ctx context.Context, subject v1.Hash, d v1.Descriptor) error {
	select {
	case e.turn <- struct{}{}:
		defer func() { <-e.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	wrote := time.Duration(0)
	for range 20 {
		start := time.Now()
		var list []v1.Descriptor
		err := e.client.retry(ctx, func() (err error) {
			list, _, err = e.fallback(ctx, subject)
			return err
		})
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list, func(x v1.Descriptor) bool { return x.Digest == d.Digest }) {
			return nil
		}
		if err := e.putReferrers(ctx, subject, append(list, d)); err != nil {
			return err
		}
		wrote = max(wrote, time.Since(start))
		wait := min(max(3*wrote, 50*time.Millisecond), 2*time.Second)
		t := time.NewTimer(wait + rand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
	return fmt.Errorf("%w: others keep overwriting it", ErrUnavailable)
}

func (e *endpoint) putReferrers(ctx context.Context, subject v1.Hash, list []v1.Descriptor) error {
	put := func() error {
		raw, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: list})
		if err != nil {
			return err
		}
		if len(raw) > maxManifest {
			return fmt.Errorf("the list of %d referrers is too long for a manifest", len(list))
		}
		return e.client.retry(ctx, func() error {
			_, err := e.put(ctx, fallbackTag(subject), raw, types.OCIImageIndex)
			return err
		})
	}
	err := put()
	if s := statusOf(err); s != http.StatusBadRequest && s != http.StatusNotFound {
		return err
	}
	// A registry refuses an index of manifests that it no longer has.
	had := len(list)
	list = slices.DeleteFunc(list, func(d v1.Descriptor) bool {
		u := e.url("manifests", d.Digest.String())
		resp, err := e.get(ctx, request{method: http.MethodHead, url: u, push: true, header: map[string]string{"Accept": acceptManifest}})
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusNotFound
	})
	if len(list) == had {
		return err
	}
	e.client.log.Info("dropping referrers that are gone", "subject", subject, "tag", fallbackTag(subject), "gone", had-len(list),
		"repository", strings.TrimPrefix(e.root.String(), e.root.Scheme+"://")+"/"+e.path)
	return put()
}
