package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"thaw/blockmap"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

// OverlayOptions say whether clients may write, and where their changes are kept. At most
// one of the first three is set. Without any, all devices are read-only.
type OverlayOptions struct {
	// Dir is the overlay of the host's only device. All its clients share the changes.
	Dir string
	// Each is a directory with an overlay for each client. A client names its overlay when it
	// opens a device: IMAGE~NAME leads to the overlay Each/NAME. IMAGE itself is read-only.
	Each string
	// Ephemeral makes overlays that go with their devices. The clients of IMAGE share one, and
	// those of IMAGE~NAME another one.
	Ephemeral bool
	// Limit bounds the bytes of changed blocks with data in each overlay. 0 means no limit
	// except the size of the disk.
	Limit int64
}

// OverlayInfo describes the overlay of a device.
type OverlayInfo struct {
	Directory string `json:"directory,omitempty"` // empty if the overlay goes with the device
	Data      int64  `json:"data_bytes"`          // in changed blocks with data
	Zero      int64  `json:"zero_bytes"`          // in changed blocks that read as zeros
	Space     int64  `json:"space_bytes"`         // on disk
	Limit     int64  `json:"limit_bytes"`         // of data; 0: no limit but the disk
	Flushes   int64  `json:"flushes"`             // that clients have asked for
	Syncs     int64  `json:"syncs"`               // of the disk, for all flushes together
	Error     string `json:"error,omitempty"`     // why it takes no more writes
}

const (
	// clientMark separates the name of a device from the name that a client chooses. It is
	// in no reference of a registry, and needs no escape in a URI.
	clientMark = "~"

	maxClients  = 1024 // devices of clients that are open at a time
	maxOverlays = 4096 // in the directory of --overlay-each
)

// clientName is the name of an overlay: one component of a path, and never hidden.
var clientName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// maxClientName is not in the expression, which would take longer to compile.
const maxClientName = 128

// splitClient separates the name that a client has chosen from the name of a device. ok is
// false if there is none.
func splitClient(name string) (device, client string, ok bool, err error) {
	i := strings.LastIndex(name, clientMark)
	if i < 0 {
		return name, "", false, nil
	}
	device, client = name[:i], name[i+len(clientMark):]
	if len(client) > maxClientName || !clientName.MatchString(client) {
		return name, "", false, InvalidError{fmt.Errorf("the client's name %.150q: it must be at most 128 letters, digits, dots, dashes and underscores, and begin with a letter or a digit", client)}
	}
	return device, client, true, nil
}

// SplitClient separates the name of a client from that of an image: IMAGE~CLIENT. client is
// empty if there is none.
func SplitClient(name string) (image, client string) {
	image, client, ok, err := splitClient(name)
	if !ok || err != nil {
		return name, ""
	}
	return image, client
}

// owns reports whether a client has proved that an overlay of this name is its own: its
// certificate has the name, or the name is one of a subdomain, as vm-3.host-7.example is
// of host-7.example.
func owns(c nbd.ClientInfo, name string) bool {
	for more := true; more; _, name, more = strings.Cut(name, ".") {
		if c.Named(name) {
			return true
		}
	}
	return false
}

// overlays opens the overlays of a host's devices.
type overlays struct {
	OverlayOptions
	fs   blockmap.FS
	temp string // where the files of ephemeral overlays lie
	boot blockmap.BootID
	log  *slog.Logger
}

func newOverlays(o OverlayOptions, temp string, boot blockmap.BootID, log *slog.Logger) (*overlays, error) {
	x := &overlays{OverlayOptions: o, fs: blockmap.OS, temp: temp, boot: boot, log: log}
	if o.Limit < 0 {
		return nil, InvalidError{fmt.Errorf("a limit of %d bytes for overlays: it cannot be negative", o.Limit)}
	}
	x.Dir = absoluteOrNone(o.Dir)
	if x.Each = absoluteOrNone(o.Each); x.Each == "" {
		return x, nil
	}
	if _, err := blockmap.ReadOverlay(x.fs, x.Each); err == nil {
		return nil, InvalidError{fmt.Errorf("%s is an overlay, and not a directory of overlays: use it as --overlay %s", o.Each, o.Each)}
	}
	if err := os.MkdirAll(x.Each, 0o700); err != nil {
		return nil, fmt.Errorf("directory of overlays: %w", err)
	}
	return x, nil
}

func absoluteOrNone(dir string) string {
	if dir == "" {
		return ""
	}
	return absolute(dir)
}

// clients reports whether clients can have overlays of their own.
func (o *overlays) clients() bool { return o.Each != "" || o.Ephemeral }

// dirOf returns the directory of a client's overlay, or "" if that is ephemeral. It fails if
// the overlay would be one too many.
func (o *overlays) dirOf(client string) (string, error) {
	if o.Each == "" {
		return "", nil
	}
	dir := filepath.Join(o.Each, client)
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	there, err := os.ReadDir(o.Each)
	if err != nil {
		return "", fmt.Errorf("directory of overlays: %w", err)
	}
	if len(there) >= maxOverlays {
		return "", conflict("%s has %d overlays, the most that there may be: remove some", o.Each, len(there))
	}
	return dir, nil
}

// base says which image to open below the overlay in dir, which is to be served as name. A
// tag can have moved since the overlay was made. The filesystem in the overlay goes with
// the base that it was made on, so that base is opened, by its digest. It is name where
// there is no overlay yet, and where name has a digest: see open.
func (o *overlays) base(dir, name string, pins Pins) (string, error) {
	info, err := blockmap.ReadOverlay(o.fs, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return name, nil
	}
	if err != nil {
		return "", err
	}
	given, err := registry.ParseRef(name)
	if err != nil {
		return "", InvalidError{err}
	}
	kept, err := registry.ParseRef(info.Image)
	if err != nil || kept.Digest.Hex == "" {
		return "", fmt.Errorf("overlay %s: its header names no image by digest: %q", dir, info.Image)
	}
	pin, pinned := pins.Of(given)
	switch {
	case canonical(given).Place() != canonical(kept).Place():
		return "", otherImage(dir, info.Image, "%s is another image", name)
	case pinned && pin != kept.Digest:
		return "", otherImage(dir, info.Image, "%s is pinned to %s", name, pin)
	case given.Digest.Hex != "":
		return name, nil
	}
	return info.Image, nil
}

// otherImage refuses to serve an overlay on an image that it was not made on.
func otherImage(dir, image, format string, args ...any) error {
	return InvalidError{fmt.Errorf("overlay %s has the changes of %s, and %s: serve the former with this overlay, or the latter with another one",
		dir, image, fmt.Sprintf(format, args...))}
}

// open opens the overlay in dir, or makes it, over a device of the image b.
func (o *overlays) open(dir string, device blockmap.Device, b *BlockImage) (*blockmap.Overlay, error) {
	return o.openWith(dir, blockmap.OverlayOptions{Limit: o.Limit}, device, b)
}

// openWith opens an overlay with a limit. A volatile one goes with its device. One that has
// to exist is not made.
func (o *overlays) openWith(dir string, opts blockmap.OverlayOptions, device blockmap.Device, b *BlockImage) (*blockmap.Overlay, error) {
	opts.Image = canonical(b.Repo.Ref()).WithDigest(b.Digest).String() // valid from any working directory
	opts.Digest, opts.Boot, opts.FS, opts.Log = digestOf(b.Digest), o.boot, o.fs, o.log
	if info, err := blockmap.ReadOverlay(o.fs, dir); err == nil && info.Digest != opts.Digest {
		return nil, otherImage(dir, info.Image, "%s is the block image %s", b.Name, b.Digest)
	}
	return blockmap.OpenOverlay(dir, device, opts)
}

// checkTag warns if name means another image by now than the one that is served below an
// overlay.
func (o *opener) checkTag(ctx context.Context, name string, served *BlockImage) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return
	}
	repo, err := o.Client.Open(ref)
	if err != nil {
		return
	}
	now, err := o.manifest(ctx, repo, name)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		o.Log.Info("cannot look up what the name means by now; the overlay's own base is served", "image", name, "digest", served.Digest.String(), "err", err)
	case now.Digest != served.Digest:
		o.Log.Warn("the name means another image by now; the overlay's own base is served", "image", name, "digest", served.Digest.String(), "now", now.Digest.String())
	}
}
