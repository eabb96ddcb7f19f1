package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
	"thaw/fetcher/registry"
)

// commitOptions are the flags of commit.
type commitOptions struct {
	cache                         string
	replay, crashConsistent, live bool
	level                         int
}

func commitCommand(a *app) *cobra.Command {
	var o commitOptions
	c := &cobra.Command{
		Use:   "commit OVERLAY DST",
		Short: "Make a block image of what was written to a device",
		Long: `commit makes a block image of an overlay and pushes it. OVERLAY is the directory of
"thaw serve --overlay", or a directory below that of --overlay-each. DST is where the
image goes: a registry reference with a tag, or oci:DIR:TAG.

The image shares all streams of its base, the block image that the overlay was made
on, and has one more, with the blocks that were written. Blocks of zeros are not
stored, nor are blocks that the base has in the same place. A registry that has the
base gets only the new stream, the index and the manifest. Another repository of the
same registry mounts the other streams, and another registry gets copies of those
that it lacks. The image is served, traced, verified, inspected and committed again
as any other.

A filesystem that is mounted, or that was not unmounted, is dirty: each start of the
image would have to recover it. commit refuses such an ext4. With --replay, it
replays the journal first, as a mount does; this changes the overlay, and needs no
e2fsck. With --crash-consistent, it commits the device as it is after a loss of
power. Other content than ext4 is committed as it is.

With --live, the overlay is in use by the server that uses the cache directory.
OVERLAY is its directory, or the name of a device, as "thaw list" shows it. The
server freezes what was written, commits that, and merges what was written
meanwhile. Clients go on. A filesystem that a client has mounted is dirty by nature:
--replay replays the journal in a copy. Interrupting the command ends the commit.`,
		Example: `  thaw commit /var/lib/vm7 registry.example/team/app:v1-vm7
  thaw commit /var/lib/vm7 registry.example/team/app:v1-vm7 --replay
  thaw commit --live /var/lib/vm7 registry.example/team/app:snapshot --replay
  thaw commit overlay oci:/srv/images:changed --json`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			if o.replay && o.crashConsistent {
				return usageError{errors.New("--replay and --crash-consistent exclude each other")}
			}
			if o.level < 1 || o.level > 22 {
				return usageError{fmt.Errorf("--level %d: it must be from 1 to 22", o.level)}
			}
			if _, err := host.CommitTarget(args[1]); err != nil {
				return err
			}
			return a.commit(c.Context(), args[0], args[1], o)
		},
	}
	f := c.Flags()
	f.BoolVar(&o.replay, "replay", false, "replay the journal of an ext4 that was not unmounted")
	f.BoolVar(&o.crashConsistent, "crash-consistent", false, "commit an ext4 that was not unmounted as it is")
	f.BoolVar(&o.live, "live", false, "have the server that uses the overlay commit it")
	f.StringVar(&o.cache, "cache", "", "read the base through the cache in `DIR`; with --live, the server's cache (default: "+cacheUsage+")")
	f.IntVar(&o.level, "level", flatten.DefaultLevel, "compress chunks at the zstd level `N`, 1 to 22")
	f.StringVar(&a.temp, "temp", "", "keep the new stream in `DIR` until it is pushed (default: $TMPDIR, or /tmp); with --live, the server's is used")
	f.BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

func (o commitOptions) dirty() flatten.Dirty {
	switch {
	case o.replay:
		return flatten.ReplayJournal
	case o.crashConsistent:
		return flatten.CrashConsistent
	}
	return flatten.RefuseDirty
}

// committed is the result as --json prints it.
type committed struct {
	Type    string `json:"type"`
	Overlay string `json:"overlay"`
	host.CommitResult
	Seconds float64 `json:"seconds"`
	Serve   string  `json:"serve"` // a command for a shell
}

func (a *app) commit(ctx context.Context, overlay, dst string, o commitOptions) error {
	debug.SetMemoryLimit(buildMemory)
	began := time.Now()
	if s := a.screen(); s != nil {
		a.stderr = s // logs are written above the progress
	}
	commit := a.commitClosed
	if o.live {
		commit = a.commitLive
	}
	res, err := commit(ctx, overlay, dst, o)
	if err != nil {
		return err
	}
	return a.printCommitted(committed{"committed", overlay, *res, time.Since(began).Seconds(), a.serveCommitted(res.Target)})
}

// serveCommitted is the command that serves the image.
func (a *app) serveCommitted(target string) string {
	line := "thaw serve " + shellWord(target)
	if ref, err := registry.ParseRef(target); err == nil && ref.Registry != "" {
		for _, h := range a.insecure {
			line += " --plain-http " + shellWord(h)
		}
		if a.hosts != "" {
			line += " --hosts " + shellWord(a.hosts)
		}
	}
	return line
}

// openCache makes a host for a command that needs the cache for a moment. It closes find.
func openCache(find *host.Finder, cache string) (*host.Host, error) {
	if cache == "" {
		var err error
		if cache, err = defaultCache(os.Getuid()); err != nil {
			find.Close()
			return nil, err
		}
	}
	return host.Open(host.Options{Finder: find, Dir: cache})
}

// openCacheSoon is openCache once the process that uses the cache has ended, if it is about to.
func (a *app) openCacheSoon(ctx context.Context, cache string) (*host.Host, error) {
	log, err := a.log()
	if err != nil {
		return nil, err
	}
	return awaitCache(ctx, log, cache, func() (*host.Host, error) {
		find, err := a.access(ctx, nil)
		if err != nil {
			return nil, err
		}
		return openCache(find, cache)
	})
}

// openClosed opens an overlay that no server uses, through a cache. close closes all.
func (a *app) openClosed(ctx context.Context, dir, cache string) (c *host.ClosedOverlay, close func() error, err error) {
	if info, err := blockmap.ReadOverlay(blockmap.OS, dir); err != nil {
		return nil, nil, err
	} else if info.InUse {
		return nil, nil, fmt.Errorf("overlay %s: %w", dir, errInUse)
	}
	h, err := a.openCacheSoon(ctx, cache)
	if errors.Is(err, blockmap.ErrLocked) {
		return nil, nil, fmt.Errorf("%w; pass another --cache, or stop the server that uses it", err)
	}
	if err != nil {
		return nil, nil, err
	}
	if c, err = h.OpenOverlay(ctx, dir); err != nil {
		h.Close()
		return nil, nil, err
	}
	return c, func() error {
		err := c.Close()
		h.Close()
		return err
	}, nil
}

// errInUse says that a server has an overlay.
var errInUse = errors.New("it is in use by a server")

func (a *app) commitClosed(ctx context.Context, dir, dst string, o commitOptions) (res *host.CommitResult, err error) {
	c, end, err := a.openClosed(ctx, dir, o.cache)
	if errors.Is(err, errInUse) {
		return nil, fmt.Errorf("%w: stop the server, or pass --live to commit what it has by now", err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end()) }()
	log, err := a.log()
	if err != nil {
		return nil, err
	}
	progress := new(flatten.CommitProgress)
	stop := showCommit(a, log, dst, func() *host.CommitInfo { return host.NewCommitInfo(dst, progress) })
	res, err = c.Commit(ctx, host.CommitOptions{Target: dst, Dirty: o.dirty(), Level: o.level, TempDir: a.temp, Progress: progress})
	stop()
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", dir, err)
	}
	if res.Filesystem == "none" {
		log.Info("the device has no ext4 filesystem: it is committed as it is, and thaw verify will find none", "overlay", dir)
	}
	return res, nil
}

// pollInterval is the time between two questions how far a commit of a server is.
const pollInterval = 500 * time.Millisecond

func (a *app) commitLive(ctx context.Context, overlay, dst string, o commitOptions) (*host.CommitResult, error) {
	client, err := control(o.cache)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	id, err := deviceOf(ctx, client, overlay)
	if err != nil {
		return nil, err
	}
	log, err := a.log()
	if err != nil {
		return nil, err
	}
	ref, err := host.CommitTarget(dst)
	if err != nil {
		return nil, err
	}
	if ref.Layout != "" { // the server has another working directory
		if ref.Layout, err = filepath.Abs(ref.Layout); err != nil {
			return nil, err
		}
	}
	type answer struct {
		r   host.CommitResult
		err error
	}
	answered := make(chan answer, 1)
	dirty := map[flatten.Dirty]string{flatten.RefuseDirty: "refuse", flatten.ReplayJournal: "replay", flatten.CrashConsistent: "crash-consistent"}
	go func() {
		r, err := client.Commit(ctx, id, api.NewCommit{Target: ref.String(), Dirty: dirty[o.dirty()], Level: o.level})
		answered <- answer{r, err}
	}()
	var last commitState
	stop := showCommit(a, log, dst, last.Load)
	defer stop()
	t := time.NewTicker(pollInterval)
	defer t.Stop()
	for {
		select {
		case x := <-answered:
			if x.err != nil {
				return nil, fmt.Errorf("commit %s: %w", overlay, x.err)
			}
			return &x.r, nil
		case <-t.C:
			if d, err := client.Device(ctx, id); err == nil && d.Commit != nil {
				last.Store(d.Commit)
			}
		}
	}
}

// deviceOf finds the device whose overlay is in a directory, or that has this name or ID.
func deviceOf(ctx context.Context, c *api.Client, overlay string) (string, error) {
	all, err := c.Devices(ctx)
	if err != nil {
		return "", err
	}
	want, statErr := os.Stat(overlay)
	for _, d := range all {
		if statErr != nil || d.Overlay == nil || d.Overlay.Directory == "" {
			continue
		}
		if fi, err := os.Stat(d.Overlay.Directory); err == nil && os.SameFile(want, fi) {
			return d.ID, nil
		}
	}
	id, err := deviceID(ctx, c, overlay)
	if err != nil && statErr == nil {
		return "", fmt.Errorf("the server has no device with the overlay %s: see thaw list, or name the server's --cache", overlay)
	}
	return id, err
}

func (a *app) printCommitted(c committed) error {
	if a.json {
		return a.printJSON(c)
	}
	fmt.Fprintf(a.stdout, "%s\n", c.Target)
	fmt.Fprintf(a.stdout, "digest      %s\n", c.Digest)
	fmt.Fprintf(a.stdout, "base        %s\n", c.Base)
	fmt.Fprintf(a.stdout, "changed     %s: %s stored as %s; %s of zeros; %s as in the base\n",
		bytesString(c.Changed), bytesString(c.Content), bytesString(c.Stored), bytesString(c.Zeros), bytesString(c.Equal))
	switch c.Filesystem {
	case "clean":
		fmt.Fprintln(a.stdout, "filesystem  clean")
	case "replayed":
		fmt.Fprintf(a.stdout, "filesystem  recovered: %s of the journal replayed\n", count(c.Replayed, "block"))
	case "dirty":
		fmt.Fprintln(a.stdout, "filesystem  as after a loss of power: each start recovers it")
	default:
		fmt.Fprintln(a.stdout, "filesystem  none that thaw knows")
	}
	sent := bytesString(c.Uploaded)
	if c.Changed > 0 {
		sent += fmt.Sprintf(", %.2f for each changed byte", float64(c.Uploaded)/float64(c.Changed))
	}
	if c.Copied > 0 {
		sent += fmt.Sprintf("; of this, %s of the base", bytesString(c.Copied))
	}
	fmt.Fprintf(a.stdout, "uploaded    %s\n", sent)
	fmt.Fprintf(a.stdout, "time        %.1f s\n", c.Seconds)
	fmt.Fprintf(a.stdout, "serve       %s\n", c.Serve)
	return nil
}
