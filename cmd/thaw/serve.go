package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
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
	allow    []string
	exposed  bool

	tlsCert, tlsKey, tlsClientCA string
	tlsOptional                  bool
	clients                      []string

	trace traceOptions

	maxConns    int
	maxInFlight size
	handshake   time.Duration
}

func serveCommand(a *app) *cobra.Command {
	o := serveOptions{cache: defaultCache(), maxInFlight: nbd.DefaultMaxInFlightBytes}
	c := &cobra.Command{
		Use:   "serve [IMAGE...]",
		Short: "Serve images as network block devices",
		Long: `serve exports block images over NBD. A block is fetched when it is first read,
and kept in the cache; before the export is ready only its manifest and index
are fetched. What a start is known to read, by its traces, or is likely to, is
fetched ahead of it.

An IMAGE is a block image, or an image that has one beside it. Its name as given
is the name of the export; a single image is the default export as well.

With --allow, clients open what they name: the export's name is the reference.

When it is ready, one line on stdout says so, and systemd is notified where it
asked for that. Sockets passed by systemd are listened on instead of the default
one. SIGTERM and SIGINT finish what is in flight.`,
		Example: `  thaw serve registry.example/team/app:v1
  thaw serve oci:/srv/images:app --listen unix:/run/app.sock --cache /var/cache/thaw
  thaw serve registry.example/a:1 registry.example/b:2 --listen tcp:127.0.0.1:10809
  thaw serve registry.example/team/app:v1 --trace auto --trace-push
  thaw serve --allow 'registry.example/team/*' --listen unix:/run/team.sock
  thaw serve registry.example/a:1 --listen tcp:0.0.0.0:10809 --tls-cert cert.pem --tls-key key.pem \
    --tls-client-ca clients.pem --client host-7.example

  nbd-client -unix /run/app.sock /dev/nbd0
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/app.sock,format=raw,readonly=on …
  qemu-img info 'nbd+unix:///registry.example/team/app:v1?socket=/run/team.sock'`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 && len(o.allow) == 0 {
				return usageError{errors.New("name an image to serve, or --allow clients to name them")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return a.serve(c.Context(), args, o) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.listen, "listen", nil, "unix:PATH or tcp:HOST:PORT (repeatable; default unix:"+defaultSocket()+")")
	f.StringVar(&o.cache, "cache", o.cache, "directory for what was fetched")
	f.Var(&o.quota, "cache-size", "bound on what is kept there; the longest unused goes first (default: the disk)")
	f.DurationVar(&o.grace, "grace", 30*time.Second, "for what is in flight when it is told to stop")
	f.BoolVar(&o.readOnly, "read-only", true, "refuse writes: the only mode there is")
	f.StringArrayVar(&o.allow, "allow", nil, "let clients open references like this: * is anything but a slash, ** at the end anything (repeatable)")
	f.BoolVar(&o.exposed, "allow-plaintext", false, "listen beyond this host without TLS")
	f.StringVar(&o.tlsCert, "tls-cert", "", "file with the server's certificate chain; TLS is required then")
	f.StringVar(&o.tlsKey, "tls-key", "", "file with its key")
	f.StringVar(&o.tlsClientCA, "tls-client-ca", "", "file with the authorities that clients' certificates have to be of")
	f.BoolVar(&o.tlsOptional, "tls-optional", false, "serve clients without TLS, too")
	f.StringArrayVar(&o.clients, "client", nil, "serve only clients whose certificate has this name (repeatable)")
	f.IntVar(&o.maxConns, "max-connections", nbd.DefaultMaxConns, "at a time")
	f.Var(&o.maxInFlight, "max-in-flight", "bytes of requests that a connection may have waiting")
	f.DurationVar(&o.handshake, "handshake-timeout", nbd.DefaultHandshakeTimeout, "for a client to say what it wants")
	f.StringVar(&o.trace.record, "record", "", "record the start of the image to this file")
	f.DurationVar(&o.trace.recordFor, "record-for", 5*time.Minute, "how long a recording lasts from the first read")
	f.Var(&o.trace.recordBytes, "record-bytes", "how many bytes it may touch (default: any number)")
	f.DurationVar(&o.trace.recordQuiet, "record-quiet", 10*time.Second, "after which it ends when nothing new is read")
	f.StringArrayVar(&o.trace.use, "trace", nil, "fetch ahead what a trace says: a file, another version of the image, or auto for those beside the image, else recording one (repeatable)")
	f.BoolVar(&o.trace.push, "trace-push", false, "store what was recorded beside the image")
	f.Var(&o.trace.rate, "prefetch-rate", "bound on what is fetched ahead, bytes a second (default: the link)")
	o.trace.ahead = aheadOptions{metadata: true, readahead: true, program: true}
	f.Var(&o.trace.ahead, "fetch-ahead", "what to fetch ahead without a trace: metadata, readahead, program (what the image's program is made of), or none")
	f.IntVar(&o.trace.wait, "prefetch-wait", 0, "be ready only when so many percent of a trace are here")
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
	if err := patterns(o.allow).check(); err != nil {
		return err
	}
	if err := o.trace.check(len(names), len(o.allow) > 0); err != nil {
		return usageError{err}
	}
	tlsConfig, err := o.tls()
	if err != nil {
		return err
	}
	log, platform, client, err := a.access()
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
	// The threads that decompress are of low priority, and each has one of Go's
	// processors even while the kernel lets others go first.
	procs := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(procs + (procs+1)/2)
	defer runtime.GOMAXPROCS(procs)
	f := fetcher.New(fetcher.Options{
		Decoders: procs, Log: log, Temporary: registry.Temporary, RetryAfter: registry.RetryAfter,
	})
	defer f.Close()

	open := &opener{client: client, cache: cache, fetcher: f, platform: platform, log: log}
	traces := newTracer(o.trace, open, log)
	defer traces.stop()
	offered := newExports(o.allow, o.clients, func(ctx context.Context, name string) (blockmap.Device, func(), error) {
		start, image, err := traces.open(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		device, err := start.attach(image)
		return device, start.stop, err
	})
	starts, images := make([]*start, len(names)), make([]*openImage, len(names))
	g, gctx := errgroup.WithContext(ctx)
	for i, name := range names {
		g.Go(func() (err error) {
			starts[i], images[i], err = traces.open(gctx, name)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, name := range names {
		device, err := starts[i].attach(images[i])
		if err != nil {
			return err
		}
		if err := offered.add(name, device); err != nil {
			return err
		}
	}
	listeners, err := listen(ctx, o)
	if err != nil {
		return err
	}
	ctl := startControl(ctx, o.cache, log, traces.stopRecording, func() any { return f.Stats() })
	defer ctl.stop()
	for _, s := range starts {
		s.await(ctx)
	}
	server := &nbd.Server{
		Exports: offered, Log: log, TLSFunc: func() *tls.Config { return tlsConfig }, RequireTLS: tlsConfig != nil && !o.tlsOptional,
		MaxConns: o.maxConns, MaxInFlightBytes: int64(o.maxInFlight), HandshakeTimeout: o.handshake,
	}
	if err := a.announce(offered, listeners); err != nil {
		return errors.Join(err, server.Close())
	}
	err = serveUntil(ctx, server, listeners, o.grace)
	traces.stop()
	summary(log, f.Stats(), cache, images)
	return err
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
		if nbd.Exposed(l) && !o.exposed && (o.tlsCert == "" || o.tlsOptional) {
			return ls, usageError{fmt.Errorf("listening on %s shows images to other hosts, unencrypted, to whoever asks; give it a --tls-cert, or say --allow-plaintext if that is meant", l.Addr())}
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

func (a *app) announce(offered *exports, ls []net.Listener) error {
	out := announced{Type: "ready", Exports: []announceExport{}}
	for _, l := range ls {
		out.Listen = append(out.Listen, l.Addr().Network()+":"+l.Addr().String())
	}
	names, devices := offered.all()
	var uris []string
	for i, name := range names {
		export := name
		if len(names) == 1 {
			export = ""
		}
		uris = append(uris, uri(ls[0].Addr(), export))
		out.Exports = append(out.Exports, announceExport{name, devices[i].Size(), uris[i]})
	}
	if len(uris) == 0 {
		uris = out.Listen
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

// tls reads the certificates, and says what does not go together.
func (o *serveOptions) tls() (*tls.Config, error) {
	if o.tlsCert == "" {
		if o.tlsKey != "" || o.tlsClientCA != "" || o.tlsOptional || len(o.clients) > 0 {
			return nil, usageError{errors.New("TLS needs a --tls-cert")}
		}
		return nil, nil
	}
	if len(o.clients) > 0 && o.tlsClientCA == "" {
		return nil, usageError{errors.New("--client needs a --tls-client-ca: names are believed of certificates alone")}
	}
	cert, err := tls.LoadX509KeyPair(o.tlsCert, o.tlsKey)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate: %w", err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	if o.tlsClientCA != "" {
		b, err := os.ReadFile(o.tlsClientCA)
		if err != nil {
			return nil, fmt.Errorf("TLS client authorities: %w", err)
		}
		c.ClientCAs = x509.NewCertPool()
		if !c.ClientCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("TLS client authorities: %s has no certificate", o.tlsClientCA)
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
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
func summary(log *slog.Logger, st fetcher.Stats, cache *blockmap.Cache, images []*openImage) {
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
