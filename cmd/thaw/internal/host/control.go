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

// controlName is the socket, in the cache directory, by which other verbs talk
// to the server that has it: HTTP, with JSON bodies.
//
//	POST /trace/stop    ends recordings: {"stopped": N}
//	GET  /stats         what `thaw serve` says at its end, as of now
const controlName = "control.sock"

// Control is the server's side of the control socket.
type Control struct {
	host *Host
	http *http.Server
	done chan struct{}
}

// StartControl listens in the cache directory. A host that cannot goes on without: the
// path of a socket has at most 107 bytes.
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

// Stop ends the requests that are under way, and removes the socket.
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

// Times that a server has to answer: one that lives says something at once, and
// what it is asked for may have files to write.
const (
	aliveTimeout  = 2 * time.Second
	answerTimeout = 30 * time.Second
)

// Ask calls the server that has the cache directory, and decodes what it answers.
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
		return fmt.Errorf("the server with the cache %s: %w", cache, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("no server has the cache %s: %w", cache, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the server with the cache %s answers %s", cache, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(answer); err != nil {
		return fmt.Errorf("the server with the cache %s: %w", cache, err)
	}
	return nil
}
