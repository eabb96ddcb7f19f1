package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"

	"thaw/cmd/thaw/internal/host"
)

// nodeRoutes are the routes of nodes.
func (s *Server) nodeRoutes() []route {
	return []route{
		{s, "GET", "/v1/nodes", false, s.nodes},
		{s, "POST", "/v1/nodes", true, s.attach},
		{s, "GET", "/v1/nodes/{id}", false, s.node},
		{s, "DELETE", "/v1/nodes/{id}", true, s.detach},
	}
}

// Nodes is the list of nodes.
type Nodes struct {
	Nodes []host.NodeInfo `json:"nodes"`
}

func (s *Server) nodes(*http.Request, []byte) (response, error) {
	return response{body: Nodes{s.host.Nodes()}}, nil
}

func (s *Server) node(r *http.Request, _ []byte) (response, error) {
	n, err := s.host.Node(r.PathValue("id"))
	if err != nil {
		return response{}, err
	}
	return response{body: n}, nil
}

func (s *Server) attach(r *http.Request, body []byte) (response, error) {
	var spec host.NodeSpec
	if err := decode(body, &spec); err != nil {
		return response{}, err
	}
	if spec.Image == "" {
		return response{}, fail(http.StatusBadRequest, "image is missing: the reference of the image to attach")
	}
	for field, v := range map[string]string{"image": spec.Image, "overlay": spec.Overlay, "mount": spec.Mount} {
		if len(v) > maxName || !utf8.ValidString(v) || strings.ContainsFunc(v, func(c rune) bool { return !unicode.IsPrint(c) }) {
			return response{}, fail(http.StatusBadRequest, "%s %.100q: it must be at most %d bytes of printable text", field, v, maxName)
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.bounds.add)
	defer cancel()
	n, err := s.host.Attach(ctx, spec)
	if err != nil {
		return response{}, err
	}
	return response{code: http.StatusCreated, location: "/v1/nodes/" + n.ID, body: n}, nil
}

// detach removes a node that is not in use. With ?later=true, a node in use is removed when
// that ends.
func (s *Server) detach(r *http.Request, _ []byte) (response, error) {
	n, err := s.host.Node(r.PathValue("id"))
	if err != nil {
		return response{}, err
	}
	later := false
	switch v := r.URL.Query().Get("later"); v {
	case "true":
		later = true
	case "", "false":
	default:
		return response{}, fail(http.StatusBadRequest, "later=%.20q: it must be true or false", v)
	}
	ctx, cancel := context.WithTimeout(r.Context(), closeTimeout)
	defer cancel()
	gone, err := s.host.Detach(ctx, n.ID, later)
	switch {
	case err != nil:
		return response{}, err
	case gone:
		return response{code: http.StatusNoContent}, nil
	}
	return response{code: http.StatusAccepted, body: n}, nil
}

// Nodes returns the nodes of the server.
func (c *Client) Nodes(ctx context.Context) ([]host.NodeInfo, error) {
	var list Nodes
	err := c.ask(ctx, aliveTimeout, "GET", "/v1/nodes", nil, &list)
	return list.Nodes, err
}

// Attach gives an image a node, and returns when it can be read. When ctx ends first, there
// is none.
func (c *Client) Attach(ctx context.Context, spec host.NodeSpec) (n host.NodeInfo, err error) {
	err = c.wait(ctx, "POST", "/v1/nodes", spec, &n)
	return n, err
}

// Detach removes a node. With later, a node that is in use is removed when that ends; gone
// reports whether it is removed by now.
func (c *Client) Detach(ctx context.Context, id string, later bool) (gone bool, err error) {
	var n host.NodeInfo
	err = c.wait(ctx, "DELETE", fmt.Sprintf("/v1/nodes/%s?later=%t", url.PathEscape(id), later), nil, &n)
	return err == nil && n.ID == "", err
}

// Unknown reports whether a server has refused a request because it does not know such
// requests: another version of thaw serves there.
func Unknown(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Code == http.StatusNotFound && strings.Contains(e.Message, "see /v1/openapi.yaml")
}

// IsStopping reports whether a server has refused a request because it ends.
func IsStopping(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Code == http.StatusServiceUnavailable
}
