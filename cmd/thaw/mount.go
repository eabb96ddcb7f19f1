package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

func mountCommand(a *app) *cobra.Command {
	var o nodeOptions
	c := &cobra.Command{
		Use:   "mount IMAGE DIR",
		Short: "Mount an image in a directory",
		Long: `mount attaches an image as thaw attach does, and mounts its filesystem in DIR. The
mount works before the image has arrived. It is read-only unless a flag says where
changes are kept. The node is detached when the filesystem is unmounted, by thaw
umount or in any other way.

If the server of a mount in DIR was killed, the same command heals the mount. With
the driver fuse, it unmounts what is dead and mounts the image again: programs must
open their files again, and with --overlay all that was flushed is there. With ublk
and nbd, the mount and its open files go on.

` + backgroundHelp,
		Example: `  thaw mount registry.example/team/app:v1 /mnt && chroot /mnt /bin/sh
  thaw mount registry.example/team/app:v1 /srv/vm7 --overlay /var/lib/vm7
  thaw mount registry.example/team/app:v1 /mnt --ephemeral
  thaw umount /mnt`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error { return a.mount(c.Context(), args[0], args[1], o) },
	}
	o.flags(a, c)
	return c
}

func (a *app) mount(ctx context.Context, image, dir string, o nodeOptions) error {
	spec, err := o.spec(image)
	if err != nil {
		return err
	}
	if err := needRoot("mount"); err != nil {
		return err
	}
	if spec.Mount, err = mountDir(dir); err != nil {
		return err
	}
	return a.withServer(ctx, o.cache, &o.zone, func(c *api.Client) error {
		n, err := a.mountThere(ctx, c, spec)
		if err != nil {
			return err
		}
		if n.Node == "" {
			if err := mustBeDir(spec.Mount); err != nil {
				return err
			}
			if n, err = c.Attach(ctx, spec); err != nil {
				return err
			}
			if err := a.sayDriver(n); err != nil {
				return err
			}
			if err := mountNode(ctx, n); err != nil {
				// With a context of its own: an interrupted mount leaves nothing.
				if _, e := c.Detach(context.WithoutCancel(ctx), n.ID, true); e != nil {
					err = fmt.Errorf("%w; the node %s stays: %w", err, n.Node, e)
				}
				return err
			}
			// From now on the node goes with the mount, however soon that ends.
			if _, err := c.Detach(ctx, n.ID, true); err != nil && !isNotFound(err) {
				return fmt.Errorf("%s is mounted, and its node %s may stay when it is unmounted: %w", spec.Mount, n.Node, err)
			}
		}
		if a.json {
			return a.printJSON(nodeResult{"mounted", n})
		}
		access := "read-only"
		if n.Writable {
			access = "writable"
		}
		_, err = fmt.Fprintf(a.stdout, "%s on %s, %s\n", n.Node, spec.Mount, access)
		return err
	})
}

// mountDir is the path of a mount point, as the kernel lists it.
func mountDir(dir string) (string, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	// The directory itself may be a mount whose reads fail.
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	path = filepath.Join(parent, filepath.Base(path))
	if target, err := os.Readlink(path); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(parent, target)
		}
		return filepath.EvalSymlinks(target)
	}
	return path, nil
}

func mustBeDir(dir string) error {
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot mount at %s: there is no such directory: make it by mkdir -p %s", dir, shellWord(dir))
	case err != nil:
		return fmt.Errorf("cannot mount at %s: %w", dir, err)
	case !fi.IsDir():
		return fmt.Errorf("cannot mount at %s: it is not a directory", dir)
	}
	return nil
}

// healTime bounds the wait for a node that is being recovered.
const healTime = time.Minute

// mountThere returns the node that is mounted where spec is to be, if it is one of that
// image. If it is dead, it is unmounted, and none is returned.
func (a *app) mountThere(ctx context.Context, c *api.Client, spec host.NodeSpec) (none host.NodeInfo, err error) {
	log, err := a.log()
	if err != nil {
		return none, err
	}
	for end := time.Now().Add(healTime); ; {
		m, ok, err := mountedAt(spec.Mount)
		if err != nil || !ok {
			return none, err
		}
		n, err := nodeAt(ctx, c, m.source)
		if err != nil {
			return none, err
		}
		switch {
		case n.Node == "":
			if m.fsType != "ext4" {
				return none, nil // the image is mounted on top, as by mount(8)
			}
			return none, fmt.Errorf("%s is mounted at %s already: unmount it first", m.source, spec.Mount)
		case n.State == host.NodeAttached:
			if n.Name != spec.Image && n.Image != spec.Image || n.Writable != (spec.Overlay != "" || spec.Ephemeral) || n.Overlay != nil && spec.Overlay != "" && n.Overlay.Directory != spec.Overlay {
				return none, fmt.Errorf("%s is mounted at %s already, from %s: unmount it first by thaw umount %s", n.Name, spec.Mount, n.Node, shellWord(spec.Mount))
			}
			log.Info("the image is mounted already", "node", n.Node, "image", n.Image)
			return n, nil
		case n.State == host.NodeLost:
			log.Warn("the server of this mount was killed: it is mounted anew", "node", n.Node, "err", n.Error)
			err := unix.Unmount(spec.Mount, 0)
			if err == unix.EBUSY {
				log.Warn("programs still use files of the dead mount; their reads and writes fail until they close them", "dir", spec.Mount)
				err = unix.Unmount(spec.Mount, unix.MNT_DETACH)
			}
			if err != nil {
				return none, fmt.Errorf("unmount the dead mount at %s: %w", spec.Mount, err)
			}
			if _, err := c.Detach(ctx, n.ID, true); err != nil && !isNotFound(err) {
				return none, err
			}
			continue // until nothing is mounted there
		case time.Now().After(end):
			return none, fmt.Errorf("the mount at %s cannot be recovered yet: %s", spec.Mount, cmp.Or(n.Error, string(n.State)))
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return none, err
		}
	}
}

func isNotFound(err error) bool {
	e, ok := errors.AsType[*api.Error](err)
	return ok && e.Code == 404
}

// nodeAt finds the node of that path; its Node is empty if there is none. The last one has
// the path: others that are listed with it have lost it.
func nodeAt(ctx context.Context, c *api.Client, path string) (host.NodeInfo, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return host.NodeInfo{}, err
	}
	var at host.NodeInfo
	for _, n := range nodes {
		if n.Node == path {
			at = n
		}
	}
	return at, nil
}

// mountNode mounts a node in the mount namespace of this process.
func mountNode(ctx context.Context, n host.NodeInfo) error {
	recover, err := interruptible(ctx, func() (bool, error) { return needsRecovery(n.Node) })
	if err != nil {
		return fmt.Errorf("cannot mount %s: %w", n.Name, err)
	}
	var flags uintptr
	var data string
	if !n.Writable {
		if recover {
			return fmt.Errorf("cannot mount %s read-only: its filesystem was not unmounted when the image was made, and the kernel has to replay its journal: add --ephemeral, or --overlay DIR", n.Name)
		}
		// The journal is empty, and nothing could be written to it.
		flags, data = unix.MS_RDONLY, "noload"
	}
	_, err = interruptible(ctx, func() (struct{}, error) {
		// The server looks now and then whether a node is in use, and has it for itself then.
		for end := time.Now().Add(5 * time.Second); ; {
			err := unix.Mount(n.Node, n.Mount, "ext4", flags, data)
			if err != unix.EBUSY || time.Now().After(end) {
				return struct{}{}, err
			}
			if err := sleep(ctx, 10*time.Millisecond); err != nil {
				return struct{}{}, err
			}
		}
	})
	switch {
	case err == nil, ctx.Err() != nil:
		return err
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("cannot mount %s at %s: %w: a container requires CAP_SYS_ADMIN for that", n.Node, n.Mount, err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("cannot mount %s at %s: the kernel has no ext4: load the module by modprobe ext4", n.Node, n.Mount)
	}
	return fmt.Errorf("cannot mount %s at %s: %w: the kernel's log may say more: dmesg", n.Node, n.Mount, err)
}

// Where an ext4 has what mountNode looks at, in bytes.
const (
	superOffset    = 1024
	superMagic     = 0x38
	superIncompat  = 0x60
	incompatJournl = 0x4 // the journal has to be replayed
)

// needsRecovery reports whether the ext4 on a node has a journal that is not empty.
func needsRecovery(node string) (bool, error) {
	f, err := os.Open(node)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var super [128]byte
	if _, err := f.ReadAt(super[:], superOffset); err != nil {
		return false, fmt.Errorf("read its superblock: %w", err)
	}
	if super[superMagic] != 0x53 || super[superMagic+1] != 0xef {
		return false, errors.New("it is not an ext4: use thaw attach, and mount the node yourself")
	}
	return super[superIncompat]&incompatJournl != 0, nil
}
