package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
)

// app holds what every verb has in common: the flags for all of them, and
// where to print.
type app struct {
	stdout *results
	stderr io.Writer

	verbose   bool
	logFormat string
	json      bool
	insecure  []string
	hosts     string
	platform  string
	temp      string // for archives that are compressed; "": the system's
}

func rootCommand(stdout *results, stderr io.Writer) *cobra.Command {
	a := &app{stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:   "thaw",
		Short: "Start container images before they have arrived",
		Long: `thaw starts a container image before it has arrived. An image is flattened
once into a filesystem of blocks, which is kept in an ordinary registry beside
it; a host attaches it as a block device at once, and each block is fetched when
it is first read.

An IMAGE is registry.example/team/app:v1, …@sha256:…, oci:DIR[:TAG] for an OCI
layout directory, or oci-archive:FILE[:TAG] for a tar of one. Credentials come
from docker's config and its helpers.

Exit codes: 0 for success, 1 for a failure, 2 for a command line that is wrong.`,
		Example: `  thaw build registry.example/team/app:v1
  thaw serve registry.example/team/app:v1 --listen unix:/run/app.sock
  nbdinfo 'nbd+unix:///?socket=/run/app.sock'`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("there is no verb %q", args[0])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	f := root.PersistentFlags()
	f.BoolVarP(&a.verbose, "verbose", "v", false, "log more")
	f.StringVar(&a.logFormat, "log-format", "text", "text or json, on stderr")
	f.StringSliceVar(&a.insecure, "plain-http", nil, "speak HTTP to this registry, HOST[:PORT]; loopback always is (repeatable)")
	f.StringVar(&a.hosts, "hosts", "", "file that lists mirrors: a line for each registry, 'HOST MIRROR-URL[,resolve]...'; only a mirror marked ',resolve' is asked for tags and referrers; serve reads the file again when it changes")
	f.StringVar(&a.platform, "platform", "linux/"+runtime.GOARCH, "platform to choose from a multi-platform image: OS/ARCH[/VARIANT]")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(buildCommand(a), serveCommand(a), listCommand(a), statusCommand(a), inspectCommand(a), verifyCommand(a), traceCommand(a))
	return root
}

// args makes a number of arguments that does not fit a usageError.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			_, takes, _ := strings.Cut(c.Use, " ")
			return usageError{fmt.Errorf("%s takes %s; the number of arguments given is %d",
				strings.TrimPrefix(c.CommandPath(), "thaw "), cmp.Or(takes, "no arguments"), len(args))}
		}
		return nil
	}
}

// access is what every verb that reads images begins with: it finds images, of
// which those given can be pinned. It is to be closed.
func (a *app) access(ctx context.Context, pin pinFlags, images ...string) (*host.Finder, error) {
	log, err := a.log()
	if err != nil {
		return nil, err
	}
	platform, err := a.wantedPlatform()
	if err != nil {
		return nil, err
	}
	pins, err := pin.of(images, false)
	if err != nil {
		return nil, err
	}
	client, err := a.client(ctx, log)
	if err != nil {
		return nil, err
	}
	return &host.Finder{Client: client, Platform: platform, Pins: pins, Log: log, ReadFile: readInput}, nil
}

func (a *app) log() (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if a.verbose {
		o.Level = slog.LevelDebug
	}
	switch a.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(a.stderr, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(a.stderr, o)), nil
	}
	return nil, usageError{fmt.Errorf("a log format %q: it is text or json", a.logFormat)}
}

// settle is registry.Options.Settle. Tests push to registries that nobody else pushes
// to, and lower it.
var settle time.Duration

// client makes what all access to images goes through.
func (a *app) client(ctx context.Context, log *slog.Logger) (*registry.Client, error) {
	o := registry.Options{
		Credentials: credentials,
		Insecure:    a.insecure,
		Proxy:       http.ProxyFromEnvironment,
		TempDir:     a.temp,
		Log:         log,
		// So that a connection that hangs leaves time, within the half minute
		// that a reader waits, for another try.
		HeaderTimeout: 8 * time.Second,
		StallTimeout:  8 * time.Second,
		Settle:        settle,
	}
	if a.hosts != "" {
		var err error
		if o.Mirrors, err = interruptible(ctx, func() (registry.Mirrors, error) { return readMirrors(a.hosts) }); err != nil {
			return nil, err
		}
	}
	return registry.New(o), nil
}

func readMirrors(path string) (registry.Mirrors, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("mirrors: %w", err)
	}
	defer f.Close()
	m, err := registry.ParseMirrors(f)
	if err != nil {
		return nil, fmt.Errorf("mirrors: %s: %w", path, err)
	}
	return m, nil
}

// credentials asks docker's config and credential helpers, anew each time.
func credentials(ctx context.Context, host, repository string) (registry.Login, error) {
	auth, err := authn.Resolve(ctx, authn.DefaultKeychain, resource{host, repository})
	if err != nil {
		return registry.Login{}, err
	}
	c, err := authn.Authorization(ctx, auth)
	if err != nil {
		return registry.Login{}, err
	}
	return registry.Login{
		Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
	}, nil
}

// resource is a repository in the words of package authn.
type resource struct{ host, repository string }

func (r resource) String() string      { return r.host + "/" + r.repository }
func (r resource) RegistryStr() string { return r.host }

func (a *app) wantedPlatform() (*v1.Platform, error) {
	p, err := v1.ParsePlatform(a.platform)
	if err != nil || p.OS == "" || p.Architecture == "" {
		return nil, usageError{fmt.Errorf("a platform %q: it is OS/ARCH[/VARIANT]", a.platform)}
	}
	return p, nil
}

// terminal says whether progress can be drawn.
func (a *app) terminal() bool {
	f, ok := a.stderr.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// printJSON prints v as one line on stdout.
func (a *app) printJSON(v any) error { return json.NewEncoder(a.stdout).Encode(v) }

// size is a flag of bytes, with K, M, G, T for powers of 1024.
type size int64

func (s *size) Type() string { return "size" }

func (s *size) String() string { return sizeString(int64(*s)) }

func (s *size) Set(v string) error {
	v = strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(v), "B"), "I")
	shift := 0
	if i := strings.IndexAny(v, "KMGT"); i >= 0 && i == len(v)-1 {
		shift = 10 * (1 + strings.IndexByte("KMGT", v[i]))
		v = v[:i]
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 0 || n > 1<<62>>shift {
		return fmt.Errorf("a size is a number of bytes, or of K, M, G or T")
	}
	*s = size(n << shift)
	return nil
}

// sizeString is what Set takes.
func sizeString(n int64) string {
	for i := 3; i >= 0; i-- {
		if unit := int64(1) << (10 * (i + 1)); n >= unit && n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + "KMGT"[i:i+1]
		}
	}
	return strconv.FormatInt(n, 10)
}

// bytesString is for reading: 1.4 GiB.
func bytesString(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%.0f GiB", float64(n)/(1<<30))
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 10<<20:
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}
