package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"thaw/cmd/thaw/internal/host"
	"thaw/nbd"
)

const (
	socketUsage = "unix:/run/thaw.sock for root, else unix:$XDG_RUNTIME_DIR/thaw.sock"
	cacheUsage  = "/var/cache/thaw for root, else thaw in $XDG_CACHE_HOME or ~/.cache"
)

// defaultSocket is the socket of a user's server. It is never in a directory that
// everybody may write to, such as /tmp.
func defaultSocket(uid int) (string, error) {
	if uid == 0 {
		return "/run/thaw.sock", nil
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "thaw.sock"), nil
	}
	return "", usageError{errors.New("there is no default address, because XDG_RUNTIME_DIR is not set: pass one, such as --listen unix:/run/user/1000/thaw.sock")}
}

// defaultCache is the directory of a user's cache.
func defaultCache(uid int) (string, error) {
	if uid == 0 {
		return "/var/cache/thaw", nil
	}
	if dir, err := os.UserCacheDir(); err == nil && filepath.IsAbs(dir) {
		return filepath.Join(dir, "thaw"), nil
	}
	return "", usageError{errors.New("there is no default cache, because neither XDG_CACHE_HOME nor HOME is an absolute path: pass one, such as --cache /var/cache/thaw")}
}

func listen(ctx context.Context, o serveOptions) (ls []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
		}
	}()
	if o.nodesOnly {
		return nil, nil
	}
	only := o.vhostUser != "" && len(o.listen) == 0 // for virtual machines: no default address
	if files := activation.Files(true); len(files) > 0 {
		if ls, err = nbd.ListenFiles(files); err != nil {
			return nil, err
		}
	}
	if len(ls) == 0 && len(o.listen) == 0 && !only {
		socket, err := defaultSocket(os.Getuid())
		if err != nil {
			return nil, err
		}
		o.listen = []string{"unix:" + socket}
	}
	for _, addr := range o.listen {
		l, err := nbd.Listen(ctx, addr)
		if err != nil {
			return ls, err
		}
		ls = append(ls, l)
	}
	for _, l := range ls {
		if nbd.Exposed(l) && !o.exposed && (o.tls.Cert == "" || o.tlsOptional) {
			return ls, usageError{fmt.Errorf("cannot listen on %s without TLS, because other hosts can reach it: pass --tls-cert, or --allow-plaintext", l.Addr())}
		}
	}
	return ls, nil
}

// announced is the ready line of --json.
type announced struct {
	Type    string           `json:"type"`
	Exports []announceExport `json:"exports"`
	Listen  []string         `json:"listen"`
	Sockets string           `json:"vhost_user,omitempty"` // the directory of the sockets for virtual machines
}

type announceExport struct {
	Name     string   `json:"name"`
	Image    string   `json:"image"`  // a reference to the block image itself
	Digest   string   `json:"digest"` // of the block image
	Size     int64    `json:"bytes"`
	Writable bool     `json:"writable,omitempty"`
	URI      string   `json:"uri"`              // the first of URIs, empty without a listener
	URIs     []string `json:"uris"`             // one for each listener
	Socket   string   `json:"socket,omitempty"` // the path of its vhost-user socket
}

// announce prints the ready line and notifies systemd. The server goes on if that fails:
// whoever started it may be gone.
func (a *app) announce(ctx context.Context, h *host.Host, devices []*host.Device, ls []net.Listener, requireTLS bool) error {
	out := announced{Type: "ready", Exports: []announceExport{}, Listen: []string{}, Sockets: h.SocketDir()}
	for _, l := range ls {
		out.Listen = append(out.Listen, l.Addr().Network()+":"+l.Addr().String())
	}
	words := []string{"ready:"}
	for _, d := range devices {
		in := d.Info()
		e := announceExport{Name: in.Name, Image: in.Image, Digest: in.Digest, Size: in.Size, Writable: in.Overlay != nil, URIs: []string{}, Socket: in.Socket}
		export := in.Name
		if len(devices) == 1 {
			export = ""
		}
		for _, l := range ls {
			e.URIs = append(e.URIs, uri(ctx, l.Addr(), export, requireTLS))
		}
		if len(e.URIs) > 0 {
			e.URI = e.URIs[0]
			words = append(words, e.URI)
		}
		if e.Socket != "" {
			words = append(words, "vhost-user:"+e.Socket)
		}
		words = append(words, e.Image)
		out.Exports = append(out.Exports, e)
	}
	if len(devices) == 0 {
		words = append(words, out.Listen...)
		if out.Sockets != "" {
			words = append(words, "vhost-user:"+out.Sockets)
		}
	}
	if len(words) == 1 {
		words = append(words, "nodes only")
	}
	var err error
	if a.json {
		err = a.printJSON(out)
	} else {
		_, err = fmt.Fprintln(a.stdout, strings.Join(words, " "))
	}
	_, notifyErr := daemon.SdNotify(false, daemon.SdNotifyReady)
	return errors.Join(err, notifyErr)
}

// uri is the URI of an export, as in NBD's doc/uri.md: its scheme is "nbds" if TLS is
// required. A socket of the abstract namespace has no URI that clients understand; it is
// written as in --listen.
func uri(ctx context.Context, addr net.Addr, export string, requireTLS bool) string {
	scheme := "nbd"
	if requireTLS {
		scheme = "nbds"
	}
	u := url.URL{Scheme: scheme, Path: "/" + export}
	switch a := addr.(type) {
	case *net.UnixAddr:
		if strings.HasPrefix(a.Name, "@") {
			return "unix:" + a.Name
		}
		path, err := filepath.Abs(a.Name)
		if err != nil {
			path = a.Name
		}
		// Everything but unreserved characters and slashes is escaped: some clients
		// take "+" for a space.
		socket := strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(path))
		return scheme + "+unix://" + u.EscapedPath() + "?socket=" + socket
	case *net.TCPAddr:
		host := a.IP.String()
		if a.Zone != "" {
			host += "%" + a.Zone
		}
		if a.IP.IsUnspecified() {
			host = hostName(ctx)
		}
		u.Host = net.JoinHostPort(host, fmt.Sprint(a.Port))
	default:
		u.Host = addr.String()
	}
	return u.String()
}

// hostName is the name of this host if that can be resolved, and else localhost.
func hostName(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if name, err := os.Hostname(); err == nil {
		if addrs, err := net.DefaultResolver.LookupHost(ctx, name); err == nil && len(addrs) > 0 {
			return name
		}
	}
	return "localhost"
}
