package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"thaw/blockmap"
	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	listen      []string
	vhostUser   string
	cache       string
	mode        modeFlag
	quota       size
	grace       time.Duration
	overlay     host.OverlayOptions
	overlaySize size
	allow       []string
	pin         []string
	exposed     bool
	nodesOnly   bool
	unused      time.Duration // 0: never

	tls         host.TLSFiles
	tlsOptional bool
	clients     []string

	zone zoneFlags

	trace       host.TraceOptions
	ahead       aheadFlag
	recordBytes size
	rate        size
	wait        int // percent
	waitFor     time.Duration

	complete     completeFlag
	completeRate size

	maxConns               int
	maxInFlight            size
	handshake, write, idle time.Duration
}

func serveCommand(a *app) *cobra.Command {
	o := serveOptions{mode: modeFlag(blockmap.Buffered), maxInFlight: nbd.DefaultMaxInFlightBytes}
	c := &cobra.Command{
		Use:   "serve [IMAGE...]",
		Short: "Serve images as network block devices and disks of virtual machines",
		Long: `serve exports block images over NBD, and to virtual machines over vhost-user. It
fetches a block when a client first reads it, and keeps it in the cache. Before an
export is ready, serve fetches only its manifest and index. It prefetches the blocks
that startup is known to read, from traces, or is likely to read.

IMAGE is a block image, or an image that has a block image beside it. The name of
the export is IMAGE as given. A single image is also the default export.

Exports are read-only unless a flag says where changes are kept. All connections to
an export share its changes. A flush covers the writes of all of them, and what was
flushed outlives a crash of the server and of the machine.

  --overlay DIR       keep the changes of one IMAGE in DIR, for the next serve
  --overlay-each DIR  let each client keep changes of its own: a client that opens
                      IMAGE~NAME writes to the overlay DIR/NAME. All overlays share
                      the cache. IMAGE itself is read-only
  --ephemeral         forget the changes when serve ends. A client that opens
                      IMAGE~NAME has changes of its own, which are forgotten a
                      minute after its last connection. Changes of clients that are
                      connected when serve ends, or is killed, are there in the next
                      serve, since these clients may connect again

NAME has at most 128 letters, digits, dots, dashes and underscores, and is NAME again
when the client connects again. With --tls-client-ca, NAME must be a name in the
client's certificate, or one of a subdomain: vm-3.host-7.example is the
certificate's that has host-7.example. ~NAME is an overlay of the default export.

An overlay belongs to the block image on which it was made. If the tag has moved
since, serve warns and serves the overlay's own base. An overlay of another
repository, or of another digest than IMAGE or --pin names, is refused.

With --vhost-user, each export has a socket in DIR, through which a virtual machine
has it as its disk (vhost-user-blk). Only this user and root can connect to it. The
name of the socket is

  default.sock   for a single IMAGE
  NAME.sock      for IMAGE~NAME: with --overlay-each or --ephemeral, an IMAGE~NAME on
                 the command line is a writable disk of its own for one machine
  EXPORT.sock    for other exports, with underscores for all but letters, digits,
                 dots, dashes and underscores

Devices that the control socket adds get a socket as well. They are there again in the
next serve in the same cache directory, with the same images, overlays and sockets,
until they are removed. A writable export has one virtual machine at a time. When the
server was killed, QEMU and Cloud Hypervisor connect to the next one, and their guests
go on.

` + allowHelp + `

An image that is in the cache is served without waiting for the registry: at once
if IMAGE has a digest or is pinned by --pin, otherwise if the registry does not
answer within 2 s.

When all images are ready, serve prints one line on stdout: "ready:", and for each
image a URI, its socket for a virtual machine as vhost-user:PATH, and a reference
with the digest of the block image, which can be pinned. It notifies systemd if
systemd asks for that. It listens on sockets passed by systemd instead of the
default one. A socket of the abstract namespace
(unix:@NAME) has no URI; qemu takes server.type=unix,server.path=NAME,server.abstract=on.

thaw attach and thaw mount ask a running server for nodes, which are block devices
below /dev. serve keeps a list of its nodes in the cache directory. If it is killed,
the next serve in the same cache directory goes on serving them. With the drivers
ublk and nbd, readers and writers wait for it. With the driver fuse, their requests
fail, and thaw mount heals a mount: it mounts the image anew, with all that was
flushed to its overlay. --nodes-only serves nothing else.

On SIGTERM and SIGINT, serve finishes the requests in flight, within --grace, and
detaches the nodes that are not in use. A node in use of the drivers ublk and nbd
stays: its readers and writers wait for the next serve. serve waits, within --grace,
until nodes in use of the driver fuse are unmounted; then their reads fail with EIO,
and serve names them and exits with 1.

serve reads the files of --tls-cert, --tls-key, --tls-client-ca, --hosts, --zone-cert,
--zone-key, --zone-ca and --zone-secret again when they change, and on SIGHUP. If it
cannot use a file, it logs a warning and keeps the earlier content.

With --zone NAME, serve shares chunks with the other hosts of the zone: each chunk is
fetched from the registry by the host that owns it, and the others get it from there.
Hosts find each other by --zone-join, and prove who they are by certificates. Without
--zone-cert, a zone is one of this machine: all addresses are loopback ones. A host that
reaches nobody works alone. Peers can read what they know the digest of, of the
repositories that --zone-allow matches, or else of --allow and of the registries that
this host has images of. thaw zone shows the peers.

With --trace auto --trace-push, serve packs a bundle in the background once the
first start has been recorded. It then compares each start with what is stored. If
three starts in a row on this host read less than half of that, or mostly something
else, serve replaces the traces and packs a new bundle.

Once no client has waited for the registry for some time (--complete), serve fetches
the rest of the image. These requests pause while a client waits. When all of the
image is in the cache, the device works without its registry. thaw status shows how
much is missing. --complete-rate limits the bytes per second. serve does not begin if
the cache has no room for all of the rest.

--record FILE writes to a temporary file beside FILE and renames it to FILE when
the recording ends. A server that is killed leaves the temporary file; the next
recording to FILE renames it to FILE.interrupted. Recordings of --trace auto that
are not stored beside the image stay in the cache directory, under traces; serve
keeps the newest 32.`,
		Example: `  thaw serve registry.example/team/app:v1
  thaw serve oci:/srv/images:app --listen unix:/run/app.sock --cache /var/cache/thaw
  thaw serve registry.example/a:1 registry.example/b:2 --listen tcp:127.0.0.1:10809
  thaw serve registry.example/team/app:v1 --trace auto --trace-push
  thaw serve --allow 'registry.example/team/*' --listen unix:/run/team.sock
  thaw serve registry.example/team/app:v1 --overlay /var/lib/vm7 --listen unix:/run/vm7.sock
  thaw serve registry.example/team/app:v1 --overlay-each /var/lib/vms --overlay-size 10G --listen unix:/run/app.sock
  thaw serve registry.example/team/app:v1 --vhost-user /run/vms --overlay /var/lib/vm7
  thaw serve registry.example/team/app:v1~vm7 registry.example/team/app:v1~vm8 --vhost-user /run/vms --overlay-each /var/lib/vms
  thaw serve registry.example/a:1 --listen tcp:0.0.0.0:10809 --tls-cert cert.pem --tls-key key.pem \
    --tls-client-ca clients.pem --client host-7.example
  thaw serve --nodes-only --zone prod --zone-listen :7946 --zone-join dns:thaw.prod.svc.cluster.local \
    --zone-cert cert.pem --zone-key key.pem --zone-ca ca.pem --zone-secret secret --zone-allow 'registry.example/**'

  nbd-client -unix /run/app.sock /dev/nbd0
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/app.sock,format=raw,readonly=on …
  qemu-system-x86_64 -drive file=nbd+unix:///~vm7?socket=/run/app.sock,format=raw …
  qemu-img info 'nbd+unix:///registry.example/team/app:v1?socket=/run/team.sock'
  qemu-system-x86_64 -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem -m 1G \
    -chardev socket,id=disk,path=/run/vms/vm7.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk …`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 && len(o.allow) == 0 && !o.nodesOnly && o.vhostUser == "" {
				return usageError{errors.New("name an image to serve, or let clients name images with --allow, or pass --nodes-only, or --vhost-user for devices that the control socket adds")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return a.serve(c.Context(), args, o) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.listen, "listen", nil, "`ADDRESS` to listen on: unix:PATH or tcp:HOST:PORT (repeatable; default: "+socketUsage+")")
	f.StringVar(&o.vhostUser, "vhost-user", "", "make a vhost-user-blk socket for each export in `DIR`, for virtual machines; without --listen, serve no NBD clients")
	f.StringVar(&o.cache, "cache", "", "keep the cache in `DIR` (default: "+cacheUsage+")")
	f.Var(&o.quota, "cache-size", "largest `SIZE` of the cache in bytes, or with K, M, G or T, at least 16M; thaw evicts the least recently used chunks (default: no limit but the disk)")
	f.Var(&o.mode, "cache-mode", "`MODE` of reading and writing the cache's disk: buffered keeps what is read often in the kernel's page cache; direct uses direct I/O, so that the cache takes no memory")
	f.DurationVar(&o.grace, "grace", 30*time.Second, "finish requests in flight for at most this `TIME` after a signal; the server exits about a second later at the latest")
	f.StringVar(&o.overlay.Dir, "overlay", "", "let clients write, and keep the changes of the one IMAGE in `DIR`")
	f.StringVar(&o.overlay.Each, "overlay-each", "", "let each client write to an overlay of its own in `DIR`: the client opens IMAGE~NAME")
	f.BoolVar(&o.overlay.Ephemeral, "ephemeral", false, "let clients write, and forget the changes at the end; until then they are in the cache directory")
	f.Var(&o.overlaySize, "overlay-size", "most changed data in each overlay, as a `SIZE`; beyond it, writes fail with ENOSPC (default: no limit but the disk)")
	f.StringArrayVar(&o.allow, "allow", nil, "let clients open references that match `PATTERN`, such as registry.example/team/* (repeatable)")
	f.StringArrayVar(&o.pin, "pin", nil, pinUsage)
	f.BoolVar(&o.nodesOnly, "nodes-only", false, "serve no images by NBD and listen for no clients: only attach what thaw attach and thaw mount ask for")
	f.DurationVar(&o.unused, "exit-unused", 0, "end when there has been no node and no device in use for this `TIME` (default: never)")
	f.BoolVar(&o.exposed, "allow-plaintext", false, "listen beyond this host without TLS")
	f.StringVar(&o.tls.Cert, "tls-cert", "", "require TLS of clients; `FILE` has the server's certificate chain")
	f.StringVar(&o.tls.Key, "tls-key", "", "`FILE` with the key of --tls-cert")
	f.StringVar(&o.tls.ClientCA, "tls-client-ca", "", "require certificates of clients; `FILE` has the authorities that issue them")
	f.BoolVar(&o.tlsOptional, "tls-optional", false, "serve clients without TLS as well")
	f.StringArrayVar(&o.clients, "client", nil, "serve only clients whose certificate has this `NAME` (repeatable)")
	f.IntVar(&o.maxConns, "max-connections", nbd.DefaultMaxConns, "serve at most `N` NBD connections at a time")
	f.Var(&o.maxInFlight, "max-in-flight", "most bytes, as a `SIZE`, of requests in flight on one connection")
	f.DurationVar(&o.handshake, "handshake-timeout", nbd.DefaultHandshakeTimeout, "disconnect a client that has not finished the NBD handshake within this `TIME`")
	f.DurationVar(&o.write, "write-timeout", 0, "disconnect a client that takes no byte of its replies for this `TIME` (default: never)")
	f.DurationVar(&o.idle, "idle-timeout", 0, "disconnect a client that sends no request for this `TIME` (default: never)")
	o.zone.add(f)
	f.StringVar(&o.trace.Record, "record", "", "record the start of the image into `FILE`, which is replaced when the recording ends")
	f.DurationVar(&o.trace.RecordFor, "record-for", 5*time.Minute, "end a recording this `TIME` after the first read")
	f.Var(&o.recordBytes, "record-bytes", "end a recording when this `SIZE` of the device has been read (default: no limit)")
	f.DurationVar(&o.trace.RecordQuiet, "record-quiet", 10*time.Second, "end a recording when no new block is read for this `TIME`")
	f.StringArrayVar(&o.trace.Use, "trace", nil, "prefetch by `TRACE`: a trace file, an image for the traces beside it, or auto for those beside the image itself, which is recorded if it has none (repeatable)")
	f.BoolVar(&o.trace.Push, "trace-push", false, "store recordings beside the image, and with --trace auto pack their bundle and renew both when starts change")
	f.Var(&o.rate, "prefetch-rate", "prefetch at most this `SIZE` per second (default: no limit)")
	o.ahead = aheadFlag{Metadata: true, Readahead: true, Program: true}
	f.Var(&o.ahead, "fetch-ahead", "`LIST` of what to prefetch without a trace: metadata, readahead, program (the files of the image's program), or none")
	f.IntVar(&o.wait, "prefetch-wait", 0, "delay readiness until this `PERCENT` of the trace is prefetched (default: do not wait)")
	f.DurationVar(&o.waitFor, "prefetch-wait-for", time.Minute, "delay readiness by at most this `TIME` for --prefetch-wait")
	o.complete = completeAfter
	f.Var(&o.complete, "complete", "fetch the rest of an image once no client has waited for the registry for this `TIME`, if the cache has room for it; or off")
	f.Var(&o.completeRate, "complete-rate", "fetch at most this `SIZE` per second for --complete (default: no limit)")
	f.BoolVar(&a.json, "json", false, "print the ready line as JSON")
	return c
}

// check fails if flags contradict each other, and sets the defaults that depend on the
// user.
func (o *serveOptions) check(names []string) (err error) {
	images := len(o.images(names))
	if err := o.checkOverlay(names); err != nil {
		return usageError{err}
	}
	if o.nodesOnly && (images > 0 || len(o.allow) > 0 || len(o.listen) > 0 || o.vhostUser != "" || o.overlay != (host.OverlayOptions{})) {
		return usageError{errors.New("--nodes-only takes no IMAGE, and no --allow, --listen, --vhost-user, --overlay, --overlay-each and --ephemeral: thaw attach and thaw mount name images and overlays")}
	}
	if o.vhostUser != "" && len(o.allow) > 0 && len(o.listen) == 0 && os.Getenv("LISTEN_FDS") == "" {
		return usageError{errors.New("--allow lets NBD clients name images, and --vhost-user alone serves none: add --listen ADDRESS")}
	}
	if err := host.Allow(o.allow).Check(); err != nil {
		return usageError{fmt.Errorf("--allow: %w", err)}
	}
	if err := o.checkTrace(images, len(o.allow) > 0); err != nil {
		return usageError{err}
	}
	if err := o.zone.check(); err != nil {
		return usageError{err}
	}
	if err := host.CheckQuota(int64(o.quota)); err != nil {
		return usageError{fmt.Errorf("--cache-size %s: %w", o.quota.String(), err)}
	}
	if o.maxConns < 1 {
		return usageError{fmt.Errorf("--max-connections %d: the server needs at least 1", o.maxConns)}
	}
	if o.maxInFlight < nbd.MinInFlightBytes {
		return usageError{fmt.Errorf("--max-in-flight %s: the least size is %dK, what one request needs", o.maxInFlight.String(), nbd.MinInFlightBytes>>10)}
	}
	for flag, d := range map[string]time.Duration{
		"grace": o.grace, "exit-unused": o.unused, "handshake-timeout": o.handshake, "write-timeout": o.write, "idle-timeout": o.idle,
	} {
		if d < 0 {
			return usageError{fmt.Errorf("--%s %v: a time cannot be negative", flag, d)}
		}
	}
	if o.cache == "" {
		if o.cache, err = defaultCache(os.Getuid()); err != nil {
			return err
		}
	}
	return o.checkTLS()
}

// isClients reports whether a name is IMAGE~NAME: the device of one client.
func (o *serveOptions) isClients(name string) bool {
	_, client := host.SplitClient(name)
	return client != "" && (o.overlay.Each != "" || o.overlay.Ephemeral)
}

// images are the images of the devices that the command line names, each once.
func (o *serveOptions) images(names []string) (images []string) {
	for _, name := range names {
		if o.isClients(name) {
			name, _ = host.SplitClient(name)
		}
		if !slices.Contains(images, name) {
			images = append(images, name)
		}
	}
	return images
}

func (o *serveOptions) checkOverlay(names []string) error {
	n := 0
	for _, on := range []bool{o.overlay.Dir != "", o.overlay.Each != "", o.overlay.Ephemeral} {
		if on {
			n++
		}
	}
	switch {
	case n > 1:
		return errors.New("--overlay, --overlay-each and --ephemeral exclude each other")
	case n == 0 && o.overlaySize != 0:
		return errors.New("--overlay-size limits an overlay: add --overlay DIR, --overlay-each DIR or --ephemeral")
	case o.overlay.Dir != "" && (len(names) != 1 || len(o.allow) > 0):
		return errors.New("--overlay keeps the changes of one image: serve one IMAGE without --allow, or pass --overlay-each DIR")
	}
	if o.overlay.Each == "" && !o.overlay.Ephemeral {
		for _, name := range names {
			_, client := host.SplitClient(name)
			if _, err := registry.ParseRef(name); client != "" && err != nil {
				return fmt.Errorf("%s would have changes of its own: add --overlay-each DIR to keep them, or --ephemeral to forget them", name)
			}
		}
	}
	o.overlay.Limit = int64(o.overlaySize)
	return nil
}

func (o *serveOptions) checkTrace(images int, others bool) error {
	auto := slices.Contains(o.trace.Use, host.Auto)
	switch {
	case o.trace.Record != "" && (images != 1 || others):
		return errors.New("--record records one image: serve one image only, without --allow")
	case o.trace.Push && !auto && o.trace.Record == "":
		return errors.New("--trace-push needs a recording: add --trace auto or --record FILE")
	case o.wait < 0 || o.wait > 100:
		return fmt.Errorf("--prefetch-wait %d: it must be a percentage, 0 to 100", o.wait)
	case o.waitFor < 0:
		return fmt.Errorf("--prefetch-wait-for %v: a time cannot be negative", o.waitFor)
	}
	return nil
}

func (o *serveOptions) checkTLS() error {
	switch f := o.tls; {
	case f.Cert == "" && (f.Key != "" || f.ClientCA != "" || o.tlsOptional || len(o.clients) > 0):
		return usageError{errors.New("TLS needs a --tls-cert")}
	case len(o.clients) > 0 && f.ClientCA == "":
		return usageError{errors.New("--client needs a --tls-client-ca: only a certificate proves a client's name")}
	}
	return nil
}

// traceOptions converts the flags.
func (o *serveOptions) traceOptions() host.TraceOptions {
	t := o.trace
	t.RecordBytes, t.Rate, t.Ahead = int64(o.recordBytes), int64(o.rate), host.Ahead(o.ahead)
	return t
}

// completeAfter is the default of --complete. Tests turn it off for servers that commands start.
var completeAfter = completeFlag(10 * time.Second)

// completeFlag is a flag with a time, or off, which is 0.
type completeFlag time.Duration

func (f *completeFlag) Type() string { return "time" }

func (f *completeFlag) String() string {
	if *f == 0 {
		return "off"
	}
	return time.Duration(*f).String()
}

func (f *completeFlag) Set(s string) error {
	if s == "off" {
		*f = 0
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return fmt.Errorf("%q: it must be off, or a time such as 10s", s)
	}
	*f = completeFlag(d)
	return nil
}

// modeFlag is the flag --cache-mode.
type modeFlag blockmap.Mode

func (f *modeFlag) Type() string   { return "mode" }
func (f *modeFlag) String() string { return string(*f) }

func (f *modeFlag) Set(s string) error {
	m, err := blockmap.ParseMode(s)
	if err == nil {
		*f = modeFlag(m)
	}
	return err
}

// aheadFlag is a flag that lists what to prefetch without a trace.
type aheadFlag host.Ahead

func (f *aheadFlag) Type() string { return "list" }

func (f *aheadFlag) String() string {
	var on []string
	for _, w := range f.words() {
		if *w.on {
			on = append(on, w.name)
		}
	}
	if on == nil {
		return "none"
	}
	return strings.Join(on, ",")
}

func (f *aheadFlag) Set(s string) error {
	*f = aheadFlag{}
	if s == "none" {
		return nil
	}
next:
	for _, given := range strings.Split(s, ",") {
		for _, w := range f.words() {
			if given == w.name {
				*w.on = true
				continue next
			}
		}
		return fmt.Errorf("%q: it must be none, or a list of metadata, readahead and program separated by commas", given)
	}
	return nil
}

type aheadWord struct {
	name string
	on   *bool
}

func (f *aheadFlag) words() []aheadWord {
	return []aheadWord{{"metadata", &f.Metadata}, {"readahead", &f.Readahead}, {"program", &f.Program}}
}

// allowHelp explains the patterns of --allow.
const allowHelp = `With --allow, a client opens an image by its reference, as the name of the export. A
pattern must match the whole reference, part by part:

  HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]    REPOSITORY alone is Docker Hub's
  oci:DIRECTORY[:TAG]

* matches anything within one component of a path, a tag, or one label of a host
name, and ? matches one character. * as the whole host matches any host. ** at the
end of a repository or directory matches anything, slashes included. HOST** matches
all of that host, and ** alone all registries, but no directory. The case of host
names does not matter. A port is matched only by a port. A pattern without a tag
matches any tag and digest; with a tag, only references without a digest; with a
digest, only that digest. Symbolic links in directories are resolved, and ".." is
not allowed. Clients cannot open archives.`
