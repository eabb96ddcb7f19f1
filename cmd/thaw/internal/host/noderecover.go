package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"thaw/blockmap"
	"thaw/fetcher/registry"
	"thaw/nbd/attach"
)

// recoverTime bounds the wait for a killed server that is not quite gone.
const recoverTime = 30 * time.Second

// recoverNodes goes on serving the nodes of a server that was killed, in the background: see
// attach.Recover. A node of an image that cannot be had for the moment waits for it. So
// does one whose overlay is not there: its filesystem may be mounted later. One
// that cannot be recovered is lost; what is left of it is removed when it is unmounted.
//
// Nodes that the server was attaching, of which nobody was told, are removed: those with a
// token of attaching.
func (x *nodes) recoverNodes(kept []savedNode, attaching []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mu.unswept = attaching[max(0, len(attaching)-maxNodes):]
	for _, token := range x.mu.unswept {
		x.watchers.Go(func() { x.sweep(token) })
	}
	for _, k := range kept {
		n := x.add(&node{
			state: NodeRecovering, kept: k.state, image: k.Image, ephemeral: k.Ephemeral,
			spec: NodeSpec{
				Image: k.Name, Overlay: k.Overlay, Ephemeral: k.Ephemeral != "", Limit: k.Limit, Mount: k.Mount,
				Driver: k.state.Driver, Queues: k.state.Queues,
			},
		})
		if n.kept.Driver == attach.FUSE {
			n.token = attach.NewToken() // see attach.Recover
		}
		x.watchers.Go(func() { x.recover(n) })
	}
}

// recover goes on serving a node, or says why that cannot be.
func (x *nodes) recover(n *node) {
	if n.token != "" {
		x.save() // or the node would stay for ever if this process is killed before it is recovered
	}
	for wait := watchEvery; ; wait = min(2*wait, 10*time.Second) {
		err := x.tryRecover(n)
		switch {
		case x.ctx.Err() != nil:
			return
		case err == nil:
			x.save()
			x.h.log.Info("recovered", "node", n.kept.Path, "image", n.image, "driver", string(n.kept.Driver))
			return
		case errors.Is(err, attach.ErrGone), n.removed.Err() != nil:
			x.h.log.Info("a node of the last server is gone", "node", n.kept.Path, "err", err)
			x.sweepGone(n.kept) // the server may have been killed while it removed the node
			x.drop(n)
			return
		case !passing(err):
			x.lose(n, err)
			return
		}
		x.h.log.Warn("cannot recover a node yet", "node", n.kept.Path, "err", err)
		x.mu.Lock()
		n.err = err
		x.mu.Unlock()
		_ = pause(n.removed, wait)
	}
}

// sweepGone removes what a killed server has left of a node that is gone. Its token stays in the
// state file until nothing is left.
func (x *nodes) sweepGone(kept attach.State) {
	if kept.Boot != bootText() || !attach.ValidToken(kept.Token) {
		return // no node outlives its boot
	}
	x.mu.Lock()
	x.mu.unswept = append(x.mu.unswept, kept.Token)
	x.mu.unswept = x.mu.unswept[max(0, len(x.mu.unswept)-maxNodes):]
	x.mu.Unlock()
	x.sweep(kept.Token)
}

// sweep removes what a killed server has left of a node that nobody is to go on serving. What
// cannot be removed is left to the next server.
func (x *nodes) sweep(token string) {
	ctx, cancel := context.WithTimeout(x.ctx, recoverTime)
	defer cancel()
	if err := attach.Sweep(ctx, token); err != nil {
		if x.ctx.Err() == nil {
			x.h.log.Warn("cannot remove what the last server has left of a node", "err", err)
		}
		return
	}
	x.mu.Lock()
	n := len(x.mu.unswept)
	x.mu.unswept = slices.DeleteFunc(x.mu.unswept, func(t string) bool { return t == token })
	changed := len(x.mu.unswept) < n
	x.mu.Unlock()
	if changed {
		x.save()
	}
}

// bootText is how an attach.State names this run of the kernel.
func bootText() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown" // as attach.State has it then
	}
	return strings.TrimSpace(string(b))
}

// passing reports whether an error may pass.
func passing(err error) bool {
	return registry.Temporary(err) || errors.Is(err, registry.ErrUnavailable) || errors.Is(err, blockmap.ErrLocked) ||
		errors.Is(err, blockmap.ErrNoOverlay) || errors.Is(err, context.DeadlineExceeded)
}

func (x *nodes) tryRecover(n *node) error {
	if _, err := os.Lstat(n.kept.Path); n.kept.Boot != bootText() || errors.Is(err, fs.ErrNotExist) {
		return attach.ErrGone // before its image is asked for
	}
	if n.kept.Driver == attach.FUSE && (!n.kept.ReadOnly || inUse(n.kept.Path)) {
		// A loop device can get another file when its own is dead, but the kernel then shuts
		// down the filesystem on it: to the kernel the medium has changed.
		return errors.New("its server was killed, and the driver fuse cannot go on with a node that is mounted or writable")
	}
	own := n.own()
	if own != nil { // or else what is mounted on the node would find it as it was before its changes
		own.existing = true
	}
	d, dev, release, err := x.h.acquireNode(n.removed, n.image, own)
	if errors.Is(err, blockmap.ErrNoOverlay) {
		err = fmt.Errorf("%w: the last server had one there: put it back, or unmount and detach the node", err)
	}
	if err != nil {
		return err
	}
	n.use(d, release)
	ctx, cancel := context.WithTimeout(n.removed, recoverTime)
	defer cancel()
	a, err := attach.Recover(ctx, n.kept, dev, n.options())
	if err != nil {
		n.leave()
		return err
	}
	if !x.begin(n, a) {
		x.leave() // the host is stopping, and the next one recovers the node
	}
	return nil
}

// lose says that a node cannot be recovered.
func (x *nodes) lose(n *node, err error) {
	x.h.log.Error("a node is lost: its reads and writes fail until it is unmounted", "node", n.kept.Path, "image", n.image, "err", err)
	x.mu.Lock()
	n.state, n.err = NodeLost, err
	x.mu.Unlock()
	x.watchers.Go(func() { x.watch(n) })
}

// KeptNode finds a node in the state file of a cache directory whose server was killed. Its
// Node is empty if there is none of that path.
func KeptNode(dir, path string) (NodeInfo, error) {
	k, err := keptNode(dir, path)
	if err != nil || k == nil {
		return NodeInfo{}, err
	}
	return k.info(), nil
}

// KeptNodes lists the nodes in the state file of a cache directory.
func KeptNodes(dir string) (list []NodeInfo, err error) {
	kept, _, err := readState(dir)
	for _, k := range kept.Nodes {
		list = append(list, k.info())
	}
	return list, err
}

func (k *savedNode) info() NodeInfo {
	return NodeInfo{
		Node: k.state.Path, State: NodeLost, Driver: k.state.Driver, Name: k.Name, Image: k.Image, Size: k.state.Size, Writable: !k.state.ReadOnly, Mount: k.Mount,
	}
}

func keptNode(dir, path string) (*savedNode, error) {
	kept, _, err := readState(dir)
	if err != nil {
		return nil, err
	}
	for _, k := range kept.Nodes {
		if k.state.Path == path {
			return &k, nil
		}
	}
	return nil, nil
}

// RemoveKept removes what a killed server has left of a node. The state file stays as it
// is: the next server sees that the node is gone.
func RemoveKept(ctx context.Context, dir, path string) error {
	k, err := keptNode(dir, path)
	if err != nil {
		return err
	}
	if k == nil {
		return fmt.Errorf("no server uses the cache %s, and the last one had no node %s", dir, path)
	}
	return removeNode(ctx, k.state)
}
