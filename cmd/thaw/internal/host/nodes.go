package host

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"thaw/nbd"
	"thaw/nbd/attach"
)

// NodeSpec says what a node is made of.
type NodeSpec struct {
	// Image is the reference of an image, or the name of a device.
	Image string `json:"image"`
	// Overlay is a directory that keeps what is written to the node. Without it, and
	// without Ephemeral, the node is read-only.
	Overlay string `json:"overlay,omitempty"`
	// Ephemeral forgets what is written with the node.
	Ephemeral bool `json:"ephemeral,omitempty"`
	// Limit bounds the bytes of changed blocks with data. 0 means no limit but the disk.
	Limit  int64         `json:"overlay_limit_bytes,omitempty"`
	Driver attach.Driver `json:"driver,omitempty"` // auto if empty
	Queues int           `json:"queues,omitempty"` // 0: see attach.Options
	// Mount is the directory where the client is about to mount the node. The node is then
	// detached when it has been mounted and is no longer in use.
	Mount string `json:"mount,omitempty"`
}

// NodeState is the state of a node.
type NodeState string

// The states of a node.
const (
	NodeAttaching  NodeState = "attaching"  // it cannot be read yet
	NodeAttached   NodeState = "attached"   // it can be read
	NodeRecovering NodeState = "recovering" // its server was killed; this one will go on serving it
	NodeLost       NodeState = "lost"       // its server was killed, and its reads fail until it is unmounted
)

// NodeInfo describes a node. Its JSON is what the control API answers.
type NodeInfo struct {
	ID       string        `json:"id"`
	Node     string        `json:"node,omitempty"` // its path; empty while it is attaching
	State    NodeState     `json:"state"`
	Error    string        `json:"error,omitempty"` // why it is lost, or still recovering
	Driver   attach.Driver `json:"driver,omitempty"`
	Why      string        `json:"why,omitempty"`    // this driver
	Device   string        `json:"device,omitempty"` // the ID of its device; empty if it is lost
	Name     string        `json:"name"`             // of the image, as it was asked for
	Image    string        `json:"image,omitempty"`  // by digest
	Size     int64         `json:"bytes"`
	Writable bool          `json:"writable"`
	Overlay  *OverlayInfo  `json:"overlay,omitempty"`
	Mount    string        `json:"mount,omitempty"` // where a client has mounted it, or is about to
	Requests *NodeRequests `json:"requests,omitempty"`
}

// NodeRequests are counts of the requests of a node, since this server serves it.
type NodeRequests struct {
	Hits   int64 `json:"hits"`   // reads answered at once
	Misses int64 `json:"misses"` // reads that waited for the disk or for the registry
	Others int64 `json:"others"` // writes, flushes and all that is not a read
	Errors int64 `json:"errors"` // requests that have failed
}

// Errors that callers tell apart.
var (
	ErrNoNode   = errors.New("no such node")
	ErrNodeBusy = attach.ErrBusy // it is mounted, or another program has it for itself
)

// ParseDriver returns the driver of that name, for NodeSpec.
func ParseDriver(name string) (attach.Driver, error) { return attach.ParseDriver(name) }

const (
	// nodeReadAhead is how far the kernel reads ahead of a sequential reader: what disks
	// have. A start takes as long with any value from 0 to 4 MiB, and fetches 3 % more with
	// 4 MiB, which is the default of loop devices on some machines.
	nodeReadAhead = 128 << 10
	// ephemeralDir is the directory, in that of the cache, of overlays that go with their
	// nodes. They have names so that a node goes on if its server is killed.
	ephemeralDir = "ephemeral"
)

// nodes are the nodes of a host.
type nodes struct {
	h         *Host
	admission *nbd.Admission

	ctx      context.Context // of all that goes on in the background
	cancel   context.CancelFunc
	watchers sync.WaitGroup
	stopOnce sync.Once
	stopErr  error

	mu struct {
		sync.Mutex
		all      []*node
		last     int      // the last ID
		stopping bool     // no node can be attached any more
		unswept  []string // tokens of nodes that a killed server was attaching, or removing
		left     bool     // a node outlives the host
	}
}

// node is a node of a host.
type node struct {
	of   *nodes
	id   string
	spec NodeSpec
	// token marks the node while it is being attached, and from its recovery on where it gets
	// another one then.
	token string

	wake chan struct{} // has its watcher look at once
	gone chan struct{} // closed when nothing of it is left
	// removed ends when a request has removed what a killed server had left of the node.
	removed context.Context
	remove  context.CancelFunc

	// Guarded by of.mu.
	state     NodeState
	err       error
	node      *attach.Node // while it is attached
	kept      attach.State // once it is attached
	device    *Device
	release   func()
	image     string // by digest
	ephemeral string // name of the overlay's directory
	draining  bool   // it is to be detached when it is not in use
}

func newNodes(h *Host, a *nbd.Admission) *nodes {
	x := &nodes{h: h, admission: a}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	return x
}

// check refuses what makes no sense.
func (s *NodeSpec) check() error {
	switch {
	case s.Image == "":
		return InvalidError{errors.New("attach: name an image")}
	case s.Overlay != "" && s.Ephemeral:
		return InvalidError{errors.New("attach: an overlay in a directory and one that is forgotten exclude each other")}
	case s.Limit < 0:
		return InvalidError{fmt.Errorf("attach: a limit of %d bytes for an overlay: it cannot be negative", s.Limit)}
	case s.Limit > 0 && s.Overlay == "" && !s.Ephemeral:
		return InvalidError{errors.New("attach: the limit is one of an overlay, and the node is read-only")}
	case s.Queues < 0 || s.Queues > maxQueues:
		return InvalidError{fmt.Errorf("attach: %d queues: the number must be from 1 to %d, or 0 for the default of the driver", s.Queues, maxQueues)}
	}
	d, err := attach.ParseDriver(string(s.Driver))
	if err != nil {
		return InvalidError{fmt.Errorf("attach: %w", err)}
	}
	s.Driver = d
	if err := checkPath("overlay", s.Overlay); err != nil {
		return err
	}
	return checkPath("mount", s.Mount)
}

// maxQueues is how many queues a node can have.
const maxQueues = 64

// Attach gives a device a node below /dev. The device is opened if it is not open, and has
// the node as a user until Detach. The node can be read when Attach returns. ctx bounds
// Attach, not the node; but where ctx has ended when the node is ready, there is none.
func (h *Host) Attach(ctx context.Context, spec NodeSpec) (NodeInfo, error) {
	x := h.nodes
	if err := spec.check(); err != nil {
		return NodeInfo{}, err
	}
	n, err := x.reserve(spec)
	if err != nil {
		return NodeInfo{}, err
	}
	if err := x.attach(ctx, n); err != nil {
		x.drop(n)
		return NodeInfo{}, err
	}
	x.save()
	h.log.Info("attached", "node", n.kept.Path, "image", n.image, "driver", string(n.kept.Driver))
	if ctx.Err() != nil { // nobody learns of the node
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachTime)
		defer cancel()
		if _, err := h.Detach(late, n.id, true); err != nil && !errors.Is(err, ErrNoNode) {
			h.log.Error("cannot detach a node whose client has left", "node", n.kept.Path, "err", err)
		}
		return NodeInfo{}, context.Cause(ctx)
	}
	return x.info(n), nil
}

// reserve makes a node that is attaching.
func (x *nodes) reserve(spec NodeSpec) (*node, error) {
	if spec.Overlay != "" {
		for _, d := range x.h.Devices() {
			if o := d.Info().Overlay; !d.private && o != nil && o.Directory == spec.Overlay {
				return nil, conflict("overlay %s is in use: clients of this server can open it as %s", spec.Overlay, d.Name())
			}
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.stopping {
		return nil, ErrClosed
	}
	if len(x.mu.all) >= maxNodes {
		return nil, conflict("there are %d nodes, the most that a server takes: detach some", maxNodes)
	}
	for _, o := range x.mu.all {
		switch {
		case o.state == NodeLost && !o.kept.Outlives(): // what it had of the overlay is gone with its server
		case spec.Overlay != "" && o.spec.Overlay == spec.Overlay:
			return nil, conflict("overlay %s is in use by %s: detach that first", spec.Overlay, cmp.Or(o.kept.Path, "another node"))
		case spec.Mount != "" && o.spec.Mount == spec.Mount && o.state == NodeAttaching:
			return nil, conflict("another request is about to mount %s at %s", o.spec.Image, spec.Mount)
		}
	}
	return x.add(&node{spec: spec, state: NodeAttaching, token: attach.NewToken()}), nil
}

// add puts a node in the list. x.mu is held.
func (x *nodes) add(n *node) *node {
	x.mu.last++
	n.of, n.id = x, strconv.Itoa(x.mu.last)
	n.wake, n.gone = make(chan struct{}, 1), make(chan struct{})
	n.removed, n.remove = context.WithCancel(x.ctx)
	x.mu.all = append(x.mu.all, n)
	return n
}

// own is the overlay of a node, or nil.
func (n *node) own() *ownOverlay {
	switch {
	case n.spec.Overlay != "":
		return &ownOverlay{dir: n.spec.Overlay, limit: n.spec.Limit}
	case n.ephemeral != "":
		return &ownOverlay{dir: filepath.Join(n.of.h.dir, ephemeralDir, n.ephemeral), limit: n.spec.Limit}
	}
	return nil
}

func (n *node) options() attach.Options {
	return attach.Options{
		Driver: n.spec.Driver, Name: n.spec.Image, Queues: n.spec.Queues, ReadAhead: nodeReadAhead,
		Token: n.token, Admission: n.of.admission, Log: n.of.h.log,
	}
}

// attach makes the node.
func (x *nodes) attach(ctx context.Context, n *node) error {
	if n.spec.Ephemeral {
		n.ephemeral = rand.Text()
		if err := os.MkdirAll(filepath.Join(x.h.dir, ephemeralDir), 0o700); err != nil {
			return fmt.Errorf("directory of overlays: %w", err)
		}
	}
	d, dev, release, err := x.h.acquireNode(ctx, n.spec.Image, n.own())
	if err != nil {
		return err
	}
	n.use(d, release)
	x.save() // or a node that is made just before this process is killed would stay for ever
	a, err := attach.Attach(ctx, dev, n.options())
	if err != nil {
		return fmt.Errorf("%s: %w", n.spec.Image, err)
	}
	if x.begin(n, a) {
		return nil
	}
	// The host is stopping, and has not seen this node.
	if err := a.Detach(context.WithoutCancel(ctx)); err != nil {
		x.h.log.Error("cannot detach a node", "node", a.Path, "err", err)
	}
	return ErrClosed
}

// use says which device is behind a node.
func (n *node) use(d *Device, release func()) {
	n.of.mu.Lock()
	defer n.of.mu.Unlock()
	n.device, n.release, n.image = d, release, d.whose().image.of.Reference()
}

// leave ends the use of the device. An overlay is unlocked when leave returns.
func (n *node) leave() {
	n.of.mu.Lock()
	d, release := n.device, n.release
	n.device, n.release = nil, nil
	n.of.mu.Unlock()
	if release == nil {
		return
	}
	release()
	if n.own() == nil {
		return
	}
	select {
	case <-d.closed:
	case <-n.of.ctx.Done(): // it is not closed any more
	}
}

// begin says that a node can be read. It reports false if the host is stopping.
func (x *nodes) begin(n *node, a *attach.Node) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.stopping {
		return false
	}
	n.node, n.kept, n.state, n.err = a, a.State(), NodeAttached, nil
	x.watchers.Go(func() { x.watch(n) })
	return true
}

// drop forgets a node of which nothing is left.
func (x *nodes) drop(n *node) {
	n.leave()
	if n.ephemeral != "" {
		if err := os.RemoveAll(filepath.Join(x.h.dir, ephemeralDir, n.ephemeral)); err != nil {
			x.h.log.Warn("cannot remove the overlay of a node", "node", n.kept.Path, "err", err)
		}
	}
	x.mu.Lock()
	x.mu.all = slices.DeleteFunc(x.mu.all, func(o *node) bool { return o == n })
	x.mu.Unlock()
	x.save()
	n.remove()
	close(n.gone)
}

// Nodes lists the nodes in the order in which they were asked for.
func (h *Host) Nodes() []NodeInfo {
	x := h.nodes
	x.mu.Lock()
	all := slices.Clone(x.mu.all)
	x.mu.Unlock()
	list := make([]NodeInfo, len(all))
	for i, n := range all {
		list[i] = x.info(n)
	}
	return list
}

// Node returns the node with that ID. It fails with ErrNoNode if there is none.
func (h *Host) Node(id string) (NodeInfo, error) {
	n, err := h.nodes.find(id)
	if err != nil {
		return NodeInfo{}, err
	}
	return h.nodes.info(n), nil
}

func (x *nodes) find(id string) (*node, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, n := range x.mu.all {
		if n.id == id {
			return n, nil
		}
	}
	return nil, fmt.Errorf("node %.100q: %w", id, ErrNoNode)
}

func (x *nodes) info(n *node) NodeInfo {
	x.mu.Lock()
	in := NodeInfo{
		ID: n.id, Node: n.kept.Path, State: n.state, Driver: n.kept.Driver, Name: n.spec.Image, Image: n.image, Size: n.kept.Size,
		Writable: n.spec.Overlay != "" || n.ephemeral != "", Mount: n.spec.Mount,
	}
	if n.err != nil {
		in.Error = n.err.Error()
	}
	a, d := n.node, n.device
	x.mu.Unlock()
	if d != nil {
		in.Device, in.Overlay = d.id, d.overlayInfo()
	}
	if a != nil {
		st := a.Stats()
		in.Why, in.Requests = a.Why, &NodeRequests{st.Hits, st.Misses, st.Others, st.Errors}
	}
	return in
}

// Detach removes a node. It fails with a ConflictError where the node is mounted or another
// program has it for itself. With later, such a node is removed as soon as that ends, and
// gone is false.
func (h *Host) Detach(ctx context.Context, id string, later bool) (gone bool, err error) {
	n, err := h.nodes.find(id)
	if err != nil {
		return false, err
	}
	err = h.nodes.detach(ctx, n)
	if errors.Is(err, attach.ErrBusy) {
		err = ConflictError{err}
		if later {
			h.nodes.mu.Lock()
			n.draining = true
			h.nodes.mu.Unlock()
			return false, nil
		}
	}
	return err == nil, err
}

// detach removes a node, or fails with attach.ErrBusy where it is in use.
func (x *nodes) detach(ctx context.Context, n *node) error {
	x.mu.Lock()
	state, a, kept := n.state, n.node, n.kept
	x.mu.Unlock()
	switch state {
	case NodeAttaching:
		return conflict("the node is being attached")
	case NodeAttached:
		if err := a.Detach(ctx); err != nil {
			select {
			case <-a.Gone(): // but not all could be written back
			default:
				return err
			}
			x.h.log.Error("writes to a node may be lost", "node", kept.Path, "err", err)
			return err
		}
	default:
		if err := removeNode(ctx, kept); err != nil {
			return err
		}
		n.remove()
		select {
		case n.wake <- struct{}{}:
		default:
		}
	}
	select {
	case <-n.gone: // its watcher has seen it
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// removeNode removes what a killed server has left of a node.
func removeNode(ctx context.Context, s attach.State) error {
	if err := attach.Remove(ctx, s); err != nil && !errors.Is(err, attach.ErrGone) {
		return err
	}
	return nil
}

// save writes the state file. A server that cannot write it goes on; its nodes end with it.
func (x *nodes) save() {
	if err := x.h.saveState(); err != nil {
		x.h.log.Warn("cannot write the state file: nodes will not outlive this server", "err", err)
	}
}

// saved are the nodes for the state file, and the tokens of those that are being attached
// or get another one.
func (x *nodes) saved() (kept []savedNode, attaching []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	attaching = slices.Clone(x.mu.unswept)
	for i, n := range x.mu.all {
		if n.state == NodeAttaching {
			attaching = append(attaching, n.token)
			continue
		}
		if n.state == NodeRecovering && n.token != "" {
			attaching = append(attaching, n.token)
		}
		// A lost node can have lost its path to a later one.
		later := func(o *node) bool { return o.kept.Path == n.kept.Path }
		if n.kept.Path == "" || slices.ContainsFunc(x.mu.all[i+1:], later) {
			continue
		}
		kept = append(kept, savedNode{
			Image: n.image, Name: n.spec.Image, Overlay: n.spec.Overlay, Ephemeral: n.ephemeral, Limit: n.spec.Limit, Mount: n.spec.Mount,
			Node: json.RawMessage(n.kept.Encode()),
		})
	}
	return kept, attaching
}

// Used reports whether the host has a node, or a device that clients use or that was added.
func (h *Host) Used() bool {
	h.nodes.mu.Lock()
	n := len(h.nodes.mu.all)
	h.nodes.mu.Unlock()
	return n > 0 || len(h.Devices()) > 0
}

// EndUnused has the host attach and open nothing any more, unless it is used, and reports whether
// it does so. Whoever comes later is told that the host stops, and does not get a node that goes
// at once.
func (h *Host) EndUnused() bool {
	h.nodes.mu.Lock()
	defer h.nodes.mu.Unlock()
	h.devices.mu.Lock()
	defer h.devices.mu.Unlock()
	if len(h.nodes.mu.all) > 0 || len(h.devices.mu.all) > 0 {
		return false
	}
	h.nodes.mu.stopping, h.devices.mu.stopping = true, true
	return true
}

// pause waits for d or for the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
