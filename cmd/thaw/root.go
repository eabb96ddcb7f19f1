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
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
)

// app holds what all commands share: the flags that all of them take, and where
// they print.
type app struct {
	stdout *results
	stderr io.Writer

	verbose   bool
	logFormat string
	json      bool
	insecure  []string
	hosts     string
	platform  string
	temp      string // directory for temporary files; "": the system's
}

func rootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "thaw",
		Short: "Start container images before they have arrived",
		Long: `thaw starts a container image before it has arrived. "thaw build" flattens an
image once into a block image: a filesystem in chunks, which a registry keeps
beside the image. "thaw mount" mounts the block image at once, and "thaw serve" gives
it to virtual machines and other hosts as a network block device. Each chunk is
fetched when it is first read.

An IMAGE is one of these:

    registry.example/team/app:v1           an image in a registry
    registry.example/team/app@sha256:HEX   the same, by its digest
    oci:DIR[:TAG]                          an OCI layout directory
    oci-archive:FILE[:TAG]                 a tar of an OCI layout
    docker-archive:FILE[:NAME]             what "docker save" wrote

Archives are only for building from, and may be compressed by gzip, zstd, xz or
bzip2. Credentials come from Docker's configuration and its credential helpers.

Results are written to stdout, progress and logs to stderr.`,
		Example: `  thaw build registry.example/team/app:v1
  thaw mount registry.example/team/app:v1 /mnt
  thaw serve registry.example/team/app:v1 --listen unix:/run/app.sock
  nbdinfo 'nbd+unix:///?socket=/run/app.sock'`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("there is no command %q", args[0])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.Version = thisVersion().line()
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetUsageTemplate(usageTemplate)
	f := root.PersistentFlags()
	f.BoolVarP(&a.verbose, "verbose", "v", false, "log debug messages, too")
	f.StringVar(&a.logFormat, "log-format", "text", "`FORMAT` of the log, which goes to stderr: text or json")
	f.StringSliceVar(&a.insecure, "plain-http", nil, "speak HTTP to the registry `HOST`[:PORT], as to those on loopback addresses (repeatable)")
	f.StringVar(&a.hosts, "hosts", "", "read mirrors from `FILE`: a line for each registry, 'HOST MIRROR-URL[,resolve]...'; only a mirror marked ',resolve' is asked for tags and referrers; serve reads the file again when it changes")
	f.StringVar(&a.platform, "platform", defaultPlatform, "`PLATFORM` to choose from a multi-platform image: OS/ARCH[/VARIANT]; defaults to that of this host")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(buildCommand(a), serveCommand(a), mountCommand(a), umountCommand(a), attachCommand(a), detachCommand(a), listCommand(a), statusCommand(a), zoneCommand(a),
		commitCommand(a), overlayCommand(a), inspectCommand(a), verifyCommand(a), traceCommand(a),
		versionCommand(a), manCommand(a))
	completions(root)
	return root
}

// usageTemplate is cobra's, with lines of 80 columns and the exit codes.
const usageTemplate = `Usage:{{if .Runnable}}
  {{.UseLine}}{{end}}{{if .HasAvailableSubCommands}}
  {{.CommandPath}} [command]{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}

Commands:{{range .Commands}}{{if (or .IsAvailableCommand (eq .Name "help"))}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsagesWrapped 80 | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableInheritedFlags}}

Global flags:
{{.InheritedFlags.FlagUsagesWrapped 80 | trimTrailingWhitespaces}}{{end}}

Exit codes: 0 for success, 1 for a failure, 2 for a wrong command line.{{if .HasAvailableSubCommands}}

Use "{{.CommandPath}} [command] --help" for more about a command.{{end}}
`

// args makes a usageError of a wrong number of arguments.
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

// access opens what every command that reads images needs. pin holds pins of the
// given images. The caller closes it.
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
	return nil, usageError{fmt.Errorf("--log-format %s: it must be text or json", a.logFormat)}
}

// settle is registry.Options.Settle. Tests lower it: nobody else pushes to their
// registries.
var settle time.Duration

// cancelTime is registry.Options.CancelTime. A test raises it.
var cancelTime time.Duration

// client makes the client of registries, layouts and archives.
func (a *app) client(ctx context.Context, log *slog.Logger) (*registry.Client, error) {
	o := registry.Options{
		Credentials: credentials,
		Insecure:    a.insecure,
		Proxy:       http.ProxyFromEnvironment,
		TempDir:     a.temp,
		Log:         log,
		// A reader waits for 30 s. A connection that hangs leaves it time for two
		// more tries.
		HeaderTimeout: 8 * time.Second,
		// A build has this many requests in flight.
		IdleConns:    flatten.DefaultRequests,
		StallTimeout: 8 * time.Second,
		Settle:       settle,
		CancelTime:   cancelTime,
		UserAgent:    thisVersion().userAgent(),
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

// credentials asks Docker's configuration and credential helpers, each time anew.
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

// resource is a repository as package authn names it.
type resource struct{ host, repository string }

func (r resource) String() string      { return r.host + "/" + r.repository }
func (r resource) RegistryStr() string { return r.host }

func (a *app) wantedPlatform() (*v1.Platform, error) {
	p, err := v1.ParsePlatform(a.platform)
	if err != nil || p.OS == "" || p.Architecture == "" {
		return nil, usageError{fmt.Errorf("--platform %s: it must be OS/ARCH[/VARIANT]", a.platform)}
	}
	return p, nil
}

// screen is stderr where that is a terminal that can draw progress, or nil.
func (a *app) screen() *screen {
	f, ok := a.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	return &screen{out: f, size: func() (width, height int) {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}}
}

// printJSON prints v as one line on stdout.
func (a *app) printJSON(v any) error { return json.NewEncoder(a.stdout).Encode(v) }

// size is a flag for a number of bytes, in which K, M, G and T are powers of 1024.
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
		return fmt.Errorf("a size is a number of bytes, or a number with K, M, G or T")
	}
	*s = size(n << shift)
	return nil
}

// sizeString writes n as Set reads it.
func sizeString(n int64) string {
	for i := 3; i >= 0; i-- {
		if unit := int64(1) << (10 * (i + 1)); n >= unit && n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + "KMGT"[i:i+1]
		}
	}
	return strconv.FormatInt(n, 10)
}

// count writes n of what noun names: 1 chunk, 2 chunks.
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

// bytesString writes n for people: 1.4 GiB.
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
