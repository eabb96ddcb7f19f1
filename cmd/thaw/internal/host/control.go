package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"thaw/nbd"
)

// controlName is the socket in the cache directory by which other commands talk to the
// server that uses the directory. It speaks HTTP with JSON bodies.
//
//	POST /trace/stop    ends all recordings: {"stopped": N}
//	GET  /stats         the counts so far, see Stats
const controlName = "control.sock"

// Control is the server's side of the control socket.
type Control struct {
	host *Host
	http *http.Server
	done chan struct{}
}

// StartControl serves the control socket until Stop. If it cannot listen, it logs why and
// the host goes on without: the path of a socket has at most 107 bytes, for one.
func (h *Host) StartControl(ctx context.Context) *Control {
	c := &Control{host: h, done: make(chan struct{})}
	l, err := nbd.Listen(ctx, "unix:"+filepath.Join(h.dir, controlName))
	if err != nil {
		h.log.Warn("cannot listen on the control socket: `thaw trace stop` will not reach this server", "err", err)
		close(c.done)
		return c
	}
	c.http = &http.Server{Handler: c.handler(), ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(c.done)
		if err := c.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			h.log.Warn("the control socket has failed", "err", err)
		}
	}()
	return c
}

// Stop closes the socket and its connections.
func (c *Control) Stop() {
	if c.http != nil {
		c.http.Close()
	}
	<-c.done
}

func (c *Control) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /trace/stop", func(w http.ResponseWriter, r *http.Request) {
		c.answer(w, map[string]int{"stopped": c.host.StopRecordings(r.Context())})
	})
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) { c.answer(w, c.host.Stats()) })
	return mux
}

func (c *Control) answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		c.host.log.Debug("cannot answer on the control socket", "err", err)
	}
}

// How long a client waits: a server that is alive answers /stats at once, and other
// requests may have to wait for files.
const (
	aliveTimeout  = 2 * time.Second
	answerTimeout = 30 * time.Second
)

// Ask sends a request to the server that uses the cache directory, and decodes its
// answer.
func Ask(ctx context.Context, cache, method, path string, answer any) error {
	var alive any
	if err := askFor(ctx, aliveTimeout, cache, "GET", "/stats", &alive); err != nil {
		return err
	}
	return askFor(ctx, answerTimeout, cache, method, path, answer)
}

func askFor(ctx context.Context, timeout time.Duration, cache, method, path string, answer any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it has not answered within %v", timeout))
	defer cancel()
	sock := filepath.Join(cache, controlName)
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", sock)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://thaw"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if ctx.Err() != nil {
		return fmt.Errorf("ask the server with the cache %s: %w", cache, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("no server uses the cache %s: %w", cache, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the server with the cache %s answers %s", cache, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(answer); err != nil {
		return fmt.Errorf("ask the server with the cache %s: %w", cache, err)
	}
	return nil
}
