// Command rootlayer makes a container image bootable by one more layer. scripts/rootfs runs it, and describes its flags.
//
//	layer   the files that the layer has
//	image   the config and the manifest of the new image
//	copy    the blobs of the image, where the target lacks them
//
// The layers of the image are neither read nor changed, so the new image shares them, and thaw the streams that it makes of
// them. In the same registry or layout, nothing but the new layer, a config and a manifest is written.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/pflag"

	"thaw/fetcher/registry"
)

// options are what the command line says.
type options struct {
	src, dst  registry.Ref
	platform  *v1.Platform
	hostname  string
	busybox   string
	module    string   // the directory of thaw's sources
	plainHTTP []string // registries
}

func main() {
	o, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "scripts/rootfs: %v\nscripts/rootfs --help shows the command line\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	made, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "scripts/rootfs:", err)
		os.Exit(1)
	}
	fmt.Println(made)
}

func parse(args []string) (options, error) {
	var o options
	var platform string
	f := pflag.NewFlagSet("rootfs", pflag.ContinueOnError)
	f.Usage = func() {}
	f.StringVar(&o.hostname, "hostname", "", "")
	f.StringVar(&o.busybox, "busybox", "", "")
	f.StringVar(&platform, "platform", "linux/amd64", "")
	f.StringArrayVar(&o.plainHTTP, "plain-http", nil, "")
	f.StringVar(&o.module, "module", ".", "")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() != 2 {
		return o, fmt.Errorf("it takes IMAGE and DST; the number of arguments given is %d", f.NArg())
	}
	var err error
	if o.platform, err = v1.ParsePlatform(platform); err != nil || o.platform.OS != "linux" || o.platform.Architecture == "" {
		return o, fmt.Errorf("--platform %s: it must be linux/ARCH[/VARIANT]", platform)
	}
	if o.src, err = registry.ParseRef(f.Arg(0)); err != nil {
		return o, err
	}
	if o.dst, err = registry.ParseRef(f.Arg(1)); err != nil {
		return o, err
	}
	switch {
	case o.dst.Archive != "":
		return o, fmt.Errorf("%s: archives cannot be written: give oci:DIR:TAG or a registry reference", f.Arg(1))
	case o.dst.Digest != (v1.Hash{}) || o.dst.Tag == "":
		return o, fmt.Errorf("%s: DST needs a tag, and no digest", f.Arg(1))
	case o.dst == o.src:
		return o, fmt.Errorf("%s: DST is IMAGE: give it another tag", f.Arg(1))
	}
	return o, nil
}

// run returns the reference of the image that it has made.
func run(ctx context.Context, o options) (registry.Ref, error) {
	fail := func(err error) (registry.Ref, error) { return registry.Ref{}, err }
	client := registry.New(registry.Options{
		Credentials: credentials,
		Insecure:    o.plainHTTP,
		Proxy:       http.ProxyFromEnvironment,
		Log:         slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	defer client.Close()
	from, err := client.Open(o.src)
	if err != nil {
		return fail(err)
	}
	to, err := client.Open(o.dst)
	if err != nil {
		return fail(err)
	}
	old, err := readImage(ctx, from, o.platform)
	if err != nil {
		return fail(err)
	}
	boot, err := old.boot(o.hostname)
	if err != nil {
		return fail(fmt.Errorf("%s: %w", o.src, err))
	}
	temp, err := os.MkdirTemp("", "thaw-rootfs.")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(temp)
	c := contents{init: filepath.Join(temp, "init"), busybox: o.busybox, boot: boot}
	if err := compile(ctx, o.module, old.config.Architecture, old.config.Variant, c.init); err != nil {
		return fail(err)
	}
	added, err := c.write(filepath.Join(temp, "layer"))
	if err != nil {
		return fail(fmt.Errorf("make the layer: %w", err))
	}
	if err := copyBlobs(ctx, from, to, old.manifest.Layers, temp); err != nil {
		return fail(err)
	}
	return old.push(ctx, to, o, added)
}

// compile makes the first process of the machine: a static program for its architecture, the same bytes each time.
func compile(ctx context.Context, module, arch, variant, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, "./scripts/rootinit")
	cmd.Dir = module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=")
	if arch == "arm" && variant != "" {
		cmd.Env = append(cmd.Env, "GOARM="+variant[1:]) // v5, v6, v7
	}
	if b, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the first process for %s: %w\n%s", arch, err, b)
	}
	return nil
}

// credentials are docker's, as for thaw.
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

var errOwnInit = errors.New("its command is its own init, which would be replaced: boot the image as it is")
