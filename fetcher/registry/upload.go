package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// blob is the content of a blob to push: a file, or bytes in memory.
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

// section is n bytes of it from off.
func (b blob) section(size, off, n int64) (io.ReadCloser, error) {
	rc, err := b.open(size)
	if err != nil || off == 0 && n == size {
		return rc, err
	}
	f, ok := rc.(*os.File)
	if !ok {
		return io.NopCloser(bytes.NewReader(b.data[off : off+n])), nil
	}
	return fileSection{io.NewSectionReader(f, off, n), f}, nil
}

func (m *remote) putBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error {
	tries := 0
	var sent *reports
	if progress != nil {
		sent = &reports{to: progress}
		defer sent.begin(nil)
	}
	return m.client.retry(ctx, func() error {
		if tries++; tries > 1 {
			// The blob may have arrived, and the answer been lost.
			if has, err := m.has(ctx, d); err != nil || has {
				return err
			}
		}
		limit := int64(0)
		if tries >= triesWhole && d.Size > monolithic {
			limit = max(d.Size>>(2*(tries-triesWhole+1)), leastPiece)
		}
		return m.origin.upload(ctx, d, b, sent, limit)
	})
}

const (
	// Blobs up to this size are sent by one PUT; larger ones are sent by PATCH and then
	// committed, which more registries accept.
	monolithic = 1 << 20
	// If a registry refuses a body of the blob's size, the blob is sent in pieces of a
	// fourth of it, maxPiece at most. If these are refused, the pieces are a fourth again,
	// down to leastPiece.
	maxPiece, leastPiece = 16 << 20, 16 << 10
	// triesWhole is the try from which on a large blob is sent in pieces in any case, smaller
	// with each try: some proxies break the connection or answer 502 instead of stating a
	// limit.
	triesWhole = 3
)

// An uploading is an upload of a blob.
type uploading struct {
	e        *endpoint
	d        v1.Descriptor
	b        blob
	progress *reports

	at    *url.URL
	least int64 // least length of a piece but the last
	off   int64 // bytes that the registry has, when sending pieces
}

// upload sends a blob, in requests of at most limit bytes; 0 means no limit.
func (e *endpoint) upload(ctx context.Context, d v1.Descriptor, b blob, progress *reports, limit int64) error {
	begin := func() (*uploading, error) {
		u, err := e.begin(ctx)
		if err == nil {
			u.d, u.b, u.progress = d, b, progress
		}
		return u, err
	}
	if most := e.src.maxBody.Load(); most > 0 && d.Size > most && (limit == 0 || limit > most) {
		limit = most
	}
	var first error
	if limit == 0 {
		u, err := begin()
		if err != nil {
			return err
		}
		if first = u.whole(ctx); first != nil {
			u.cancel()
		}
		if !tooLarge(first, d.Size) {
			return first
		}
		limit = d.Size / 4
	}
	for limit = min(limit, maxPiece); ; limit /= 4 {
		limit = max(limit, leastPiece)
		u, err := begin()
		if err != nil {
			return err
		}
		if err = u.pieces(ctx, max(limit, u.least)); err != nil {
			u.cancel()
		}
		switch {
		case err == nil:
			if first != nil {
				e.src.maxBody.Store(max(limit, u.least))
			}
			return nil
		case !tooLarge(err, limit):
			if first != nil && !Temporary(err) && statusOf(first) != http.StatusRequestEntityTooLarge {
				return first // the size was not the reason
			}
			return err
		case limit == leastPiece || limit <= u.least:
			return fmt.Errorf("%w: the registry refuses a request of %d bytes: raise the limit of request bodies of the registry or of the proxy before it", err, limit)
		}
		if first == nil {
			first = err
		}
	}
}

// tooLarge says whether a body of n bytes may have been refused because of its size. Not all
// servers answer 413 then.
func tooLarge(err error, n int64) bool {
	e, ok := errors.AsType[*httpError](err)
	if !ok {
		return false
	}
	said := strings.ToLower(e.said)
	switch {
	case e.status == http.StatusRequestEntityTooLarge, e.status >= 400 && strings.Contains(said, "too large"):
		return n > 0
	case e.status == http.StatusBadRequest, e.status == http.StatusUnprocessableEntity:
		return n > monolithic && !strings.Contains(said, "digest")
	}
	return false
}

// post asks for a new upload.
func (e *endpoint) post(ctx context.Context) (*uploading, error) {
	resp, err := e.follow(ctx, request{method: http.MethodPost, url: e.url("blobs", "uploads/"), push: true,
		body: func() (io.ReadCloser, error) { return http.NoBody, nil }})
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, badStatus(resp)
	}
	discard(resp)
	u := &uploading{e: e}
	where := resp.Header.Get("Location")
	if id := resp.Header.Get("Docker-Upload-UUID"); where == "" && id != "" {
		where = "/v2/" + e.path + "/blobs/uploads/" + url.PathEscape(id)
	}
	if u.at, err = e.location(resp.Request.URL, where); err != nil {
		return nil, fmt.Errorf("POST %s: %w", redact(resp.Request.URL), err)
	}
	if n, err := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil && n > 0 {
		u.least = n
	}
	return u, nil
}

// whole sends the blob as the body of one request.
func (u *uploading) whole(ctx context.Context) error {
	if u.d.Size <= monolithic {
		return u.commit(ctx, u.d.Size)
	}
	if err := u.patch(ctx, u.d.Size, false); err != nil {
		return err
	}
	return u.commit(ctx, 0)
}

// pieces sends the blob as several requests.
func (u *uploading) pieces(ctx context.Context, size int64) error {
	for stuck := 0; u.off < u.d.Size; {
		before := u.off
		err := u.patch(ctx, min(size, u.d.Size-u.off), true)
		if statusOf(err) == http.StatusRequestedRangeNotSatisfiable && stuck < 3 {
			// It has more or less than expected.
			stuck++
			if off, ok := u.has(ctx); ok && off != before {
				u.off = off
				continue
			}
		}
		if err != nil {
			return err
		}
		if u.off <= before {
			return fmt.Errorf("%w: the registry accepts a part of the blob, but does not keep it", ErrUnavailable)
		}
	}
	return u.commit(ctx, 0)
}

// body opens n bytes of the blob from u.off.
func (u *uploading) body(n int64) func() (io.ReadCloser, error) {
	off := u.off
	return func() (io.ReadCloser, error) {
		rc, err := u.b.section(u.d.Size, off, n)
		if err != nil || u.progress == nil {
			return rc, err
		}
		c := &counted{rc: rc, n: off, progress: u.progress}
		u.progress.begin(c)
		return c, nil
	}
}

// patch sends the next n bytes.
func (u *uploading) patch(ctx context.Context, n int64, piece bool) error {
	r := request{method: http.MethodPatch, url: u.at, push: true, slow: true, body: u.body(n), size: n,
		header: map[string]string{"Content-Type": "application/octet-stream"}}
	if piece {
		r.header["Content-Range"] = fmt.Sprintf("%d-%d", u.off, u.off+n-1) // not as in HTTP
	}
	resp, err := u.step(ctx, r)
	if err != nil {
		return err
	}
	if v := resp.Header.Get("Location"); v != "" {
		if u.at, err = u.e.location(resp.Request.URL, v); err != nil {
			return fmt.Errorf("PATCH %s: %w", redact(resp.Request.URL), err)
		}
	}
	if end, ok := uploadRange(resp); piece && ok && end > u.off && end < u.off+n {
		n = end - u.off // it has accepted a part
	}
	u.off += n
	return nil
}

// has asks how many bytes of the upload the registry has.
func (u *uploading) has(ctx context.Context) (int64, bool) {
	resp, err := u.e.follow(ctx, request{method: http.MethodGet, url: u.at, push: true})
	if err != nil {
		return 0, false
	}
	discard(resp)
	end, ok := uploadRange(resp)
	if resp.StatusCode/100 != 2 || !ok || end > u.d.Size {
		return 0, false
	}
	if v := resp.Header.Get("Location"); v != "" {
		if at, err := u.e.location(resp.Request.URL, v); err == nil {
			u.at = at
		}
	}
	return end, true
}

// uploadRange reads the number of bytes from the Range header of an answer, 0-LAST. "0-0" stands
// for none and for one.
func uploadRange(resp *http.Response) (int64, bool) {
	from, to, ok := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-")
	last, err := strconv.ParseInt(to, 10, 64)
	if !ok || from != "0" || err != nil || last < 0 || last > 1<<62 {
		return 0, false
	}
	if last == 0 {
		return 0, true
	}
	return last + 1, true
}

// commit completes the upload, with the next n bytes.
func (u *uploading) commit(ctx context.Context, n int64) error {
	at := *u.at
	// The registry's own query is kept as it is.
	if at.RawQuery != "" {
		at.RawQuery += "&"
	}
	at.RawQuery += "digest=" + url.QueryEscape(u.d.Digest.String())
	r := request{method: http.MethodPut, url: &at, push: true, slow: true, size: n,
		header: map[string]string{"Content-Type": "application/octet-stream"},
		body:   func() (io.ReadCloser, error) { return http.NoBody, nil }}
	if n > 0 {
		r.body = u.body(n)
	}
	_, err := u.step(ctx, r)
	return err
}

// step makes a request of an upload. If the registry no longer knows the upload, or has another
// length of it, the error is temporary: a new upload may succeed.
func (u *uploading) step(ctx context.Context, r request) (*http.Response, error) {
	resp, err := u.e.follow(ctx, r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		discard(resp)
		return resp, nil
	}
	err = badStatus(resp)
	switch statusOf(err) {
	case http.StatusNotFound, http.StatusGone, http.StatusConflict, http.StatusRequestedRangeNotSatisfiable:
		err = fmt.Errorf("%w: the upload was lost: %w", ErrUnavailable, err)
	}
	return nil, err
}

// reports tells the caller of a push how far the blob is. http.Transport may go on reading the
// body of a request that was answered early or given up, beside the next one and after the push
// has ended. What it reads of an earlier body is not reported.
type reports struct {
	to func(int64)
	mu struct {
		sync.Mutex
		of *counted // nil: no body is being sent
	}
}

// begin reports what is read of a body from now on, and of no other.
func (r *reports) begin(c *counted) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.of = c
}

func (r *reports) read(c *counted) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.of == c {
		r.to(c.n)
	}
}

// counted reports the bytes that are read.
type counted struct {
	rc       io.ReadCloser
	n        int64
	progress *reports
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.rc.Read(p)
	if c.n += int64(n); n > 0 {
		c.progress.read(c)
	}
	return n, err
}

func (c *counted) Close() error { return c.rc.Close() }
