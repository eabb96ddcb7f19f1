package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"syscall"
	"time"

	"thaw/cmd/thaw/internal/host"
)

// How long a client waits: a server that is alive tells its status at once, and other
// requests may have to wait.
const (
	aliveTimeout = 10 * time.Second // the machine may be busy
	waitsTimeout = addTimeout + 10*time.Second
)

// maxAnswer bounds the body of an answer, in bytes: that many devices with the longest
// names are not likely.
const maxAnswer = 64 << 20

// maxSocketPath is the size of sun_path but for the zero at its end.
const maxSocketPath = 107

// ErrNoServer says that no server uses the cache directory.
var ErrNoServer = errors.New("no server uses the cache")

// Error is an answer that is no success.
type Error struct {
	Code    int
	Message string
}

func (e *Error) Error() string { return e.Message }

// Client asks the server that uses a cache directory. Its methods may be called at once.
type Client struct {
	dir  string
	http *http.Client
}

// NewClient makes a client, which connects when it is asked for something. The caller
// closes it.
func NewClient(dir string) *Client {
	sock := filepath.Join(dir, socketName)
	return &Client{dir, &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", sock)
		},
		MaxIdleConns: 2,
	}}}
}

// Close closes the connections that are not in use.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Dir is the cache directory of the server.
func (c *Client) Dir() string { return c.dir }

// Status returns what the server does.
func (c *Client) Status(ctx context.Context) (st host.Status, err error) {
	err = c.ask(ctx, aliveTimeout, "GET", "/v1/status", nil, &st)
	return st, err
}

// Devices returns the devices of the server.
func (c *Client) Devices(ctx context.Context) ([]host.DeviceInfo, error) {
	var list Devices
	err := c.ask(ctx, aliveTimeout, "GET", "/v1/devices", nil, &list)
	return list.Devices, err
}

// Device returns the device with that ID.
func (c *Client) Device(ctx context.Context, id string) (d host.DeviceInfo, err error) {
	err = c.ask(ctx, aliveTimeout, "GET", "/v1/devices/"+url.PathEscape(id), nil, &d)
	return d, err
}

// AddDevice opens a device, and returns when it is ready. When ctx ends first, it is not
// added.
func (c *Client) AddDevice(ctx context.Context, spec host.Spec) (d host.DeviceInfo, err error) {
	err = c.wait(ctx, "POST", "/v1/devices", NewDevice{spec.Name, spec.Image}, &d)
	return d, err
}

// RemoveDevice removes a device that was added and that no client has open. If drain is
// set, a device that clients have open is closed when the last one leaves. It reports
// whether the device is closed by now.
func (c *Client) RemoveDevice(ctx context.Context, id string, drain bool) (closed bool, err error) {
	var d host.DeviceInfo
	err = c.wait(ctx, "DELETE", fmt.Sprintf("/v1/devices/%s?drain=%t", url.PathEscape(id), drain), nil, &d)
	return err == nil && d.ID == "", err
}

// StopTraces ends the recording of a device, or of all devices if id is empty. It returns
// how many it has ended.
func (c *Client) StopTraces(ctx context.Context, id string) (int, error) {
	var n StoppedTraces
	err := c.wait(ctx, "POST", "/v1/traces/stop", StopTraces{id}, &n)
	return n.Stopped, err
}

// wait asks for what may take long, of a server that is alive.
func (c *Client) wait(ctx context.Context, method, path string, in, out any) error {
	if _, err := c.Status(ctx); err != nil {
		return err
	}
	return c.ask(ctx, waitsTimeout, method, path, in, out)
}

// ask asks for something. It waits for at most timeout, or with 0 until ctx ends.
func (c *Client) ask(ctx context.Context, timeout time.Duration, method, path string, in, out any) error {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it has not answered within %v", timeout))
		defer cancel()
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		if bytes.Contains(bytes.ReplaceAll(b, []byte(`\\`), nil), []byte(`\ufffd`)) { // what JSON makes of such bytes
			return fmt.Errorf("a name or a path is not UTF-8, which the server with the cache %s requires: rename it", c.dir)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://thaw"+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return c.explain(ctx, err)
	case len(b) > maxAnswer:
		return fmt.Errorf("the server with the cache %s answers with more than %d bytes", c.dir, maxAnswer)
	case resp.StatusCode/100 != 2:
		var f Failed
		if json.Unmarshal(b, &f) != nil || f.Error == "" {
			f.Error = "it answers " + resp.Status
		}
		return fmt.Errorf("ask the server with the cache %s: %w", c.dir, &Error{resp.StatusCode, f.Error})
	case resp.StatusCode == http.StatusNoContent:
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("ask the server with the cache %s: its answer is not what was expected: %w", c.dir, err)
	}
	return nil
}

// explain says why there is no answer.
func (c *Client) explain(ctx context.Context, err error) error {
	sock := filepath.Join(c.dir, socketName)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("ask the server with the cache %s: %w", c.dir, context.Cause(ctx))
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		return fmt.Errorf("%w %s: start one with: thaw serve IMAGE --cache %s", ErrNoServer, c.dir, c.dir)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("cannot connect to the server with the cache %s: it belongs to another user: run this command as that user", c.dir)
	case len(sock) > maxSocketPath:
		return fmt.Errorf("cannot connect to the server with the cache %s: the path of its control socket has %d bytes, and the most is %d: use a cache with a shorter path",
			c.dir, len(sock), maxSocketPath)
	}
	return fmt.Errorf("ask the server with the cache %s: %w", c.dir, err)
}
