package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// control is the server's side.
type control struct {
	http *http.Server
	done chan struct{}
}

// startControl listens in the cache directory. A server that cannot goes on
// without: the path of a socket has at most 107 bytes.
func startControl(ctx context.Context, cache string, log *slog.Logger, stopRecording func() int, stats func() any) *control {
	c := &control{done: make(chan struct{})}
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(v); err != nil {
			log.Debug("control", "err", err)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /trace/stop", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]int{"stopped": stopRecording()})
	})
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) { answer(w, stats()) })
	l, err := nbd.Listen(ctx, "unix:"+filepath.Join(cache, controlName))
	if err != nil {
		log.Warn("`thaw trace stop` will not reach this server", "err", err)
		close(c.done)
		return c
	}
	c.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(c.done)
		if err := c.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Warn("control", "err", err)
		}
	}()
	return c
}

func (c *control) stop() {
	if c.http != nil {
		c.http.Close()
	}
	<-c.done
}

// Times that a server has to answer: one that lives says something at once, and
// what it is asked for may have files to write.
const (
	aliveTimeout  = 2 * time.Second
	answerTimeout = 30 * time.Second
)

// ask calls the server that has the cache directory.
func ask(ctx context.Context, cache, method, path string, answer any) error {
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
