package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

type serveOptions struct {
	listen   []string
	cache    string
	quota    size
	grace    time.Duration
	readOnly bool
	exposed  bool
}

func serveCommand(a *app) *cobra.Command {
	o := serveOptions{cache: defaultCache()}
	c := &cobra.Command{
		Use:   "serve IMAGE...",
		Short: "Serve images as network block devices",
		Long: `serve exports block images over NBD. A block is fetched when it is first read,
and kept in the cache; before the export is ready only its manifest and index
are fetched.

An IMAGE is a block image, or an image that has one beside it. Its name as given
is the name of the export; a single image is the default export as well.

When it is ready, one line on stdout says so, and systemd is notified where it
asked for that. Sockets passed by systemd are listened on instead of the default
one. SIGTERM and SIGINT finish what is in flight.`,
		Example: `  thaw serve registry.example/team/app:v1
  thaw serve oci:/srv/images:app --listen unix:/run/app.sock --cache /var/cache/thaw
  thaw serve registry.example/a:1 registry.example/b:2 --listen tcp:127.0.0.1:10809

  nbd-client -unix /run/app.sock /dev/nbd0
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/app.sock,format=raw,readonly=on …`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.serve(c.Context(), args, o) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.listen, "listen", nil, "unix:PATH or tcp:HOST:PORT (repeatable; default unix:"+defaultSocket()+")")
	f.StringVar(&o.cache, "cache", o.cache, "directory for what was fetched")
	f.Var(&o.quota, "cache-size", "bound on what is kept there; the longest unused goes first (default: the disk)")
	f.DurationVar(&o.grace, "grace", 30*time.Second, "for what is in flight when it is told to stop")
	f.BoolVar(&o.readOnly, "read-only", true, "refuse writes: the only mode there is")
	f.BoolVar(&o.exposed, "allow-plaintext", false, "listen beyond this host without TLS")
	f.BoolVar(&a.json, "json", false, "say that it is ready as JSON")
	return c
}

// defaultSocket is where clients of this user find the server.
func defaultSocket() string {
	if os.Getuid() == 0 {
		return "/run/thaw.sock"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "thaw.sock")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("thaw-%d.sock", os.Getuid()))
}

func defaultCache() string {
	if os.Getuid() == 0 {
		return "/var/cache/thaw"
	}
	if dir, err := os.UserCacheDir(); err == nil {
		return filepath.Join(dir, "thaw")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("thaw-%d", os.Getuid()))
}

func (a *app) serve(ctx context.Context, names []string, o serveOptions) (err error) {
	if !o.readOnly {
		return usageError{errors.New("--read-only=false: writable devices are not there yet")}
	}
	log, err := a.log()
	if err != nil {
		return err
	}
	platform, err := a.wantedPlatform()
	if err != nil {
		return err
	}
	client, err := a.client(log)
	if err != nil {
		return err
	}
	defer client.Close()
	cache, err := blockmap.OpenCache(o.cache, blockmap.CacheOptions{Quota: int64(o.quota), Boot: bootID(log), Log: log})
	if errors.Is(err, blockmap.ErrLocked) {
		return fmt.Errorf("%w; give this one a --cache of its own", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cache.Close()) }()
	f := fetcher.New(fetcher.Options{Log: log, Temporary: registry.Temporary, RetryAfter: registry.RetryAfter})
	defer f.Close()

	open := &opener{client: client, cache: cache, fetcher: f, platform: platform, log: log}
	images := make([]*blockmap.Image, len(names))
	g, gctx := errgroup.WithContext(ctx)
	for i, name := range names {
		g.Go(func() (err error) {
			images[i], err = open.open(gctx, name)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	exports := make(nbd.Static, len(names))
	for i, name := range names {
		exports[i] = nbd.Export{Name: name, Description: "read-only block image", Device: images[i], ReadOnly: true}
	}
	listeners, err := listen(ctx, o)
	if err != nil {
		return err
	}
	server := &nbd.Server{Exports: named{exports}, Log: log}
	if err := a.announce(exports, listeners); err != nil {
		return errors.Join(err, server.Close())
	}
	err = serveUntil(ctx, server, listeners, o.grace)
	summary(log, f.Stats(), cache, images)
	return err
}

// named is a list of exports of which a single one is the default.
type named struct{ nbd.Static }

func (n named) Open(ctx context.Context, name string, c nbd.ClientInfo) (*nbd.Export, func(), error) {
	if name == "" && len(n.Static) > 1 {
		return nil, nil, nbd.ErrUnknownExport
	}
	return n.Static.Open(ctx, name, c)
}

// bootID tells this run of the kernel from others. Without one the cache
// trusts only what was made durable.
func bootID(log *slog.Logger) blockmap.BootID {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var id blockmap.BootID
	if err == nil {
		id, err = blockmap.ParseBootID(strings.TrimSpace(string(b)))
	}
	if err != nil {
		log.Warn("no boot ID; after a crash what was fetched last is fetched again", "cause", err)
	}
	return id
}

func listen(ctx context.Context, o serveOptions) (ls []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
		}
	}()
	if files := activation.Files(true); len(files) > 0 {
		if ls, err = nbd.ListenFiles(files); err != nil {
			return nil, err
		}
	}
	if len(ls) == 0 && len(o.listen) == 0 {
		o.listen = []string{"unix:" + defaultSocket()}
	}
	for _, addr := range o.listen {
		l, err := nbd.Listen(ctx, addr)
		if err != nil {
			return ls, err
		}
		ls = append(ls, l)
	}
	for _, l := range ls {
		if nbd.Exposed(l) && !o.exposed {
			return ls, usageError{fmt.Errorf("listening on %s shows images to other hosts, unencrypted, to whoever asks; say --allow-plaintext if that is meant", l.Addr())}
		}
	}
	return ls, nil
}

// announced is what --json says when serving has begun.
type announced struct {
	Type    string           `json:"type"`
	Exports []announceExport `json:"exports"`
	Listen  []string         `json:"listen"`
}

type announceExport struct {
	Name string `json:"name"`
	Size int64  `json:"bytes"`
	URI  string `json:"uri"`
}

func (a *app) announce(exports nbd.Static, ls []net.Listener) error {
	var out announced
	out.Type = "ready"
	for _, l := range ls {
		out.Listen = append(out.Listen, l.Addr().Network()+":"+l.Addr().String())
	}
	uris := make([]string, len(exports))
	for i, e := range exports {
		name := e.Name
		if len(exports) == 1 {
			name = ""
		}
		uris[i] = uri(ls[0].Addr(), name)
		out.Exports = append(out.Exports, announceExport{e.Name, e.Device.Size(), uris[i]})
	}
	if a.json {
		if err := a.printJSON(out); err != nil {
			return err
		}
	} else if _, err := fmt.Fprintf(a.stdout, "ready: %s\n", strings.Join(uris, " ")); err != nil {
		return err
	}
	_, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	return err
}

// uri is how NBD clients name an export, by NBD's doc/uri.md.
func uri(addr net.Addr, export string) string {
	u := url.URL{Scheme: "nbd", Host: addr.String(), Path: "/" + export}
	if addr.Network() == "unix" {
		u.Scheme, u.Host = "nbd+unix", ""
		u.OmitHost = false
		return "nbd+unix://" + u.EscapedPath() + "?socket=" + strings.ReplaceAll(url.QueryEscape(addr.String()), "%2F", "/")
	}
	return u.String()
}

// serveUntil serves until ctx ends, which is the orderly end, or a listener
// fails.
func serveUntil(ctx context.Context, server *nbd.Server, ls []net.Listener, grace time.Duration) error {
	failed := make(chan error, len(ls))
	for _, l := range ls {
		go func() { failed <- server.Serve(l) }()
	}
	var err error
	left := len(ls)
	select {
	case <-ctx.Done():
	case err = <-failed:
		left--
	}
	_, notifyErr := daemon.SdNotify(false, daemon.SdNotifyStopping)
	end, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if e := server.Shutdown(end); e != nil {
		err = errors.Join(err, fmt.Errorf("stop: %w", errors.Join(e, server.Close())))
	}
	for range left {
		if e := <-failed; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, notifyErr)
}

// summary says what serving took.
func summary(log *slog.Logger, st fetcher.Stats, cache *blockmap.Cache, images []*blockmap.Image) {
	var stored, content int64
	for _, m := range images {
		for i := range m.Index().Streams {
			t := &m.Index().Streams[i]
			stored += t.BlobSize
			content += int64(t.Blocks()) * blockmap.BlockSize
		}
	}
	log.Info("stopped", "fetched_bytes", st.Bytes, "fetched_chunks", st.Chunks, "requests", st.Requests,
		"images_stored_bytes", stored, "images_content_bytes", content,
		"local_chunks", st.Local, "retries", st.Retries, "wrong_chunks", st.Wrong, "failed_chunks", st.Failed,
		"cached_bytes", cache.Used(), "evicted_bytes", cache.Evicted())
}
