package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"thaw/blockmap"
	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
	"thaw/fetcher/registry"
	"thaw/nbd"
	"thaw/nbd/vhost"
)

// serve serves until ctx ends. It returns a second after the grace at the latest, even if
// something still waits: all that is on disk is as safe as after a kill.
func (a *app) serve(ctx context.Context, names []string, o serveOptions) error {
	if err := o.check(names); err != nil {
		return err
	}
	pins, err := pinFlags(o.pin).of(o.images(names), len(o.allow) > 0)
	if err != nil {
		return err
	}
	warn, err := a.log()
	if err != nil {
		return err
	}
	pipe := newLogPipe(a.stderr, warn)
	defer pipe.close(time.Second, 2*time.Second)
	a.stderr = pipe
	find, err := a.access(ctx, nil)
	if err != nil {
		return err
	}
	find.Pins = pins
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
		err = fmt.Errorf("stop: requests or files were still waited for %v after the signal", o.grace+time.Second)
	}
	return err
}

// errGrace is why requests are abandoned when the grace is over.
var errGrace = errors.New("the --grace was over with requests still under way")

// service is one `thaw serve`.
type service struct {
	*app
	serveOptions
	find     *host.Finder
	limit    context.Context // ends with the grace
	stopping func()          // begins the grace
	ready    atomic.Bool
}

func (s *service) run(ctx context.Context, names []string) (err error) {
	server := &nbd.Server{
		Log: s.find.Log, MaxConns: s.maxConns, MaxInFlightBytes: int64(s.maxInFlight), HandshakeTimeout: s.handshake,
		WriteTimeout: s.write, IdleTimeout: s.idle,
	}
	machines := &vhost.Server{Log: s.find.Log, MaxInFlightBytes: int64(s.maxInFlight)}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	// The threads that decompress have low priority. Each occupies one of Go's processors
	// even while the kernel runs other threads, so there are more of these.
	procs := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(procs + (procs+1)/2)
	defer runtime.GOMAXPROCS(procs)
	admission, err := nbd.NewAdmission(nbd.Limits{Bytes: nodeInFlight})
	if err != nil {
		s.find.Close()
		return err
	}
	o := host.Options{
		Dir: s.cache, Mode: blockmap.Mode(s.mode), Quota: int64(s.quota), Trace: s.traceOptions(),
		Overlay: s.overlay, Sockets: host.SocketOptions{Dir: s.vhostUser, Server: machines}, Zone: s.serveOptions.zone.options(s.allow),
		Complete: host.CompleteOptions{After: time.Duration(s.complete), Rate: int64(s.completeRate)}, Decoders: procs, NBD: server, Admission: admission,
		EndsUnused: s.unused > 0, Patience: startPatience,
	}
	o.Finder = s.find
	h, err := awaitCache(ctx, s.find.Log, s.cache, func() (*host.Host, error) {
		if o.Finder == nil { // the last try has closed it
			find, err := s.access(ctx, nil)
			if err != nil {
				return nil, err
			}
			find.Pins = s.find.Pins
			s.find, o.Finder = find, find
		}
		h, err := host.Open(o)
		o.Finder = nil
		return h, err
	})
	if errors.Is(err, blockmap.ErrLocked) {
		return fmt.Errorf("%w; give this server a --cache of its own", err)
	}
	if err != nil {
		return err
	}
	defer h.Close()
	refresh, err := s.watchFiles(ctx, server)
	if err != nil {
		return err
	}
	refresh = append(refresh, h.RefreshZone)
	h.Recover() // before anybody can ask for nodes or devices, or add one
	control := api.Start(ctx, h, s.cache, thisVersion().Version, s.find.Log)
	defer func() { control.Stop(s.limit) }() // after the devices are closed, which it can tell meanwhile
	server.Exports = host.NewExports(h, s.allow, s.clients, s.tls.ClientCA != "")
	machines.Exports = host.NewExports(h, nil, nil, false) // whoever may connect to a socket may use its export
	devices, err := h.Add(ctx, s.specs(names)...)
	defer func() { // after the server has stopped, so that nobody reads a device
		err = errors.Join(err, h.Stop(s.limit))
		if s.ready.Load() {
			s.summary(h.Stats(), devices)
		}
	}()
	if err == nil && !s.nodesOnly {
		err = h.RestoreDevices(ctx)
	}
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
	background, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { host.Reload(background, hangup, refresh...) })

	waiting, cancel := context.WithTimeout(ctx, s.waitFor)
	defer cancel()
	for _, d := range devices {
		d.AwaitPrefetch(waiting, float64(s.wait)/100)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	h.SetServing()
	s.ready.Store(true)
	if err := s.announce(ctx, h, devices, listeners, server.RequireTLS); err != nil {
		s.find.Log.Warn("cannot announce that the server is ready", "err", err)
		s.stdout.err = nil
	}
	if s.unused > 0 {
		var end context.CancelFunc
		ctx, end = context.WithCancel(ctx)
		wg.Go(func() { s.awaitUnused(background, h, end) })
	}
	return s.serveUntil(ctx, server, machines, listeners, h)
}

// startPatience is host.Options.Patience. Tests raise it.
var startPatience time.Duration

// nodeInFlight is how many bytes the requests of all nodes have in flight.
const nodeInFlight = 256 << 20

// awaitUnused calls end when nobody has used h for the time of --exit-unused.
func (s *service) awaitUnused(ctx context.Context, h *host.Host, end func()) {
	defer end()
	every := time.NewTicker(max(min(s.unused/4, time.Second), time.Millisecond))
	defer every.Stop()
	for since := time.Now(); ; {
		select {
		case <-every.C:
			if h.Used() {
				since = time.Now()
			} else if time.Since(since) >= s.unused && h.EndUnused() {
				s.find.Log.Info("nobody uses this server any more", "unused", s.unused)
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// watchFiles reads the hosts file and the certificates. The functions that it returns
// read them again.
func (s *service) watchFiles(ctx context.Context, server *nbd.Server) (refresh []func(force bool), err error) {
	if s.hosts != "" {
		mirrors, err := interruptible(ctx, func() (func(bool), error) {
			return host.WatchMirrors(s.hosts, func() (registry.Mirrors, error) { return readMirrors(s.hosts) }, s.find.Client, s.find.Log)
		})
		if err != nil {
			return nil, err
		}
		refresh = append(refresh, mirrors)
	}
	if s.tls.Cert != "" {
		files, err := interruptible(ctx, func() (*host.Watched[*tls.Config], error) { return s.tls.Watch(s.find.Log) })
		if err != nil {
			return nil, err
		}
		server.TLSFunc, server.RequireTLS = files.Get, !s.tlsOptional
		refresh = append(refresh, func(force bool) { files.Refresh(force) })
	}
	return refresh, nil
}

// specs are the devices of the command line. The socket of a single image is that of the
// default export.
func (o *serveOptions) specs(names []string) (all []host.Spec) {
	for _, name := range names {
		all = append(all, host.Spec{Name: name})
	}
	if len(names) == 1 && !o.isClients(names[0]) {
		all[0].Socket = defaultSocketName
	}
	return all
}

// defaultSocketName is the name of the socket of a single image, without its suffix.
const defaultSocketName = "default"

// serveUntil serves until ctx ends, which is no error, or until a listener fails.
func (s *service) serveUntil(ctx context.Context, server *nbd.Server, machines *vhost.Server, ls []net.Listener, h *host.Host) error {
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
	case err = <-h.SocketFailed():
	}
	s.stopping()
	h.SetStopping()
	_, notifyErr := daemon.SdNotify(false, daemon.SdNotifyStopping)
	// Recordings end now, so that the grace is left to store them.
	var wg sync.WaitGroup
	wg.Go(func() { h.StopRecordings(s.limit) })
	wg.Go(func() { _ = h.StopNodes(s.limit) }) // h.Stop returns its error, too
	var machinesErr error
	wg.Go(func() { machinesErr = shutdown(s.limit, machines) })
	err = errors.Join(err, shutdown(s.limit, server))
	wg.Wait()
	err = errors.Join(err, machinesErr)
	for range left {
		if e := <-failed; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, notifyErr)
}

// shutdown stops a server within limit, or at once where that ends.
func shutdown(limit context.Context, server interface {
	Shutdown(context.Context) error
	Close() error
}) error {
	if err := server.Shutdown(limit); err != nil {
		return fmt.Errorf("stop: %w", errors.Join(err, server.Close()))
	}
	return nil
}

// summary logs what serving took.
func (s *service) summary(st host.Stats, devices []*host.Device) {
	var stored, content int64
	counted := make(map[string]bool) // several devices can have one image
	for _, d := range devices {
		if in := d.Info(); !counted[in.Digest] {
			counted[in.Digest] = true
			stored += in.Stored
			content += in.Content
		}
	}
	s.find.Log.Info("stopped", "fetched_bytes", st.Bytes, "fetched_chunks", st.Chunks, "fetched_leaves", st.Leaves, "requests", st.Requests,
		"images_stored_bytes", stored, "images_content_bytes", content,
		"local_chunks", st.Local, "retries", st.Retries, "wrong_chunks", st.Wrong, "failed_chunks", st.Failed,
		"held_chunks", st.Stats.Held, "overtaken_requests", st.Overtaken, "cancelled_fetches", st.Cancelled,
		"cached_bytes", st.Cached, "evicted_bytes", st.Evicted, "damaged", st.Damaged)
}
