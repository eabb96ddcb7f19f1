package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// MountBlob asks the registry of r for a blob that another of its repositories has, so that
// its bytes need not be sent (distribution spec, "Mounting a blob from another repository").
// It returns false if that is not possible: the repositories are of two registries, or the
// registry does not mount, does not have the blob there or does not allow it. Mounting only
// saves work, so only the end of ctx is an error.
func (r *Repo) MountBlob(ctx context.Context, d v1.Descriptor, from *Repo) (bool, error) {
	m, ok := r.target.(*remote)
	if !ok || from.ref.Registry != r.ref.Registry || from.ref.Repository == "" || from.ref.Repository == r.ref.Repository || d.Digest.Algorithm != "sha256" {
		return false, nil
	}
	var mounted bool
	err := m.client.retry(ctx, func() (err error) {
		mounted, err = m.origin.mount(ctx, d, from.ref.Repository)
		return err
	})
	if ctx.Err() != nil {
		return false, fmt.Errorf("mount blob %s of %s in %s: %w", d.Digest, from, r, ctx.Err())
	}
	if err != nil {
		m.client.log.Debug("the registry does not mount the blob", "repository", r.String(), "from", from.String(), "blob", d.Digest.String(), "err", err)
	}
	return mounted && err == nil, nil
}

// mount asks for a blob of the repository from. Registries that do not mount begin an upload,
// which is cancelled. One that says that it has mounted the blob is asked whether it has it.
func (e *endpoint) mount(ctx context.Context, d v1.Descriptor, from string) (bool, error) {
	u := e.url("blobs", "uploads/")
	u.RawQuery = url.Values{"mount": {d.Digest.String()}, "from": {from}}.Encode()
	resp, err := e.follow(ctx, request{method: http.MethodPost, url: u, push: true, from: from,
		body: func() (io.ReadCloser, error) { return http.NoBody, nil }})
	if err != nil {
		return false, err
	}
	switch {
	case resp.StatusCode == http.StatusCreated:
		discard(resp)
		size, err := e.stat(ctx, d.Digest, true)
		if err == nil && size >= 0 && size != d.Size {
			size, err = e.sizeByGet(ctx, d.Digest, true)
		}
		if errors.Is(err, ErrNotFound) {
			err = nil
			size = d.Size + 1
		}
		return err == nil && (size < 0 || size == d.Size), err
	case resp.StatusCode/100 == 2:
		discard(resp)
		if at, err := e.location(resp.Request.URL, resp.Header.Get("Location")); err == nil {
			(&uploading{e: e, at: at}).cancel()
		}
		return false, nil
	}
	return false, badStatus(resp)
}

// mounting returns the authorizer for requests that read the repository from as well.
func (e *endpoint) mounting(from string) *authorizer {
	e.auth.mu.Lock()
	ch := e.auth.mu.challenge
	e.auth.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.mu.mounting[from]
	if a == nil {
		if len(e.mu.mounting) >= maxForeign {
			clear(e.mu.mounting)
		}
		if e.mu.mounting == nil {
			e.mu.mounting = make(map[string]*authorizer)
		}
		a = &authorizer{client: e.client, root: e.root, repository: e.path, also: from}
		a.mu.challenge = ch // so that it need not be refused first
		e.mu.mounting[from] = a
	}
	return a
}
