package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// PushBlob pushes the file at path as the blob that d describes, and returns false if the
// repository had it already. progress, if not nil, is called from another goroutine with the
// bytes sent so far; a new attempt begins at zero.
//
// A layout links the file if it can: the file must not be written to afterwards, but its name
// may be removed.
func (r *Repo) PushBlob(ctx context.Context, d v1.Descriptor, path string, progress func(sent int64)) (bool, error) {
	return r.pushBlob(ctx, d, blob{path: path}, progress)
}

// PushBytes pushes data as a blob and returns its descriptor.
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
		return false, fail(errors.New("its descriptor has no SHA-256 digest and size"))
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

// PushManifest pushes a manifest, under a tag if that is not empty, and returns its
// descriptor. The blobs and manifests that it names must have been pushed. If it has a
// subject, Referrers finds it afterwards. With ErrUnlisted the manifest was pushed and its
// descriptor is returned, but Referrers may not find it.
//
// If a registry has no referrers API, PushManifest changes the list of referrers under a tag,
// and watches for some seconds that the change stays.
//
// A tag that cannot be moved is no error if it leads to this manifest already, and ErrTagTaken
// if it leads to another.
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
	if tag != "" && (r.ref.Layout == "" && !validTag(tag) || !validRefName(tag)) {
		return fail(fmt.Errorf("%q is not a tag", tag))
	}
	subject, listed, err := asReferrer(raw, d)
	if err != nil {
		return fail(err)
	}
	if err := r.target.putManifest(ctx, listed, raw, tag, subject); errors.Is(err, ErrUnlisted) {
		_, err = fail(err)
		return d, err
	} else if err != nil {
		return fail(err)
	}
	return d, nil
}

// Place is a reference to tag in r or, without a tag, to digest.
func (r *Repo) Place(tag string, digest v1.Hash) Ref {
	if tag == "" {
		return r.ref.WithDigest(digest)
	}
	return r.ref.WithTag(tag)
}

// asReferrer returns the subject of a manifest, and d with the fields that a list of referrers
// has of the manifest.
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

// CheckPush fails if r cannot be pushed to. It begins an upload and cancels it.
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
	u, err := e.begin(ctx)
	if err != nil {
		return err
	}
	u.cancel() // in the background
	return nil
}

// has only saves work: the blob is sent unless the registry says that it has it.
func (m *remote) has(ctx context.Context, d v1.Descriptor) (bool, error) {
	var size int64
	err := m.client.retry(ctx, func() (err error) {
		size, err = m.origin.stat(ctx, d.Digest, true)
		return err
	})
	if err == nil && size >= 0 && size != d.Size {
		size, err = m.origin.sizeByGet(ctx, d.Digest, true)
	}
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case err != nil:
		if !errors.Is(err, ErrNotFound) {
			m.client.log.Debug("cannot find out whether the registry has a blob; sending it", "repository", m.ref.Place(), "blob", d.Digest.String(), "err", err)
		}
		return false, nil
	case size >= 0 && size != d.Size:
		return false, fmt.Errorf("the registry has %d bytes under this digest, its descriptor says %d", size, d.Size)
	}
	return true, nil
}

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
	// Some have the API and do not say so.
	if list, err := m.origin.listReferrers(ctx, subject.Digest); err == nil &&
		slices.ContainsFunc(list, func(x v1.Descriptor) bool { return x.Digest == d.Digest }) {
		return nil
	}
	if err := m.origin.addReferrer(ctx, subject.Digest, d); err != nil {
		if ctx.Err() != nil {
			return err
		}
		return fmt.Errorf("%w: list it under the tag %s: %w", ErrUnlisted, fallbackTag(subject.Digest), err)
	}
	return nil
}

func (e *endpoint) put(ctx context.Context, key string, raw []byte, mediaType types.MediaType) (http.Header, error) {
	resp, err := e.follow(ctx, request{method: http.MethodPut, url: e.url("manifests", key), push: true, slow: true,
		header: map[string]string{"Content-Type": string(mediaType)},
		body:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil },
		size:   int64(len(raw))})
	if err != nil {
		return nil, e.refused(ctx, key, raw, err)
	}
	if resp.StatusCode/100 != 2 {
		return nil, e.refused(ctx, key, raw, badStatus(resp))
	}
	discard(resp)
	return resp.Header, nil
}

// refused is the error of a manifest that the registry refuses. It is nil if the tag leads to
// that manifest already. If the manifest itself is refused, the error names the likely reason
// and a way round.
func (e *endpoint) refused(ctx context.Context, key string, raw []byte, err error) error {
	status := statusOf(err)
	switch status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusConflict,
		http.StatusPreconditionFailed, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
	default:
		return err
	}
	if !strings.Contains(key, ":") {
		there, _, lookupErr := e.manifest(ctx, key)
		switch {
		case lookupErr != nil:
		case bytes.Equal(there, raw):
			return nil
		case status != http.StatusUnauthorized:
			return fmt.Errorf("%w: %w: %s leads to %s: use another tag, or allow tags of this repository to be overwritten",
				err, ErrTagTaken, key, hashOf(there))
		}
	}
	if status == http.StatusBadRequest || status == http.StatusUnsupportedMediaType || status == http.StatusUnprocessableEntity {
		return fmt.Errorf("%w: the registry does not accept %s: push to another registry or to oci:DIR", err, suspect(raw, err))
	}
	return err
}

// suspect names the likely reason why a registry refuses a manifest: what its answer names, or
// else what is unusual in the manifest.
func suspect(raw []byte, err error) string {
	said := ""
	if e, ok := errors.AsType[*httpError](err); ok {
		said = e.said
	}
	var m v1.Manifest
	_ = json.Unmarshal(raw, &m) // it was parsed before
	kinds := []string{m.ArtifactType, string(m.Config.MediaType)}
	for _, l := range m.Layers {
		kinds = append(kinds, string(l.MediaType))
	}
	kinds = append(kinds, string(m.MediaType))
	for _, k := range kinds {
		if k != "" && strings.Contains(said, k) {
			return "the media type " + k
		}
	}
	switch {
	case m.Subject != nil && strings.Contains(strings.ToLower(said), "subject"):
		return "manifests with a subject"
	case m.ArtifactType != "":
		return "this manifest (of the artifact type " + m.ArtifactType + ")"
	}
	return "this manifest (of the media type " + string(m.MediaType) + ")"
}
