package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// Node is a device with its place below /dev.
type Node struct {
	Path   string // /dev/ublkb0
	Driver Driver // which one it became
	Why    string // why this driver, for people

	serving *serving
	driver  driver
	state   State
	gone    chan struct{}
	once    sync.Once   // of gone
	err     error       // why it has gone; set before gone is closed
	leaving atomic.Bool // Detach has begun

	detaching sync.Mutex
}

// driver is one of the three at work.
type driver interface {
	// detach removes the node: whatever the kernel still asks fails. It may be called
	// again after it has failed.
	detach(ctx context.Context) error
}

func newNode(dev blockmap.Device, o Options) *Node {
	return &Node{serving: newServing(dev, o), gone: make(chan struct{})}
}

// end says that the node has gone, with the reason if that was not Detach.
func (n *Node) end(reason error) {
	n.once.Do(func() {
		if !n.leaving.Load() {
			n.err = reason
		}
		n.serving.cancel(errDetached)
		close(n.gone)
	})
}

// ready ends an attach: the node is there.
func (n *Node) ready(o Options) {
	n.Path = n.state.Path
	if o.ReadAhead == 0 {
		return
	}
	if err := setReadAhead(n.Path, o.ReadAhead); err != nil {
		o.Log.Warn("cannot set the readahead of a node", "node", n.Path, "err", err)
	}
}

// State is what another process needs to go on serving the node if this one dies: keep
// it where that process looks. It is valid until the node has gone.
func (n *Node) State() State { return n.state }

// Gone is closed when the node has gone, and nothing of it is left in this process.
func (n *Node) Gone() <-chan struct{} { return n.gone }

// Wait waits until the node has gone. It returns nil if Detach has removed it, and the
// reason otherwise: another program has, say.
func (n *Node) Wait() error {
	<-n.gone
	return n.err
}

// Stats are counts since Attach.
func (n *Node) Stats() Stats { return n.serving.stats() }

// Detach removes the node. Where a filesystem on it is mounted, or another program has it
// for itself, Detach fails with ErrBusy and changes nothing. Otherwise it writes back
// what the kernel has not written yet, as far as ctx allows, and fails the requests that
// are left with EIO: one that waits for an origin does not hold it up. A node that has
// gone already is detached. Where Detach fails with another error than ErrBusy, the node
// may be gone all the same: Gone tells.
func (n *Node) Detach(ctx context.Context) error {
	n.detaching.Lock()
	defer n.detaching.Unlock()
	select {
	case <-n.gone:
		return nil
	default:
	}
	lost, err := n.settle(ctx)
	if err != nil {
		return err
	}
	n.leaving.Store(true)
	n.serving.cancel(errDetached)
	// Nothing waits for an origin any more: this takes its time, whatever is left of ctx's.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachPatience)
	defer cancel()
	if err := n.driver.detach(ctx); err != nil {
		return errors.Join(fmt.Errorf("detach %s: %w", n.Path, err), lost)
	}
	n.end(nil)
	return lost
}

// detachPatience bounds what the kernel takes to remove a node.
const detachPatience = 30 * time.Second

// settle has the kernel write back what it holds of the node. lost says that it could
// not; err that the node is in use.
func (n *Node) settle(ctx context.Context) (lost, err error) {
	type outcome struct{ lost, err error }
	done := make(chan outcome, 1)
	go func() {
		f, err := openExclusive(n.Path)
		if err != nil {
			done <- outcome{nil, err}
			return
		}
		defer f.Close()
		var lost error
		if n.serving.wdev != nil {
			lost = f.Sync()
		}
		done <- outcome{lost, flushPages(f)}
	}()
	select {
	case o := <-done:
		switch {
		case errors.Is(o.err, unix.EBUSY):
			return nil, fmt.Errorf("detach %s: it is mounted, or another program has it for itself: unmount it first: %w", n.Path, ErrBusy)
		case errors.Is(o.err, os.ErrNotExist), errors.Is(o.err, unix.ENXIO):
			return nil, nil // the kernel has removed it meanwhile
		case o.err != nil && o.lost == nil:
			o.lost = o.err
		}
		if o.lost != nil {
			return fmt.Errorf("detach %s: what the kernel had not written yet is lost: %w", n.Path, o.lost), nil
		}
		return nil, nil
	case <-ctx.Done():
		// The node goes all the same. The goroutine ends with the requests that it
		// waits for.
		return fmt.Errorf("detach %s: what the kernel had not written yet may be lost: %w", n.Path, context.Cause(ctx)), nil
	}
}
