package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// OpenBlob reads all of a blob. The reader returns io.EOF only if the bytes have the size
// and digest of the descriptor; until then they are not verified. If the connection breaks,
// it resumes there, from another source if need be, as long as there is progress. If the
// repository does not have the blob and the descriptor has URLs (a foreign layer), it reads
// one of them, without credentials.
//
// The reader ends with ctx.
func (r *Repo) OpenBlob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return r.OpenBlobFrom(ctx, d, 0, nil)
}

// OpenBlobFrom is OpenBlob for a blob of which the caller has the first off bytes, from an
// earlier read that was interrupted. It reads these from before, since the digest is that of
// all bytes: the reader returns io.EOF only if both parts are right.
func (r *Repo) OpenBlobFrom(ctx context.Context, d v1.Descriptor, off int64, before io.Reader) (io.ReadCloser, error) {
	fail := func(err error) error { return fmt.Errorf("fetch blob %s of %s: %w", d.Digest, r, err) }
	if d.Digest.Algorithm != "sha256" {
		return nil, fail(fmt.Errorf("digests by %q are not supported", d.Digest.Algorithm))
	}
	if d.Size < 0 {
		return nil, fail(fmt.Errorf("its descriptor says it has %d bytes", d.Size))
	}
	s := &stream{repo: r, desc: d, sum: newSum(), fail: fail}
	s.reopen = func() (*Body, error) {
		if s.off == d.Size && d.Size > 0 {
			return &Body{rc: io.NopCloser(bytes.NewReader(nil))}, nil
		}
		b, err := r.reader.open(ctx, d.Digest, s.off, d.Size-s.off, s.off == 0)
		if len(d.URLs) > 0 && Absent(err) {
			return r.openURLs(ctx, d, s.off, err)
		}
		return b, err
	}
	s.pause = func(n int, err error) error { return r.client.pause(ctx, n, err) }
	if off < 0 || off > d.Size {
		return nil, fail(fmt.Errorf("it has %d bytes, so it cannot be read from byte %d on", d.Size, off))
	}
	if off > 0 {
		if n, err := io.CopyN(&s.sum, before, off); err != nil {
			return nil, fail(fmt.Errorf("read its first %d bytes from the disk: only %d are there: %w", off, n, err))
		}
		s.off, s.mark = off, off
	}
	// A missing blob is an error now, and not at the first Read.
	if err := s.open(nil); err != nil {
		return nil, fail(err)
	}
	return s, nil
}

// stream is the reader of OpenBlob.
type stream struct {
	repo   *Repo
	desc   v1.Descriptor
	reopen func() (*Body, error)
	pause  func(n int, err error) error
	fail   func(error) error

	body  *Body
	off   int64
	mark  int64 // off when attempts were last counted from
	tries int
	sum   sum
	err   error
}

// progress is how many bytes earn new attempts.
const progress = 64 << 10

// open opens the body at off, after cause broke the last one.
func (s *stream) open(cause error) error {
	if s.off-s.mark >= progress {
		s.mark, s.tries = s.off, 0
	}
	for {
		if cause != nil {
			if s.tries++; s.tries >= s.repo.client.opts.Attempts || s.pause(s.tries, cause) != nil {
				return cause
			}
		}
		b, err := s.reopen()
		if err == nil {
			s.body = b
			return nil
		}
		if !Temporary(err) {
			return err
		}
		cause = err
	}
}

func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, err := s.body.Read(p)
		s.sum.Write(p[:n])
		s.off += int64(n)
		switch {
		case s.off == s.desc.Size:
			s.err = io.EOF
			if s.sum.hash() != s.desc.Digest {
				s.body.Distrust()
				s.err = s.fail(fmt.Errorf("%w: its %d bytes are not the right ones", ErrDigest, s.off))
				// All bytes are in doubt, these included.
				return 0, s.err
			}
			return n, s.err
		case err == nil:
		case Temporary(err):
			s.body.Close()
			if err := s.open(err); err != nil {
				s.err = s.fail(err)
			}
		default:
			s.err = s.fail(err)
		}
		if n > 0 || s.err != nil {
			return n, s.err
		}
	}
}

// mirrored says whether the last bytes came from a mirror.
func (s *stream) mirrored() bool { return s.body.e != nil && s.body.e.src.mirrorOf != "" }

// maxURLs is how many of a blob's URLs are tried.
const maxURLs = 8

// openURLs reads a blob from off from one of its URLs (image spec, "Descriptors"). The
// digest is verified as always. It sends no credentials, and tries each URL once. The error
// is absent, that of the repository without the blob, with the answers of the URLs.
func (r *Repo) openURLs(ctx context.Context, d v1.Descriptor, off int64, absent error) (*Body, error) {
	var errs []error
	for _, s := range d.URLs[:min(len(d.URLs), maxURLs)] {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			errs = append(errs, errors.New("a URL of its descriptor is neither http nor https"))
			continue
		}
		u.User = nil
		e := &endpoint{client: r.client, src: &source{name: u.Scheme + "://" + u.Host, log: r.client.log}, root: &url.URL{}, away: r.outside()}
		b, err := e.openURL(ctx, u, d.Digest, off, d.Size-off)
		if err == nil {
			return b, nil
		}
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if slices.ContainsFunc(errs, Temporary) {
		return nil, err
	}
	return nil, fmt.Errorf("%w; at its URLs: %w", absent, err)
}

func (e *endpoint) openURL(ctx context.Context, u *url.URL, digest v1.Hash, off, n int64) (*Body, error) {
	r := request{method: http.MethodGet, url: u, header: map[string]string{"Accept-Encoding": "identity"}}
	if off > 0 {
		r.header["Range"] = fmt.Sprintf("bytes=%d-%d", off, off+n-1)
	}
	resp, err := e.follow(ctx, r)
	if err != nil {
		return nil, err
	}
	skip, err := e.checkBlob(resp, digest, off, n, off == 0)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	return e.body(resp, digest, skip, n)
}

func (s *stream) Close() error {
	if s.err == nil {
		s.err = errors.New("read of a closed blob")
	}
	return s.body.Close()
}
