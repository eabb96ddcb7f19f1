package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"thaw/blockmap"
)

// Errors that callers branch on. The errors of this package wrap them.
var (
	// ErrNotFound: the registry, directory or archive can be read, and does not have it.
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized: the registry refuses the credentials, after they were read again.
	ErrUnauthorized = errors.New("not authorized")
	// ErrUnavailable: the server does not answer, or asks to come back later.
	ErrUnavailable = errors.New("not available")
	// ErrTruncated: the bytes end too early. It wraps io.ErrUnexpectedEOF.
	ErrTruncated = fmt.Errorf("cut short: %w", io.ErrUnexpectedEOF)
	// ErrDigest: the bytes do not match the digest.
	ErrDigest error = digestMismatch{}
	// ErrTagTaken: the tag leads to another manifest, and the registry does not allow it
	// to be moved.
	ErrTagTaken = errors.New("the tag leads to another manifest and cannot be moved")
	// ErrUnlisted: the registry has the manifest, but does not list it among the
	// referrers of its subject. It can be found only by its tag or digest.
	ErrUnlisted = errors.New("the registry does not list it as a referrer")
)

var errStalled = errors.New("too few bytes came for too long")

// httpError is an answer that does not have what was asked for, or the lack of an answer.
type httpError struct {
	method, url string // redacted
	status      int    // 0: no answer
	detail      string // what the server says, in one line
	said        string // what the server says, in full
	after       time.Duration
	err         error // a sentinel, or the cause
}

func (e *httpError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: ", e.method, e.url)
	if e.err == ErrNotFound && e.status != 0 {
		// The status, its text and the spec's code all say so.
		code, _, _ := strings.Cut(e.detail, " ")
		if !strings.HasSuffix(code, "_UNKNOWN") {
			code = e.detail
		}
		return strings.TrimSuffix(fmt.Sprintf("%s%v (%d %s", &b, ErrNotFound, e.status, code), " ") + ")"
	}
	if e.status != 0 {
		fmt.Fprintf(&b, "%d %s: ", e.status, http.StatusText(e.status))
	}
	if e.detail != "" {
		fmt.Fprintf(&b, "%s: ", e.detail)
	}
	return b.String() + e.err.Error()
}

func (e *httpError) Unwrap() error { return e.err }

// Temporary says whether a call that failed with err may succeed when it is repeated: if
// the server did not answer, answered 408, 429 or 5xx, or sent less than it announced. The
// end of a context is not temporary: the caller has no use for an answer any more.
func Temporary(err error) bool {
	return !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) &&
		(errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTruncated))
}

// RetryAfter is the pause that a server asked for, or zero.
func RetryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*httpError](err); ok {
		return e.after
	}
	return 0
}

// noAnswer is the error of a request without an answer. Only if a later request may get one
// it is ErrUnavailable.
func noAnswer(req *http.Request, err error) error {
	if ctx := req.Context(); ctx.Err() != nil {
		// It has stalled, or the caller has cancelled it.
		if err = ctx.Err(); context.Cause(ctx) == errStalled {
			err = errStalled
		}
	}
	e := &httpError{method: req.Method, url: redact(req.URL)}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		e.err = err
	case errors.Is(err, errInside):
		e.err = err
	case isCertificate(err):
		e.err = fmt.Errorf("certificate refused: %w", err)
	case isPlain(err):
		e.err = fmt.Errorf("%s answers in plain HTTP, which is not allowed for this host", req.URL.Host)
	default:
		e.err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return e
}

// isPlain says whether an HTTPS request was answered in plain HTTP.
func isPlain(err error) bool {
	e, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok && string(e.RecordHeader[:]) == "HTTP/"
}

func isCertificate(err error) bool {
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return true
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return true
	}
	_, ok := errors.AsType[x509.CertificateInvalidError](err)
	return ok
}

// Absent says whether a look-up that failed with err may count as having found nothing.
// That is so for ErrNotFound and for a refusal: many registries answer 401 or 403 for what
// they do not have. Absent is for look-ups that matter. One that only saves work must not
// fail an operation at all: whatever the error, the operation goes on without it, unless
// its context has ended.
func Absent(err error) bool { return errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnauthorized) }

// badStatus makes an error of an answer and closes its body. It waits only a short time for
// the server's explanation.
func badStatus(resp *http.Response) error {
	e := &httpError{method: resp.Request.Method, url: redact(resp.Request.URL), status: resp.StatusCode}
	limitBody(resp, refusalTime)
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 8<<10))
	resp.Body.Close()
	e.said = string(b)
	e.detail = detail(b, resp.Header.Get("Content-Type"))
	e.after = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	switch s := resp.StatusCode; {
	case s == http.StatusUnauthorized, s == http.StatusForbidden, s == http.StatusProxyAuthRequired:
		e.err = ErrUnauthorized
	case s == http.StatusNotFound, s == http.StatusGone:
		e.err = ErrNotFound
	case s == http.StatusRequestTimeout, s == http.StatusTooEarly, s == http.StatusTooManyRequests,
		s >= 500 && s != http.StatusNotImplemented && s != http.StatusHTTPVersionNotSupported:
		e.err = ErrUnavailable
	case s == http.StatusRequestedRangeNotSatisfiable:
		e.err = errors.New("the blob is shorter than its descriptor says")
	case s >= 400:
		e.err = errors.New("the server refuses the request")
	default:
		e.err = errors.New("unexpected answer")
	}
	return e
}

// detail makes a short line of the body of a refusal: of the errors of the distribution
// spec ("Error Codes"), or of plain text. It drops web pages and control characters.
func detail(body []byte, contentType string) string {
	var doc struct {
		Errors []struct {
			Code, Message string
			Detail        json.RawMessage
		}
	}
	s := ""
	if json.Unmarshal(body, &doc) == nil {
		for _, e := range doc.Errors {
			if s != "" {
				s += "; "
			}
			s += strings.TrimSpace(e.Code + " " + e.Message)
			var more string
			if json.Unmarshal(e.Detail, &more) == nil && more != "" {
				s += ": " + more
			}
		}
	} else if strings.HasPrefix(contentType, "text/plain") {
		s = string(body)
	}
	s = strings.Map(func(c rune) rune {
		switch {
		case unicode.IsSpace(c):
			return ' '
		case !unicode.IsPrint(c):
			return -1
		}
		return c
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "..."
	}
	return s
}

// retryAfter reads a Retry-After header, in seconds or as a date; ten minutes at most.
func retryAfter(v string, now time.Time) time.Duration {
	var d time.Duration
	if s, err := strconv.Atoi(v); err == nil {
		d = time.Duration(min(max(s, 0), 3600)) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), 10*time.Minute)
}

// redact is u without what may be secret in it: user, query, fragment.
func redact(u *url.URL) string {
	c := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	if u.RawQuery != "" {
		c.RawQuery = "..."
	}
	return c.String()
}

// statusOf is the HTTP status in err's chain, or zero.
func statusOf(err error) int {
	if e, ok := errors.AsType[*httpError](err); ok {
		return e.status
	}
	return 0
}

// digestMismatch is ErrDigest. It is a blockmap.ErrDigest too, which those know who get
// bytes of a Repo by an interface.
type digestMismatch struct{}

func (digestMismatch) Error() string { return "digest mismatch" }

func (digestMismatch) Is(target error) bool { return target == blockmap.ErrDigest }
