package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

func umountCommand(a *app) *cobra.Command {
	var cache string
	var lazy bool
	c := &cobra.Command{
		Use:   "umount DIR",
		Short: "Unmount what thaw mount has mounted",
		Long: `umount unmounts the image that is mounted in DIR, and detaches its node. What was
written is made durable first. It fails while programs use files in DIR.

With --lazy, nobody can open the mount any more; programs keep the files that they
have open, and the node is detached when the last one is closed.

It also removes a mount whose server was killed.`,
		Example: `  thaw umount /mnt
  thaw umount --lazy /mnt`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.umount(c.Context(), args[0], cache, lazy) },
	}
	c.Flags().BoolVar(&lazy, "lazy", false, "unmount a filesystem in use; its node is detached when its last file is closed")
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// unmounted is the result of umount as --json prints it.
type unmounted struct {
	Type     string `json:"type"`
	Node     string `json:"node"`
	Dir      string `json:"mount"`
	Detached bool   `json:"detached"` // false: the node is still in use, and is detached when that ends
}

func (a *app) umount(ctx context.Context, given, cache string, lazy bool) error {
	if err := needRoot("umount"); err != nil {
		return err
	}
	dir, err := mountDir(given)
	if err != nil {
		return err
	}
	m, ok, err := mountedAt(dir)
	switch {
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("nothing is mounted at %s", dir)
	}
	client, err := control(cache)
	if err != nil {
		return err
	}
	defer client.Close()
	// Which node it is must be known before it is unmounted: it may go at once.
	n, err := nodeAt(ctx, client, m.source)
	dead := errors.Is(err, api.ErrNoServer)
	if dead {
		n, err = host.KeptNode(client.Dir(), m.source)
	}
	switch {
	case err != nil:
		return err
	case n.Node == "":
		return fmt.Errorf("%s is mounted at %s, which is no node of the cache %s: use umount, or pass the --cache of its server", m.source, dir, client.Dir())
	}
	if err := a.unmount(ctx, dir, lazy); err != nil {
		return err
	}
	gone := true
	if dead {
		err = host.RemoveKept(ctx, client.Dir(), n.Node)
		if errors.Is(err, host.ErrNodeBusy) {
			gone, err = false, nil // the next server removes it
		}
	} else {
		gone, err = client.Detach(ctx, n.ID, true)
		if isNotFound(err) || errors.Is(err, api.ErrNoServer) {
			gone, err = true, nil // the server has seen it first
		}
	}
	if err != nil {
		return fmt.Errorf("%s is unmounted, and its node stays: %w", dir, err)
	}
	if !gone && !a.json {
		log, err := a.log()
		if err != nil {
			return err
		}
		log.Info("the node is still in use: it is detached when that ends", "node", n.Node)
	}
	if a.json {
		return a.printJSON(unmounted{"unmounted", n.Node, dir, gone})
	}
	return nil
}

// unmount unmounts dir. It returns when ctx ends, although the kernel goes on writing back.
func (a *app) unmount(ctx context.Context, dir string, lazy bool) error {
	flags := 0
	if lazy {
		flags = unix.MNT_DETACH
	}
	_, err := interruptible(ctx, func() (struct{}, error) { return struct{}{}, unix.Unmount(dir, flags|unix.UMOUNT_NOFOLLOW) })
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("cannot unmount %s: programs use files in it: fuser -vm %s names them; or pass --lazy", dir, shellWord(dir))
	}
	return fmt.Errorf("cannot unmount %s: %w", dir, err)
}
