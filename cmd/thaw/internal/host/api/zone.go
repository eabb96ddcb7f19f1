package api

import (
	"context"
	"net/http"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// askTimeout bounds the wait for what peers say of themselves.
const askTimeout = time.Second

// zone answers with the state of the server's zone. With ?ask=true, it asks the peers how
// they are.
func (s *Server) zone(r *http.Request, _ []byte) (response, error) {
	ask := false
	switch v := r.URL.Query().Get("ask"); v {
	case "true":
		ask = true
	case "", "false":
	default:
		return response{}, fail(http.StatusBadRequest, "ask=%.20q: it must be true or false", v)
	}
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	z, err := s.host.Zone(ctx, ask)
	if err != nil {
		return response{}, err
	}
	return response{body: z}, nil
}

// Zone returns the state of the server's zone. With ask, it has what the peers say of
// themselves.
func (c *Client) Zone(ctx context.Context, ask bool) (z host.ZoneStatus, err error) {
	path := "/v1/zone"
	if ask {
		path += "?ask=true"
	}
	err = c.ask(ctx, aliveTimeout+askTimeout, "GET", path, nil, &z)
	return z, err
}
