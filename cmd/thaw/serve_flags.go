package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
	"thaw/nbd"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	listen   []string
	cache    string
	quota    size
	grace    time.Duration
	readOnly bool
	allow    []string
	pin      []string
	exposed  bool

	tls         host.TLSFiles
	tlsOptional bool
	clients     []string

	trace       host.TraceOptions
	ahead       aheadFlag
	recordBytes size
	rate        size
	wait        int // percent
	waitFor     time.Duration

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
	f.StringVar(&o.tls.Cert, "tls-cert", "", "file with the server's certificate chain; TLS is required then")
	f.StringVar(&o.tls.Key, "tls-key", "", "file with its key")
	f.StringVar(&o.tls.ClientCA, "tls-client-ca", "", "file with the authorities that clients' certificates have to be of")
	f.BoolVar(&o.tlsOptional, "tls-optional", false, "serve clients without TLS, too")
	f.StringArrayVar(&o.clients, "client", nil, "serve only clients whose certificate has this name (repeatable)")
	f.IntVar(&o.maxConns, "max-connections", nbd.DefaultMaxConns, "at a time")
	f.Var(&o.maxInFlight, "max-in-flight", "bytes of requests that a connection may have waiting")
	f.DurationVar(&o.handshake, "handshake-timeout", nbd.DefaultHandshakeTimeout, "for a client to say what it wants")
	f.DurationVar(&o.write, "write-timeout", 0, "cut off a client that takes no byte of its replies for so long (default: never)")
	f.DurationVar(&o.idle, "idle-timeout", 0, "cut off a client that asks for nothing for so long (default: never)")
	f.StringVar(&o.trace.Record, "record", "", "record the start of the image to this file, which is replaced when the recording ends")
	f.DurationVar(&o.trace.RecordFor, "record-for", 5*time.Minute, "how long a recording lasts from the first read")
	f.Var(&o.recordBytes, "record-bytes", "how many bytes it may touch (default: any number)")
	f.DurationVar(&o.trace.RecordQuiet, "record-quiet", 10*time.Second, "after which it ends when nothing new is read")
	f.StringArrayVar(&o.trace.Use, "trace", nil, "fetch ahead what a trace says: a file, another version of the image, or auto for those beside the image, else recording one (repeatable)")
	f.BoolVar(&o.trace.Push, "trace-push", false, "store what was recorded beside the image")
	f.Var(&o.rate, "prefetch-rate", "bound on what is fetched ahead, bytes a second (default: the link)")
	o.ahead = aheadFlag{Metadata: true, Readahead: true, Program: true}
	f.Var(&o.ahead, "fetch-ahead", "what to fetch ahead without a trace: metadata, readahead, program (what the image's program is made of), or none")
	f.IntVar(&o.wait, "prefetch-wait", 0, "delay readiness until this share of the trace is prefetched, in percent (default: do not wait)")
	f.DurationVar(&o.waitFor, "prefetch-wait-for", time.Minute, "and be ready all the same after so long")
	f.BoolVar(&a.json, "json", false, "say that it is ready as JSON")
	return c
}

// check says what does not go together, and fills in what depends on the user.
func (o *serveOptions) check(images int) (err error) {
	if !o.readOnly {
		return usageError{errors.New("--read-only=false: writable devices are not there yet")}
	}
	if err := host.Allow(o.allow).Check(); err != nil {
		return usageError{fmt.Errorf("--allow: %w", err)}
	}
	if err := o.checkTrace(images, len(o.allow) > 0); err != nil {
		return usageError{err}
	}
	if err := host.CheckQuota(int64(o.quota)); err != nil {
		return usageError{fmt.Errorf("--cache-size %s: %w", o.quota.String(), err)}
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
	return o.checkTLS()
}

func (o *serveOptions) checkTrace(images int, others bool) error {
	auto := slices.Contains(o.trace.Use, host.Auto)
	switch {
	case o.trace.Record != "" && (images != 1 || others):
		return errors.New("--record is of one image: serve one, and let clients open no others")
	case o.trace.Push && !auto && o.trace.Record == "":
		return errors.New("--trace-push needs a recording: --trace auto or --record FILE")
	case o.wait < 0 || o.wait > 100:
		return fmt.Errorf("--prefetch-wait %d: it is a percentage", o.wait)
	case o.waitFor < 0:
		return fmt.Errorf("--prefetch-wait-for %v: it is a time to wait", o.waitFor)
	}
	return nil
}

func (o *serveOptions) checkTLS() error {
	switch f := o.tls; {
	case f.Cert == "" && (f.Key != "" || f.ClientCA != "" || o.tlsOptional || len(o.clients) > 0):
		return usageError{errors.New("TLS needs a --tls-cert")}
	case len(o.clients) > 0 && f.ClientCA == "":
		return usageError{errors.New("--client needs a --tls-client-ca: names are believed of certificates alone")}
	}
	return nil
}

// traceOptions are the flags as a host takes them.
func (o *serveOptions) traceOptions() host.TraceOptions {
	t := o.trace
	t.RecordBytes, t.Rate, t.Ahead = int64(o.recordBytes), int64(o.rate), host.Ahead(o.ahead)
	return t
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
		return fmt.Errorf("%q: it is none, or some of metadata, readahead and program, with commas between", given)
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

// allowHelp says what patterns mean.
const allowHelp = `With --allow, clients open what they name: the export's name is the reference. A
pattern is compared with the reference in full, part by part:

  HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]    REPOSITORY alone is Docker Hub's
  oci:DIRECTORY[:TAG]

* stands for anything within one component of a path, a tag, or one label of a
host name, and ? for one character; * as the whole host stands for any host. **
at the end of a repository or directory stands for anything, slashes included;
HOST** is all of that host, and ** alone all of all registries, but no directory.
Host names match in any case, and a port only by a port. Without a tag a pattern matches any tag
and digest; with a tag, only references without a digest; with a digest, only
that. A directory counts as where its symbolic links lead to, and may not contain
"..". Archives are never opened.`
