package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"thaw/nbd/attach"
)

// How a host learns that a node is no longer used. Only the client knows where it has
// mounted a node, and anybody can unmount it there: by thaw umount, by umount, at the end of
// a mount namespace, or when the last program leaves a lazy unmount. So the host looks at
// the node itself: a mount has it for itself alone.
const (
	watchEvery = 250 * time.Millisecond
	// mountTime is how long a node waits to be mounted for the first time. Its client may
	// have died in between.
	mountTime = 2 * time.Minute
	// detachTime bounds a detach that nobody waits for.
	detachTime = 30 * time.Second
)

// watch waits for the end of a node, and brings it about where that is due.
func (x *nodes) watch(n *node) {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	began, seen := time.Now(), false
	for {
		x.mu.Lock()
		a, state, kept := n.node, n.state, n.kept
		ends, due := n.spec.Mount != "", n.draining
		x.mu.Unlock()
		gone := (<-chan struct{})(nil)
		if a != nil {
			gone = a.Gone()
		}
		select {
		case <-gone:
			if err := a.Wait(); err != nil {
				x.h.log.Warn("a node has gone that was not detached", "node", kept.Path, "err", err)
			} else {
				x.h.log.Info("detached", "node", kept.Path, "image", n.image)
			}
			x.drop(n)
			return
		case <-x.ctx.Done():
			return
		case <-ticker.C:
		case <-n.wake:
		}
		switch {
		case state == NodeLost:
			if x.removeLost(n, kept) {
				return
			}
		case state == NodeAttached && (ends || due):
			if inUse(kept.Path) {
				seen = true
			} else if seen || due || time.Since(began) > mountTime {
				x.detachUnused(a)
			}
		}
	}
}

// detachUnused detaches a node that nobody uses. If it is in use again, it stays.
func (x *nodes) detachUnused(a *attach.Node) {
	ctx, cancel := context.WithTimeout(x.ctx, detachTime)
	defer cancel()
	if err := a.Detach(ctx); err != nil && !errors.Is(err, attach.ErrBusy) && x.ctx.Err() == nil {
		x.h.log.Warn("cannot detach a node that is no longer mounted", "node", a.Path, "err", err)
	}
}

// removeLost removes what is left of a lost node, if nobody has it mounted any more.
func (x *nodes) removeLost(n *node, kept attach.State) bool {
	ctx, cancel := context.WithTimeout(x.ctx, detachTime)
	defer cancel()
	if err := removeNode(ctx, kept); err != nil {
		return false
	}
	x.h.log.Info("removed what a killed server has left of a node", "node", kept.Path, "image", n.image)
	x.drop(n)
	return true
}

// inUse reports whether a node is mounted, or another program has it for itself. It does
// not touch the node where this process sees its mount.
func inUse(path string) bool {
	if mountedHere(path) {
		return true
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EBUSY)
}

// mountedHere reports whether a block device is mounted in the mount namespace of this
// process.
func mountedHere(path string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return false
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	dev := fmt.Sprintf(" %d:%d ", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for line := range bytes.Lines(text) {
		// The ID of the mount and that of its parent come before the device.
		if i := bytes.Index(line, []byte(dev)); i >= 0 && bytes.Count(line[:i], []byte(" ")) == 1 {
			return true
		}
	}
	return false
}

// StopNodes ends the nodes of a host that is to stop; Stop does so, too. It detaches those
// that nobody uses. A node in use whose driver is ublk or nbd stays: its readers and writers
// wait for the next server of the cache directory. A node in use whose driver is fuse cannot
// stay. StopNodes waits until it is not in use, or until ctx ends. It then fails, and the
// reads of the node fail when the process ends.
func (h *Host) StopNodes(ctx context.Context) error {
	x := h.nodes
	x.stopOnce.Do(func() { x.stopErr = x.stop(ctx) })
	return x.stopErr
}

func (x *nodes) stop(ctx context.Context) error {
	x.mu.Lock()
	x.mu.stopping = true
	all := slices.Clone(x.mu.all)
	x.mu.Unlock()
	var wg sync.WaitGroup
	errs := make([]error, len(all))
	for i, n := range all {
		wg.Go(func() { errs[i] = x.stopNode(ctx, n) })
	}
	wg.Wait()
	x.cancel()
	x.watchers.Wait()
	x.save()
	return errors.Join(errs...)
}

// stopNode ends one node.
func (x *nodes) stopNode(ctx context.Context, n *node) error {
	said := false
	for {
		x.mu.Lock()
		a, kept, state := n.node, n.kept, n.state
		x.mu.Unlock()
		if state != NodeAttached {
			return nil // its request ends by itself, and the next server knows the others
		}
		err := a.Detach(ctx)
		switch {
		case err == nil:
			select {
			case <-n.gone:
			case <-ctx.Done(): // a commit of its overlay goes on
			}
			return nil
		case !errors.Is(err, attach.ErrBusy):
			return err
		case kept.Outlives():
			x.leave()
			x.h.log.Warn("a node is in use and stays: its readers and writers wait for the next server of this cache directory", "node", kept.Path, "image", n.image, "cache", x.h.dir)
			return nil
		case !said:
			said = true
			x.h.log.Warn("a node is in use: the server waits until it is unmounted, for the grace at most; then its reads fail", "node", kept.Path, "image", n.image)
		}
		if pause(ctx, watchEvery) != nil {
			x.leave()
			where := ""
			if n.spec.Mount != "" {
				where = " at " + n.spec.Mount
			}
			return fmt.Errorf("%s is still in use%s: its reads and writes fail from now on; unmount it, or mount it again by: %s", kept.Path, where, n.again())
		}
	}
}

// again is the command that mounts a node again.
func (n *node) again() string {
	words := []string{"thaw", "mount", n.spec.Image, n.spec.Mount}
	switch {
	case n.spec.Mount == "":
		words = []string{"thaw", "attach", n.spec.Image}
	case n.spec.Overlay != "":
		words = append(words, "--overlay", n.spec.Overlay)
	case n.spec.Ephemeral:
		words = append(words, "--ephemeral")
	}
	return strings.Join(words, " ")
}

// leave notes that a node outlives the host, so that what it is made of stays open until the
// end of the process.
func (x *nodes) leave() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mu.left = true
}

// outlived reports whether a node outlives the host.
func (x *nodes) outlived() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.mu.left
}
