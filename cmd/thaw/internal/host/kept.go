package host

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"thaw/blockmap"
)

// This file keeps devices for the next host in the cache directory: those that were added by
// the control API, and the overlays that go with devices. A virtual machine whose server was
// killed finds its socket, its image and its changes again. It never reads a disk as it was
// before its changes: where these may be lost, its device is not opened.

const (
	restoreEvery = 500 * time.Millisecond
	restoreLeast = 10 * time.Second
	socketEvery  = time.Second
)

// kept is what the next host is to have of this one's devices, and what this one has found
// of the last one's.
type kept struct {
	writing   sync.Mutex // the state file, and durable
	durable   bool       // the state file has devices, which are to outlive a loss of power
	restoring sync.WaitGroup

	mu struct {
		sync.Mutex
		next  *saving       // of the state file; nil: nobody waits for one
		known bool          // the state file was read
		found []savedDevice // of the last host; no device of this one is open with their overlays
		// claimed are the overlays of found that a device is being opened with, by name.
		claimed map[string]*Device
		frozen  bool          // the host stops
		last    []savedDevice // then: of its devices
		timer   *time.Timer   // forgets what clients have not asked for again
	}
}

// Recover reads what the last host in the cache directory has left, if it was killed. It
// goes on serving its nodes, in the background. Its devices come by RestoreDevices, and the
// overlays that went with devices when these are opened.
func (h *Host) Recover() {
	state, bad, err := readState(h.dir)
	for _, b := range bad {
		h.log.Error("an entry of the state file makes no sense and is left out", "err", b)
	}
	unread := filepath.Join(h.dir, stateName+".damaged")
	if err != nil {
		h.log.Error("the nodes and devices of the last server are left alone", "err", err)
		if err := os.Rename(filepath.Join(h.dir, stateName), unread); err != nil && !errors.Is(err, fs.ErrNotExist) {
			h.log.Warn("cannot keep the state file", "err", err)
		}
	}
	used := make(map[string]bool)
	for _, n := range state.Nodes {
		used[n.Ephemeral] = true
	}
	boot := bootText()
	h.kept.mu.Lock()
	h.kept.mu.known = true
	for _, k := range state.Devices {
		if k.Ephemeral != "" && k.Boot != boot { // no virtual machine has outlived that
			if k.Ephemeral, k.Boot = "", ""; k.By != byAPI {
				continue
			}
		}
		used[k.Ephemeral] = true
		h.kept.mu.found = append(h.kept.mu.found, k)
	}
	h.kept.mu.Unlock()
	h.kept.writing.Lock()
	h.kept.durable = len(state.Devices) > 0
	h.kept.writing.Unlock()
	switch _, e := os.Lstat(unread); {
	case err == nil && errors.Is(e, fs.ErrNotExist):
		h.removeEphemeral(used)
	case h.hasEphemeral():
		h.log.Warn("an earlier state file could not be read: the overlays that it may name are kept; remove the file if nobody needs them",
			"file", unread, "overlays", filepath.Join(h.dir, ephemeralDir))
	}
	h.nodes.recoverNodes(state.Nodes, state.Attaching)
}

// hasEphemeral reports whether there are overlays that go with nodes and devices.
func (h *Host) hasEphemeral() bool {
	there, err := os.ReadDir(filepath.Join(h.dir, ephemeralDir))
	return err == nil && len(there) > 0
}

// removeEphemeral removes overlays that went with nodes and devices, except those in use.
func (h *Host) removeEphemeral(used map[string]bool) {
	dir := filepath.Join(h.dir, ephemeralDir)
	there, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.log.Warn("cannot look for overlays whose nodes and devices are gone", "err", err)
	}
	for _, e := range there {
		if used[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			h.log.Warn("cannot remove the overlay of a node or device that is gone", "err", err)
		}
	}
}

// RestoreDevices adds the devices again that were added to the last host with Keep, with the
// same names, images, overlays and sockets. It returns when they are ready; what cannot be
// opened, or not within 4 s, is tried again in the background, until it is removed. A device
// that does not suit the options of this host is left to another one.
func (h *Host) RestoreDevices(ctx context.Context) error {
	h.kept.mu.Lock()
	found := slices.Clone(h.kept.mu.found)
	h.kept.mu.Unlock()
	found = slices.DeleteFunc(found, func(k savedDevice) bool {
		if k.By != byAPI {
			return true
		}
		err := h.suits(&k)
		if err != nil {
			h.log.Error("a device of the last server does not suit this one, and waits for another server", "device", k.Name, "err", err)
		}
		return err != nil
	})
	restored, errs, err := h.devices.restore(found)
	if err != nil {
		return err
	}
	// Two look-ups that the registry does not answer.
	wait, cancel := context.WithTimeout(ctx, 2*h.traces.opener.patience)
	defer cancel()
	ready := make(map[*Device]chan struct{})
	for i, d := range restored {
		if d == nil && h.devices.byName(found[i].Name) == nil {
			h.log.Error("a device of the last server cannot be opened, and stays in the state file for the next server", "device", found[i].Name, "err", errs[i])
			continue
		}
		if d == nil { // another device has its name
			h.log.Warn("a device of the last server has another one in its place", "device", found[i].Name)
			h.supersede(found[i].Name)
			continue
		}
		done := make(chan struct{})
		ready[d] = done
		h.kept.restoring.Go(func() { h.restore(d, sync.OnceFunc(func() { close(done) })) })
	}
	for d, done := range ready {
		select {
		case <-done:
		case <-d.troubles:
		case <-wait.Done():
		}
	}
	if len(ready) > 0 {
		if err := h.saveState(); err != nil {
			h.log.Warn("cannot write the state file", "err", err)
		}
	}
	return ctx.Err()
}

// suits fails if this host cannot serve a device as the last one did.
func (h *Host) suits(k *savedDevice) error {
	image, client := SplitClient(k.Image)
	mine := h.devices.clients && client != ""
	if !mine {
		client = ""
	}
	switch {
	case h.overlays.Dir != "" || h.traces.Record != "":
		return errors.New("this server serves one image only")
	case k.Overlay != "" && (!mine || h.overlays.Each == "" || k.Overlay != filepath.Join(h.overlays.Each, client)):
		return fmt.Errorf("its overlay is %s: start thaw serve with --overlay-each %s", k.Overlay, filepath.Dir(k.Overlay))
	case k.Overlay == "" && k.Writable != h.overlays.Ephemeral:
		if k.Writable {
			return errors.New("its changes are forgotten with it: start thaw serve with --ephemeral")
		}
		return errors.New("it is read-only: start thaw serve without --ephemeral")
	case k.Overlay == "" && mine && !k.Writable:
		return fmt.Errorf("it is read-only, and the server would give the client %s of %s an overlay: start thaw serve without --overlay-each", client, image)
	}
	if want := filepath.Join(h.sockets.Dir, socketName(k.Name, client)); k.Socket != "" && (h.sockets.Dir == "" || k.Socket != want) {
		return fmt.Errorf("its socket is %s: start thaw serve with --vhost-user %s", k.Socket, filepath.Dir(k.Socket))
	}
	return nil
}

// restore begins to open devices of the last host. A device that there cannot be is nil: its
// name is taken, or errs says why.
func (t *devices) restore(found []savedDevice) (restored []*Device, errs []error, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.stopping {
		return nil, nil, ErrClosed
	}
	first := !t.anyPermanent()
	restored, errs = make([]*Device, len(found)), make([]error, len(found))
	for i := range found {
		k := &found[i]
		d, err := t.reserveOne(Spec{Name: k.Name, Image: k.Image, Keep: true, saved: k})
		if errs[i] = err; err != nil || d.permanent {
			continue
		}
		d.permanent, d.keep = true, true
		t.use(d)
		if first && k.Default {
			t.mu.alone = d
		}
		restored[i] = d
	}
	return restored, errs, nil
}

// restore waits until d is open, and gives it its socket. It calls done when d is ready, or
// its socket is in use.
func (h *Host) restore(d *Device, done func()) {
	defer done()
	<-d.ready
	if d.err != nil {
		return // it was removed, or the host stops
	}
	for first := true; ; first = false {
		err := h.openSockets(h.devices.ctx, []*Device{d}, []Spec{d.spec})
		d.of.mu.Lock()
		permanent := d.permanent
		d.of.mu.Unlock()
		if err == nil {
			break
		}
		if !permanent || h.devices.ctx.Err() != nil {
			return
		}
		if first {
			h.log.Error("a device of the last server has no socket yet", "device", d.spec.Name, "err", err)
			done()
		}
		_ = pause(h.devices.ctx, socketEvery)
	}
	h.log.Info("restored a device of the last server", "device", d.spec.Name, "image", d.whose().image.of.Reference())
}

// keep has the next host add devices again, those that are to be kept. They are in the state
// file when it returns.
func (h *Host) keep(devices []*Device, specs []Spec) error {
	some := false
	for i, d := range devices {
		if specs[i].Keep {
			some = true
			h.devices.mu.Lock()
			d.keep = true
			h.devices.mu.Unlock()
			h.supersede(d.spec.Name)
		}
	}
	if !some {
		return nil
	}
	h.kept.mu.Lock()
	frozen := h.kept.mu.frozen
	h.kept.mu.Unlock()
	if frozen {
		return ErrClosed
	}
	if err := h.saveState(); err != nil {
		return fmt.Errorf("keep the device for the time after a restart: %w", err)
	}
	return nil
}

// forget has the next host not add d again, which was removed.
func (h *Host) forget(d *Device) error {
	h.devices.mu.Lock()
	kept := d.keep
	d.keep = false
	h.devices.mu.Unlock()
	if !kept {
		return nil
	}
	h.drop(func(k *savedDevice) bool { return k.Name == d.spec.Name }, true) // also if d is still being opened
	h.kept.mu.Lock()
	h.kept.mu.last = slices.DeleteFunc(h.kept.mu.last, func(k savedDevice) bool { return k.Name == d.spec.Name })
	h.kept.mu.Unlock()
	if err := h.saveState(); err != nil {
		return fmt.Errorf("device %s is removed, but the next server will have it again: %w", d.id, err)
	}
	return nil
}

// supersede forgets what the last host has left of a device of that name, unless a device
// is being opened with it.
func (h *Host) supersede(name string) {
	h.drop(func(k *savedDevice) bool { return k.Name == name }, false)
}

// drop forgets devices of the last host, with their overlays. Those that a device is being
// opened with are forgotten only if claimed is set.
func (h *Host) drop(which func(*savedDevice) bool, claimed bool) (dropped int) {
	var unclaimed []string
	h.kept.mu.Lock()
	h.kept.mu.found = slices.DeleteFunc(h.kept.mu.found, func(k savedDevice) bool {
		if !which(&k) || !claimed && h.kept.mu.claimed[k.Ephemeral] != nil {
			return false
		}
		dropped++
		if k.Ephemeral != "" {
			unclaimed = append(unclaimed, k.Ephemeral)
		}
		return true
	})
	h.kept.mu.Unlock()
	for _, name := range unclaimed {
		h.removeOverlay(name)
	}
	return dropped
}

func (h *Host) removeOverlay(name string) {
	if err := os.RemoveAll(filepath.Join(h.dir, ephemeralDir, name)); err != nil {
		h.log.Warn("cannot remove the overlay of a device that is gone", "err", err)
	}
}

// saving is one writing of the state file.
type saving struct {
	done chan struct{}
	err  error // once done is closed
}

// saveState writes the state file. One writing serves all who wait for it: a thousand devices
// that are restored at once do not wait for the disk one after the other.
func (h *Host) saveState() error {
	x := &h.kept
	x.mu.Lock()
	s := x.mu.next
	first := s == nil
	if first {
		s = &saving{done: make(chan struct{})}
		x.mu.next = s
	}
	x.mu.Unlock()
	if !first {
		<-s.done
		return s.err
	}
	x.writing.Lock()
	defer x.writing.Unlock()
	x.mu.Lock()
	x.mu.next = nil // whoever comes from now on may have changed what is being written
	x.mu.Unlock()
	s.err = h.writeKept()
	close(s.done)
	return s.err
}

// writeKept writes the state file. A host that has not read it, and has nothing to write,
// leaves it alone: it may be that of a server that was killed. h.kept.writing is held.
func (h *Host) writeKept() error {
	s := saved{Devices: h.kept.devices(h.devices)}
	s.Nodes, s.Attaching = h.nodes.saved()
	h.kept.mu.Lock()
	known := h.kept.mu.known || !s.empty()
	h.kept.mu.known = known
	h.kept.mu.Unlock()
	if !known {
		return nil
	}
	for i := range s.Devices { // or the next host would leave it out, with its changes
		if err := s.Devices[i].check(); err != nil {
			return InvalidError{fmt.Errorf("the device %.100q cannot be in the state file: %w", s.Devices[i].Name, err)}
		}
	}
	if err := writeState(h.dir, s, len(s.Devices) > 0 || h.kept.durable); err != nil {
		return err
	}
	h.kept.durable = len(s.Devices) > 0
	return nil
}

// devices are the devices for the state file.
func (x *kept) devices(t *devices) []savedDevice {
	live := t.saved()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.frozen {
		live = slices.Clone(x.mu.last)
	}
	names := make(map[string]bool)
	for _, k := range live {
		names[k.Name] = true
	}
	for _, k := range x.mu.found {
		if !names[k.Name] {
			live = append(live, k)
		}
	}
	return live
}

// saved are the devices of which something is to be kept.
func (t *devices) saved() (list []savedDevice) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.mu.all {
		if k, ok := d.savedLocked(); ok {
			list = append(list, k)
		}
	}
	return list
}

// savedLocked is what is to be kept of d. The mu of its devices is held.
func (d *Device) savedLocked() (k savedDevice, ok bool) {
	keep := d.keep && d.permanent
	if !keep && d.ephemeral == "" || d.private || d.of.mu.named[d.key()] != d {
		return k, false // it has another device in its place, or clients have it to its end
	}
	if !d.isOpen() && d.ephemeral == "" { // or else it is as good as open
		if d.spec.saved == nil {
			return k, false
		}
		return *d.spec.saved, keep
	}
	k = savedDevice{Name: d.spec.Name, Image: d.spec.Image, Base: d.reference, By: byClient, Ephemeral: d.ephemeral, Default: d.of.mu.alone == d}
	if k.Base == "" {
		k.Base = d.whose().image.of.Reference()
	}
	switch {
	case keep:
		k.By = byAPI
	case d.permanent:
		k.By = byFlags
	}
	if d.client != "" {
		k.Image = d.spec.Name
	}
	if k.Ephemeral != "" {
		k.Boot, k.Writable = bootText(), true
	} else if d.overlay != nil {
		k.Overlay, k.Writable = d.dir, true
	}
	switch {
	case d.socket != nil:
		k.Socket = d.socket.path
	case d.spec.saved != nil:
		k.Socket = d.spec.saved.Socket // it is about to get it
	}
	return k, true
}

// freeze takes down what the next host is to have of the devices of one that stops: those
// that are kept, and the overlays of those that clients have open, who may connect again.
func (x *kept) freeze(t *devices) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.frozen {
		return
	}
	x.mu.frozen = true
	below := make(map[*Device]int) // how many devices of clients have it as their base
	for _, d := range t.mu.all {
		if d.isOpen() && d.base != nil {
			below[d.base]++
		}
	}
	for _, d := range t.mu.all {
		k, ok := d.savedLocked()
		if !ok {
			continue
		}
		users := d.users - below[d]
		if d.permanent {
			users--
		}
		if d.outlives = k.Ephemeral != "" && (users > 0 || !d.isOpen()); !d.outlives {
			if k.Ephemeral, k.Boot = "", ""; k.By != byAPI {
				continue
			}
		}
		x.mu.last = append(x.mu.last, k)
	}
}

// stopKept writes the state file for the last time.
func (h *Host) stopKept() {
	h.SetStopping()
	h.kept.mu.Lock()
	if h.kept.mu.timer != nil {
		h.kept.mu.timer.Stop()
	}
	h.kept.mu.Unlock()
	if err := h.saveState(); err != nil {
		h.log.Error("cannot write the state file: devices that were added will not be there after a restart", "err", err)
	}
}

// left is what the last host has left of the overlay that went with d, which claims it. It is
// nil if there is none, or if d is of another image.
func (h *Host) left(d *Device) *savedDevice {
	if d.private || !h.overlays.Ephemeral {
		return nil
	}
	image := d.spec.Image
	if d.client != "" {
		image = d.spec.Name
	}
	h.kept.mu.Lock()
	i := slices.IndexFunc(h.kept.mu.found, func(k savedDevice) bool { return k.Name == d.spec.Name && k.Ephemeral != "" })
	var k savedDevice
	if i >= 0 {
		k = h.kept.mu.found[i]
	}
	ours := i >= 0 && k.Image == image
	if ours {
		if h.kept.mu.claimed == nil {
			h.kept.mu.claimed = make(map[string]*Device)
		}
		h.kept.mu.claimed[k.Ephemeral] = d
	}
	h.kept.mu.Unlock()
	if !ours {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(h.dir, ephemeralDir, k.Ephemeral)); errors.Is(err, fs.ErrNotExist) {
		h.log.Warn("the changes of a device are forgotten: somebody has removed the directory of its overlay", "device", d.spec.Name, "overlay", k.Ephemeral)
		h.kept.disclaim(d)
		return nil
	}
	return &k
}

// openEphemeral opens an overlay that goes with d: the one that is left of it, or a new one.
// It is in the state file before anybody can write to it.
func (h *Host) openEphemeral(d *Device, left *savedDevice, below blockmap.Device, b *BlockImage) (*blockmap.Overlay, error) {
	parent := filepath.Join(h.dir, ephemeralDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("directory of overlays: %w", err)
	}
	name := rand.Text()
	if left != nil {
		name = left.Ephemeral
	}
	opts := blockmap.OverlayOptions{Limit: h.overlays.Limit, Volatile: true, Existing: left != nil}
	overlay, err := h.overlays.openWith(filepath.Join(parent, name), opts, below, b)
	if err == nil {
		d.setEphemeral(name, b.Reference())
		if err = h.saveState(); err != nil {
			d.setEphemeral("", "")
			err = errors.Join(fmt.Errorf("keep the overlay of %s: %w", d.spec.Name, err), overlay.Close())
		}
	}
	switch {
	case err != nil && left == nil:
		h.removeOverlay(name)
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("the changes of %s, which a server that was killed has left: %w", d.spec.Name, err)
	case left != nil:
		h.log.Info("went on with the changes that the last server has left", "device", d.spec.Name)
		h.kept.took(name)
	}
	h.supersede(d.spec.Name) // changes of another image
	return overlay, nil
}

// disclaim ends the claims of d, which is not opened with what the last host has left.
func (x *kept) disclaim(d *Device) {
	x.mu.Lock()
	defer x.mu.Unlock()
	maps.DeleteFunc(x.mu.claimed, func(_ string, by *Device) bool { return by == d })
}

// took takes an overlay from what the last host has left: a device is open with it.
func (x *kept) took(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.mu.claimed, name)
	x.mu.found = slices.DeleteFunc(x.mu.found, func(k savedDevice) bool { return k.Ephemeral == name })
}

func (d *Device) setEphemeral(name, reference string) {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	d.ephemeral, d.reference = name, reference
}

// endEphemeral removes the overlay of d, which is closed, if it goes with d.
func (h *Host) endEphemeral(d *Device) {
	d.of.mu.Lock()
	name := d.ephemeral
	if d.outlives {
		name = ""
	}
	d.ephemeral = ""
	stopping := d.of.mu.stopping
	d.of.mu.Unlock()
	if name == "" {
		return
	}
	if !stopping { // or else it is not in the file any more
		if err := h.saveState(); err != nil {
			h.log.Warn("cannot write the state file", "err", err)
		}
	}
	h.removeOverlay(name)
}

// awaitClients gives clients that had devices of their own the time to connect again that
// such a device waits for them. To a host without ephemeral devices they cannot connect.
func (h *Host) awaitClients() {
	h.kept.mu.Lock()
	defer h.kept.mu.Unlock()
	ofClient := func(k savedDevice) bool { return k.By == byClient }
	if h.overlays.Ephemeral && !h.kept.mu.frozen && h.kept.mu.timer == nil && slices.ContainsFunc(h.kept.mu.found, ofClient) {
		h.kept.mu.timer = time.AfterFunc(ephemeralLinger, h.forgetClients)
	}
}

// forgetClients forgets the changes of clients that have not connected again. Those whose
// devices are being opened have, and get the time once more if that fails.
func (h *Host) forgetClients() {
	n := h.drop(func(k *savedDevice) bool { return k.By == byClient }, false)
	h.kept.mu.Lock()
	h.kept.mu.timer = nil
	h.kept.mu.Unlock()
	h.awaitClients()
	if n == 0 {
		return
	}
	h.log.Info("forgot the changes of clients that have not connected again", "overlays", n)
	if err := h.saveState(); err != nil {
		h.log.Warn("cannot write the state file", "err", err)
	}
}
