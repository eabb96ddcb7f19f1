package api

import (
	"context"
	"net/http"
	"net/url"

	"thaw/cmd/thaw/internal/host"
)

// NewCommit asks for an image of a device.
type NewCommit struct {
	Target string `json:"target"`          // reference of the image, with a tag
	Dirty  string `json:"dirty,omitempty"` // what to do with a filesystem that is mounted: see host.ParseDirty
	Level  int    `json:"level,omitempty"` // zstd; 0: the default
}

// commit makes a block image of a device. It takes as long as the upload. If the client
// leaves, the commit ends.
func (s *Server) commit(r *http.Request, body []byte) (response, error) {
	var n NewCommit
	if err := decode(body, &n); err != nil {
		return response{}, err
	}
	dirty, err := host.ParseDirty(n.Dirty)
	switch {
	case err != nil:
		return response{}, err
	case len(n.Target) > maxName:
		return response{}, fail(http.StatusBadRequest, "the target has more than %d bytes", maxName)
	case n.Level < 0 || n.Level > 22:
		return response{}, fail(http.StatusBadRequest, "level %d: it must be from 1 to 22, or 0 for the default", n.Level)
	}
	d, err := s.find(r.PathValue("id"))
	if err != nil {
		return response{}, err
	}
	res, err := s.host.CommitDevice(r.Context(), d.ID(), host.CommitOptions{Target: n.Target, Dirty: dirty, Level: n.Level})
	if err != nil {
		return response{}, err
	}
	return response{body: res}, nil
}

// Commit makes a block image of the device with that ID, which clients may write to
// meanwhile. It takes as long as the upload. When ctx ends, the commit ends.
func (c *Client) Commit(ctx context.Context, id string, n NewCommit) (r host.CommitResult, err error) {
	if _, err := c.Status(ctx); err != nil {
		return r, err
	}
	err = c.ask(ctx, 0, "POST", "/v1/devices/"+url.PathEscape(id)+"/commit", n, &r)
	return r, err
}
