package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

// nodeOptions are the flags of attach and mount.
type nodeOptions struct {
	cache     string
	driver    string
	overlay   string
	ephemeral bool
	limit     size
	queues    int
	zone      zoneFlags
}

func (o *nodeOptions) flags(a *app, c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.driver, "driver", "auto", "`DRIVER` of the node: ublk, nbd, fuse, or auto for the first of them that this host has")
	f.StringVar(&o.overlay, "overlay", "", "make the node writable, and keep the changes in `DIR`")
	f.BoolVar(&o.ephemeral, "ephemeral", false, "make the node writable, and forget the changes when it is detached")
	f.Var(&o.limit, "overlay-size", "most changed data, as a `SIZE`; beyond it, writes fail with ENOSPC (default: no limit but the disk)")
	f.IntVar(&o.queues, "queues", 0, "`N` queues of ublk, or connections of nbd (default: 4, or with ublk the number of processors if that is less)")
	f.StringVar(&o.cache, "cache", "", controlCacheUsage)
	o.zone.add(f)
	f.BoolVar(&a.json, "json", false, "print the result as JSON")
}

// spec is what the flags ask the server for.
func (o *nodeOptions) spec(image string) (s host.NodeSpec, err error) {
	d, err := host.ParseDriver(o.driver)
	if err != nil {
		return s, usageError{fmt.Errorf("--driver: %w", err)}
	}
	switch {
	case o.overlay != "" && o.ephemeral:
		return s, usageError{errors.New("--overlay and --ephemeral exclude each other")}
	case o.limit != 0 && o.overlay == "" && !o.ephemeral:
		return s, usageError{errors.New("--overlay-size limits an overlay: add --overlay DIR or --ephemeral")}
	case o.queues < 0 || o.queues > 64:
		return s, usageError{fmt.Errorf("--queues %d: it must be from 1 to 64, or 0 for the default", o.queues)}
	}
	if err := o.zone.check(); err != nil {
		return s, usageError{err}
	}
	s = host.NodeSpec{Ephemeral: o.ephemeral, Limit: int64(o.limit), Driver: d, Queues: o.queues}
	if s.Image, err = host.AbsoluteImage(image); err != nil {
		return s, err
	}
	if o.overlay != "" {
		if s.Overlay, err = filepath.Abs(o.overlay); err != nil {
			return s, err
		}
	}
	return s, nil
}

// needRoot refuses what only root may do.
func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s requires root: run it by sudo, or use thaw serve and an NBD client", what)
	}
	return nil
}

func attachCommand(a *app) *cobra.Command {
	var o nodeOptions
	c := &cobra.Command{
		Use:   "attach IMAGE",
		Short: "Give an image a device node on this host",
		Long: `attach makes a block device of an image, and prints its path when it can be read.
Each block is fetched when it is first read. The device is read-only unless a flag
says where changes are kept. It stays until thaw detach.

The driver auto takes ublk where the kernel has it, otherwise nbd, otherwise fuse:

  ublk  the fastest; needs the module ublk_drv, Linux 6.5 or later
  nbd   needs the module nbd
  fuse  a FUSE file under a loop device; works on nearly every kernel

` + backgroundHelp,
		Example: `  thaw attach registry.example/team/app:v1
  thaw attach registry.example/team/app:v1 --overlay /var/lib/vm7 --driver ublk
  node=$(thaw attach registry.example/team/app:v1) && mount -o ro,noload "$node" /mnt`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.attach(c.Context(), args[0], o) },
	}
	o.flags(a, c)
	return c
}

// backgroundHelp explains which server has the nodes.
const backgroundHelp = `The node belongs to the server that uses the cache directory. If no server does, the
command starts one in the background. That server uses the --plain-http, --hosts,
--platform and --zone flags of this command, its environment, and the credentials of its
user. It logs to serve.log in the cache directory, and ends with its last node. If it is killed,
the next thaw attach or thaw mount starts another one, which goes on serving the
nodes: see thaw serve --help. For a server that the system starts and restarts, see
scripts/deploy/thaw.service.`

// nodeResult is the result of attach and mount as --json prints it.
type nodeResult struct {
	Type string `json:"type"`
	host.NodeInfo
}

func (a *app) attach(ctx context.Context, image string, o nodeOptions) error {
	spec, err := o.spec(image)
	if err != nil {
		return err
	}
	if err := needRoot("attach"); err != nil {
		return err
	}
	return a.withServer(ctx, o.cache, &o.zone, func(c *api.Client) error {
		n, err := c.Attach(ctx, spec)
		if err != nil {
			return err
		}
		if err := a.sayDriver(n); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(nodeResult{"attached", n})
		}
		_, err = fmt.Fprintln(a.stdout, n.Node)
		return err
	})
}

// sayDriver says on stderr which driver a node has, and why.
func (a *app) sayDriver(n host.NodeInfo) error {
	log, err := a.log()
	if err != nil {
		return err
	}
	log.Info("the node can be read", "node", n.Node, "driver", string(n.Driver), "why", n.Why)
	return nil
}

func detachCommand(a *app) *cobra.Command {
	var cache string
	c := &cobra.Command{
		Use:   "detach NODE",
		Short: "Remove a device node",
		Long: `detach removes a node that thaw attach has made. NODE is its path, such as
/dev/ublkb0. What was written to it is made durable first. A node that is mounted,
or that another program has for itself, is not detached.

If the server of the node was killed, detach removes what is left of the node.`,
		Example: `  thaw detach /dev/ublkb0`,
		Args:    args(cobra.ExactArgs(1)),
		RunE:    func(c *cobra.Command, args []string) error { return a.detach(c.Context(), args[0], cache) },
	}
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// detached is the result of detach as --json prints it.
type detached struct {
	Type string `json:"type"`
	Node string `json:"node"`
}

func (a *app) detach(ctx context.Context, node, cache string) error {
	client, err := control(cache)
	if err != nil {
		return err
	}
	defer client.Close()
	path := node
	if !strings.Contains(node, "/") {
		path = "/dev/" + node
	}
	nodes, err := client.Nodes(ctx)
	switch {
	case errors.Is(err, api.ErrNoServer):
		err = host.RemoveKept(ctx, client.Dir(), path)
	case err == nil:
		id := ""
		for _, n := range nodes {
			if n.Node == path {
				id = n.ID
			}
		}
		if id == "" {
			return fmt.Errorf("the server with the cache %s has no node %s: see thaw list", client.Dir(), path)
		}
		_, err = client.Detach(ctx, id, false)
	}
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(detached{"detached", path})
	}
	return nil
}
