package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"time"

	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
)

// maxBody bounds the body of a request, in bytes.
const maxBody = 64 << 10

// route is a method of a path.
type route struct {
	s            *Server
	method, path string
	waits        bool // for the registry, files or other clients
	do           func(r *http.Request, body []byte) (response, error)
}

// response is a success.
type response struct {
	code     int // 200 if zero
	body     any // to be JSON, or bytes that are YAML; nil: none
	location string
}

// failure is an error with a code.
type failure struct {
	code int
	error
}

func fail(code int, format string, args ...any) error {
	return failure{code, fmt.Errorf(format, args...)}
}

// answer answers a request.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	if !s.enter() {
		return
	}
	defer s.handlers.Done()
	if _, pattern := s.mux.Handler(r); pattern == "" || path.Clean(r.URL.Path) != r.URL.Path {
		s.unknown(w, r)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// unknown answers a request that has no route.
func (s *Server) unknown(w http.ResponseWriter, r *http.Request) {
	var probe probe
	if h, pattern := s.mux.Handler(r); pattern == "" {
		h.ServeHTTP(&probe, r)
	}
	if allow := probe.Header().Get("Allow"); allow != "" {
		w.Header().Set("Allow", allow)
		s.writeError(w, fail(http.StatusMethodNotAllowed, "%s has no method %.20q: it has %s", r.URL.Path, r.Method, allow))
		return
	}
	s.writeError(w, fail(http.StatusNotFound, "there is no %.200q: see /v1/openapi.yaml", r.URL.Path))
}

// probe keeps the header of an answer.
type probe struct{ header http.Header }

func (p *probe) Header() http.Header {
	if p.header == nil {
		p.header = make(http.Header)
	}
	return p.header
}
func (p *probe) Write(b []byte) (int, error) { return len(b), nil }
func (p *probe) WriteHeader(int)             {}

// ServeHTTP reads the body, does what the route is for, and writes the answer.
func (rt route) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := rt.s
	body, err := readBody(w, r, s.bounds.body)
	if err != nil {
		s.writeError(w, err)
		return
	}
	a, err := rt.work(w, r, body)
	if err != nil {
		s.writeError(w, err)
		return
	}
	s.write(w, a)
}

// work does what the route is for. The connection is busy meanwhile; when it is not, as
// while its client does not take the answer, it can be closed for another one.
func (rt route) work(w http.ResponseWriter, r *http.Request, body []byte) (response, error) {
	s := rt.s
	if c, ok := r.Context().Value(connKey{}).(*conn); ok {
		if !s.conns.begin(c, rt.waits) {
			w.Header().Set("Retry-After", "1")
			return response{}, fail(http.StatusServiceUnavailable, "too many requests at a time")
		}
		defer s.conns.end(c)
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	return rt.do(r.WithContext(ctx), body)
}

// readBody reads all of a request's body, which must come in time.
func readBody(w http.ResponseWriter, r *http.Request, timeout time.Duration) ([]byte, error) {
	tooLarge := fail(http.StatusRequestEntityTooLarge, "the body of the request has more than %d bytes", maxBody)
	if r.ContentLength > maxBody {
		w.Header().Set("Connection", "close") // without reading the rest
		return nil, tooLarge
	}
	if r.ContentLength == 0 {
		return nil, nil
	}
	c := http.NewResponseController(w)
	_ = c.SetReadDeadline(time.Now().Add(timeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooMany *http.MaxBytesError
	switch {
	case errors.As(err, &tooMany):
		return nil, tooLarge
	case err != nil:
		w.Header().Set("Connection", "close")
		return nil, fail(http.StatusBadRequest, "read the body of the request: %w", err)
	}
	// Nothing more is to come; that the client leaves is still noticed.
	_ = c.SetReadDeadline(time.Time{})
	return body, nil
}

// decode reads a JSON object with known fields.
func decode(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, extra := d.Token(); extra != io.EOF {
			err = errors.New("something follows the object")
		}
	}
	if err != nil {
		return fail(http.StatusBadRequest, "the body of the request is not what is expected here: %w", err)
	}
	return nil
}

func (s *Server) write(w http.ResponseWriter, a response) {
	var b []byte
	switch body := a.body.(type) {
	case nil:
	case []byte:
		w.Header().Set("Content-Type", "application/yaml")
		b = body
	default:
		w.Header().Set("Content-Type", "application/json")
		var err error
		if b, err = json.Marshal(body); err != nil {
			s.log.Error("cannot encode an answer on the control socket", "err", err)
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		b = append(b, '\n')
	}
	if a.location != "" {
		w.Header().Set("Location", a.location)
	}
	code := cmp.Or(a.code, http.StatusOK)
	if code != http.StatusNoContent {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.bounds.write))
	w.WriteHeader(code)
	if _, err := w.Write(b); err != nil && len(b) > 0 {
		s.log.Debug("cannot answer on the control socket", "err", err)
	}
}

// Failed is the body of an answer that is no success.
type Failed struct {
	Error string `json:"error"`
}

func (s *Server) writeError(w http.ResponseWriter, err error) {
	s.write(w, response{code: s.codeOf(err), body: Failed{err.Error()}})
}

// codeOf maps what a host says to a code.
func (s *Server) codeOf(err error) int {
	var f failure
	var conflict host.ConflictError
	var invalid host.InvalidError
	switch {
	case errors.As(err, &f):
		return f.code
	case errors.Is(err, host.ErrNoDevice), errors.Is(err, host.ErrNoNode), errors.Is(err, host.ErrNoZone):
		return http.StatusNotFound
	case errors.As(err, &conflict):
		return http.StatusConflict
	case errors.As(err, &invalid):
		return http.StatusBadRequest
	case errors.Is(err, host.ErrClosed), s.ctx.Err() != nil, s.host.Stopping():
		return http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	case errors.Is(err, context.Canceled):
		return http.StatusConflict // another request has removed the device
	case errors.Is(err, registry.ErrUnavailable), registry.Temporary(err):
		return http.StatusBadGateway
	}
	return http.StatusUnprocessableEntity
}
