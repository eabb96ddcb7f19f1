package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

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
	pin      []string
	exposed  bool

	tls         tlsFiles
	tlsOptional bool
	clients     []string

	trace traceOptions

	maxConns               int
	maxInFlight            size
	handshake, write, idle time.Duration
}

func serveCommand(a *app) *cobra.Command {
	o := serveOptions{maxInFlight: nbd.DefaultMaxInFlightBytes}
	c := &cobra.Command{
		Use:   "serve [IMAGE...]",
		Short: "Serve images as network block devices",
		Long: `serve exports block images over NBD. A block is fetched when it is first read,
and kept in the cache; before the export is ready only its manifest and index
are fetched. What a start is known to read, by its traces, or is likely to, is
fetched ahead of it.

An IMAGE is a block image, or an image that has one beside it. Its name as given
is the name of the export; a single image is the default export as well.

` + allowHelp + `

What the cache has is served without waiting for the registry: at once where the
name is a digest or --pin names one, and else when the registry has not answered
within 2 s.

When it is ready, one line on stdout says so: "ready:", and for each image a URI
and a reference by the digest of the block image, which can be pinned. systemd is
notified where it asked for that. Sockets passed by systemd are listened on
instead of the default one. A socket of the abstract namespace (unix:@NAME) has no
URI; qemu takes server.type=unix,server.path=NAME,server.abstract=on.

SIGTERM and SIGINT finish what is in flight, within --grace. SIGHUP reads the
files of --tls-cert, --tls-key, --tls-client-ca and --hosts again; so does a change
of them. A file that cannot be used is a warning.

--record writes to a temporary file beside FILE, which becomes FILE when the
recording ends. A server that is killed leaves it; the next one to record there
makes it FILE.interrupted. Recordings of --trace auto that are not stored beside
the image are kept in the cache directory, under traces, the last 32.`,
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
	f.StringArrayVar(&o.listen, "listen", nil, "unix:PATH or tcp:HOST:PORT (repeatable; default: "+socketUsage+")")
	f.StringVar(&o.cache, "cache", "", "directory for what was fetched (default: "+cacheUsage+")")
	f.Var(&o.quota, "cache-size", "bound on what is kept there, at least 16M; the longest unused goes first (default: the disk)")
	f.DurationVar(&o.grace, "grace", 30*time.Second, "for what is in flight when it is told to stop; about a second later it is gone")
	f.BoolVar(&o.readOnly, "read-only", true, "refuse writes: the only mode there is")
	f.StringArrayVar(&o.allow, "allow", nil, "let clients open references like this, as in registry.example/team/* (repeatable)")
	f.StringArrayVar(&o.pin, "pin", nil, pinUsage)
	f.BoolVar(&o.exposed, "allow-plaintext", false, "listen beyond this host without TLS")
	f.StringVar(&o.tls.cert, "tls-cert", "", "file with the server's certificate chain; TLS is required then")
	f.StringVar(&o.tls.key, "tls-key", "", "file with its key")
	f.StringVar(&o.tls.clientCA, "tls-client-ca", "", "file with the authorities that clients' certificates have to be of")
	f.BoolVar(&o.tlsOptional, "tls-optional", false, "serve clients without TLS, too")
	f.StringArrayVar(&o.clients, "client", nil, "serve only clients whose certificate has this name (repeatable)")
	f.IntVar(&o.maxConns, "max-connections", nbd.DefaultMaxConns, "at a time")
	f.Var(&o.maxInFlight, "max-in-flight", "bytes of requests that a connection may have waiting")
	f.DurationVar(&o.handshake, "handshake-timeout", nbd.DefaultHandshakeTimeout, "for a client to say what it wants")
	f.DurationVar(&o.write, "write-timeout", 0, "cut off a client that takes no byte of its replies for so long (default: never)")
	f.DurationVar(&o.idle, "idle-timeout", 0, "cut off a client that asks for nothing for so long (default: never)")
	f.StringVar(&o.trace.record, "record", "", "record the start of the image to this file, which is replaced when the recording ends")
	f.DurationVar(&o.trace.recordFor, "record-for", 5*time.Minute, "how long a recording lasts from the first read")
	f.Var(&o.trace.recordBytes, "record-bytes", "how many bytes it may touch (default: any number)")
	f.DurationVar(&o.trace.recordQuiet, "record-quiet", 10*time.Second, "after which it ends when nothing new is read")
	f.StringArrayVar(&o.trace.use, "trace", nil, "fetch ahead what a trace says: a file, another version of the image, or auto for those beside the image, else recording one (repeatable)")
	f.BoolVar(&o.trace.push, "trace-push", false, "store what was recorded beside the image")
	f.Var(&o.trace.rate, "prefetch-rate", "bound on what is fetched ahead, bytes a second (default: the link)")
	o.trace.ahead = aheadOptions{metadata: true, readahead: true, program: true}
	f.Var(&o.trace.ahead, "fetch-ahead", "what to fetch ahead without a trace: metadata, readahead, program (what the image's program is made of), or none")
	f.IntVar(&o.trace.wait, "prefetch-wait", 0, "delay readiness until this share of the trace is prefetched, in percent (default: do not wait)")
	f.DurationVar(&o.trace.waitFor, "prefetch-wait-for", time.Minute, "and be ready all the same after so long")
	f.BoolVar(&a.json, "json", false, "say that it is ready as JSON")
	return c
}

// minQuota is the smallest cache that is of use: a few chunks of the largest
// size, and what is in flight.
const minQuota = 16 << 20

// check says what does not go together, and fills in what depends on the user.
func (o *serveOptions) check(images int) (err error) {
	if !o.readOnly {
		return usageError{errors.New("--read-only=false: writable devices are not there yet")}
	}
	if err := patterns(o.allow).check(); err != nil {
		return err
	}
	if err := o.trace.check(images, len(o.allow) > 0); err != nil {
		return usageError{err}
	}
	if o.quota > 0 && o.quota < minQuota {
		return usageError{fmt.Errorf("--cache-size %s: a cache of less than %s cannot hold what is being read; give it more",
			o.quota.String(), sizeString(minQuota))}
	}
	for flag, d := range map[string]time.Duration{
		"grace": o.grace, "handshake-timeout": o.handshake, "write-timeout": o.write, "idle-timeout": o.idle,
	} {
		if d < 0 {
			return usageError{fmt.Errorf("--%s %v: a time is not negative", flag, d)}
		}
	}
	if o.cache == "" {
		if o.cache, err = defaultCache(os.Getuid()); err != nil {
			return err
		}
	}
	return o.tls.check(o.tlsOptional, o.clients)
}

// serve serves until ctx ends, and for not much longer than the grace after that,
// whatever still waits for something then: what is left to a process that ends is
// as good as what is left to one that is killed.
func (a *app) serve(ctx context.Context, names []string, o serveOptions) error {
	if err := o.check(len(names)); err != nil {
		return err
	}
	pins, err := pinFlags(o.pin).of(names, len(o.allow) > 0)
	if err != nil {
		return err
	}
	warn, err := a.log()
	if err != nil {
		return err
	}
	pipe := newLogPipe(a.stderr, warn)
	defer pipe.close(time.Second / 4)
	a.stderr = pipe
	find, err := a.access(ctx, nil)
	if err != nil {
		return err
	}
	find.pins = pins
	s := &service{app: a, serveOptions: o, find: find}
	var limited context.CancelCauseFunc
	s.limit, limited = context.WithCancelCause(context.Background())
	defer limited(nil)
	s.stopping = sync.OnceFunc(func() { time.AfterFunc(o.grace, func() { limited(errGrace) }) })
	context.AfterFunc(ctx, s.stopping)
	ended := make(chan error, 1)
	go func() { ended <- s.run(ctx, names) }()
	select {
	case err = <-ended:
		return err
	case <-s.limit.Done():
	}
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case err = <-ended:
	case <-t.C:
		err = fmt.Errorf("stop: not all had ended %v after the signal", o.grace+time.Second)
	}
	return err
}

// errGrace says that some had no answer when the time for that was over.
var errGrace = errors.New("the --grace was over with requests still under way")

// service is one `thaw serve`.
type service struct {
	*app
	serveOptions
	find     *finder
	limit    context.Context // ends with the grace
	stopping func()          // has the grace begin
}

func (s *service) run(ctx context.Context, names []string) (err error) {
	defer s.find.close()
	log := s.find.log
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	refreshMirrors, err := watchMirrors(ctx, s.hosts, s.find.client, log)
	if err != nil {
		return err
	}
	refresh := []func(bool){refreshMirrors}
	server := &nbd.Server{
		Log: log, MaxConns: s.maxConns, MaxInFlightBytes: int64(s.maxInFlight), HandshakeTimeout: s.handshake,
		WriteTimeout: s.write, IdleTimeout: s.idle,
	}
	if s.tls.cert != "" {
		files, err := s.tls.watch(ctx, log)
		if err != nil {
			return err
		}
		server.TLSFunc, server.RequireTLS = files.get, !s.tlsOptional
		refresh = append(refresh, func(force bool) { files.refresh(force) })
	}
	cache, err := blockmap.OpenCache(s.cache, blockmap.CacheOptions{Quota: int64(s.quota), Boot: bootID(log), Log: log})
	if errors.Is(err, blockmap.ErrLocked) {
		return fmt.Errorf("%w; give this one a --cache of its own", err)
	}
	if err != nil {
		return err
	}
	defer func() {
		// A full disk, as a rule. Nothing is lost that cannot be fetched again.
		if err := cache.Close(); err != nil {
			log.Warn("the cache could not be made durable; what was fetched last is fetched again", "err", err)
		}
	}()
	// The threads that decompress are of low priority, and each has one of Go's
	// processors even while the kernel lets others go first.
	procs := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(procs + (procs+1)/2)
	defer runtime.GOMAXPROCS(procs)
	f := fetcher.New(fetcher.Options{
		Decoders: procs, Log: log, Temporary: registry.Temporary, RetryAfter: registry.RetryAfter,
	})
	defer f.Close()

	traces := newTracer(s.limit, s.trace, &opener{finder: s.find, cache: cache, fetcher: f}, recordDir{s.cache})
	offered := newExports(s.allow, s.clients, log, traces.serve)
	server.Exports = offered
	starts, images, err := s.open(ctx, traces, offered, names)
	defer func() { // when nothing is read any more
		offered.stop()
		traces.stop()
		if traces.ready.Load() {
			summary(log, f.Stats(), cache, images)
		}
		for _, m := range images {
			m.close()
		}
	}()
	if err != nil {
		return err
	}
	listeners, err := listen(ctx, s.serveOptions)
	if err != nil {
		return err
	}
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	ctl := startControl(ctx, s.cache, log, traces.stopRecording, func() any { return statsOf(f, cache) })
	defer ctl.stop()
	background, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { reloading(background, hangup, refresh...) })

	waiting, cancel := context.WithTimeout(ctx, s.trace.waitFor)
	defer cancel()
	for _, x := range starts {
		x.await(waiting)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	traces.ready.Store(true)
	if err := s.announce(ctx, offered, listeners, server.RequireTLS); err != nil {
		log.Warn("nobody has heard that the server is ready", "err", err)
		s.stdout.err = nil
	}
	return s.serveUntil(ctx, server, listeners, traces)
}

// open opens the images that are served for good.
func (s *service) open(ctx context.Context, traces *tracer, offered *exports, names []string) ([]*start, []*openImage, error) {
	starts, images := make([]*start, len(names)), make([]*openImage, len(names))
	g, gctx := errgroup.WithContext(ctx)
	for i, name := range names {
		g.Go(func() (err error) {
			starts[i], images[i], err = traces.open(gctx, name)
			return err
		})
	}
	err := g.Wait()
	for i, name := range names {
		if err != nil {
			break
		}
		var device blockmap.Device
		if device, err = starts[i].attach(ctx, images[i]); err == nil {
			err = offered.add(fixedExport{name, images[i].of, device})
		}
	}
	images = slices.DeleteFunc(images, func(m *openImage) bool { return m == nil })
	if err == nil {
		err = ctx.Err()
	}
	return starts, images, err
}

// serve opens an image for exports.
func (t *tracer) serve(ctx context.Context, name string) (blockmap.Device, func(), error) {
	s, image, err := t.open(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	done := func() {
		s.stop()
		image.close()
	}
	device, err := s.attach(ctx, image)
	if err != nil {
		done()
		return nil, nil, err
	}
	return device, done, nil
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
		log.Warn("no boot ID; after a crash what was fetched last is fetched again", "err", err)
	}
	return id
}

// serveUntil serves until ctx ends, which is the orderly end, or a listener
// fails.
func (s *service) serveUntil(ctx context.Context, server *nbd.Server, ls []net.Listener, traces *tracer) error {
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
	s.stopping()
	_, notifyErr := daemon.SdNotify(false, daemon.SdNotifyStopping)
	// Recordings end now: there is a time to store them then.
	var wg sync.WaitGroup
	wg.Go(func() { traces.stopRecording() })
	if e := server.Shutdown(s.limit); e != nil {
		err = errors.Join(err, fmt.Errorf("stop: %w", errors.Join(e, server.Close())))
	}
	wg.Wait()
	for range left {
		if e := <-failed; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, notifyErr)
}

// stats is what the control socket says of a running server.
type stats struct {
	fetcher.Stats
	Cached      int64 `json:"cached_bytes"`    // on disk, what describes it included
	Held        int64 `json:"held_bytes"`      // in memory, since the disk has no room
	Evicted     int64 `json:"evicted_bytes"`   // since the start
	Damaged     int64 `json:"damaged"`         // chunks and files of the cache that could not be read
	OpenStreams int64 `json:"open_streams"`    // whose files are open
	Goroutines  int   `json:"goroutines"`      // of the process
	Memory      int64 `json:"go_memory_bytes"` // that Go has from the system
}

func statsOf(f *fetcher.Fetcher, c *blockmap.Cache) stats {
	memory := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
	metrics.Read(memory)
	return stats{
		f.Stats(), c.Used(), c.Held(), c.Evicted(), c.Damaged(), c.OpenStreams(), runtime.NumGoroutine(), int64(memory[0].Value.Uint64()),
	}
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
		"held_chunks", st.Held, "overtaken_requests", st.Overtaken, "cancelled_fetches", st.Cancelled,
		"cached_bytes", cache.Used(), "evicted_bytes", cache.Evicted(), "damaged", cache.Damaged())
}
