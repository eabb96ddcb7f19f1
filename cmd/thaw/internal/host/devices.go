package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// Spec says what a device is made of. Where clients can have overlays of their own, Image may
// be IMAGE~CLIENT: the device is that client's, and stays open without it.
type Spec struct {
	Name   string // of the device; unique on its host
	Image  string // the reference of its image; Name if empty
	Socket string // the name of its socket without the suffix, if it has one; made of the device's name if empty
	Keep   bool   // the next host in the cache directory adds it again, until it is removed

	saved *savedDevice // what the last host in the cache directory has left of it; nil: nothing
}

// Device is a device of a Host, from the first request for it on. Its methods may be
// called at any time, also after the device has been closed.
type Device struct {
	of     *devices
	id     string
	spec   Spec
	ready  chan struct{} // closed when the opening has ended
	closed chan struct{} // closed when nothing of the device is left
	cancel context.CancelFunc

	// The device of a client is an overlay over the image of another device, which is
	// spec.Image. mayOpenBase says that the client may open that device if nobody has.
	client      string
	mayOpenBase bool
	after       []*Device // that still have the client's overlay, and are closing

	// private says that clients cannot reach the device: it is for nodes. own is its overlay;
	// without one it is an image, whatever the host does with images.
	private bool
	own     *ownOverlay

	// Set before ready is closed: either err, or some of the others.
	err       error
	image     *openImage
	start     *start
	below     blockmap.Device // the image, or a recorder of its reads
	base      *Device         // that has the image of a client's device
	leaveBase func()
	overlay   *blockmap.Overlay // nil: read-only
	dir       string            // of overlay; "": ephemeral

	completion *completion
	committing committing
	asking     sync.WaitGroup // look-ups in the background

	// Guarded by of.mu.
	users     int // number of users, and one more while it is permanent
	permanent bool
	lingering *time.Timer   // closes the device, which has no users
	socket    *socket       // for virtual machines; nil: none
	keep      bool          // it is in the state file as long as it is permanent
	ephemeral string        // the name of the directory of its overlay, which goes with it
	reference string        // of the block image below that, by digest
	outlives  bool          // so does the overlay of a device that clients had open when the host stopped
	trouble   error         // why it is not open yet
	troubles  chan struct{} // closed when there is one; nil: of no device that is tried again
}

// ephemeralLinger is how long the ephemeral overlay of a client waits for the client to
// connect again.
const ephemeralLinger = time.Minute

// ID names the device on its host for as long as the host runs. It is never given to
// another device, and is safe in a URL.
func (d *Device) ID() string { return d.id }

// Name is the name by which clients open the device.
func (d *Device) Name() string { return d.spec.Name }

// Block is the content of the device, which a transport serves. It is nil until the
// device is ready. A reader must have acquired the device, or know that it is not
// removed meanwhile.
func (d *Device) Block() blockmap.Device {
	select {
	case <-d.ready:
	default:
		return nil
	}
	if d.overlay != nil {
		return d.overlay
	}
	return d.below
}

// deviceKey tells the devices apart that can be acquired.
type deviceKey struct {
	name    string
	private bool
}

func (d *Device) key() deviceKey { return deviceKey{d.spec.Name, d.private} }

// State is the state of a device.
type State string

// The states of a device, in their order.
const (
	Opening State = "opening" // thaw looks up its image and fetches its index
	Ready   State = "ready"
	Failed  State = "failed"  // opening it failed; those who wait for it get the error
	Closing State = "closing" // it cannot be opened any more
)

// DeviceInfo describes a device. Its JSON is what the control API answers.
type DeviceInfo struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Image     string `json:"image"`            // the requested reference; once the device is ready, the block image by digest
	Digest    string `json:"digest,omitempty"` // of the block image
	State     State  `json:"state"`
	Error     string `json:"error,omitempty"`  // why opening it failed, or why it is still being opened
	Socket    string `json:"socket,omitempty"` // for virtual machines: the path of its vhost-user socket
	Permanent bool   `json:"permanent"`        // stays open without users
	Users     int    `json:"users"`            // number of users that have it open
	Size      int64  `json:"bytes"`            // of the device
	Stored    int64  `json:"stored_bytes"`     // of the image in the registry
	Content   int64  `json:"content_bytes"`    // of the image's streams, uncompressed
	Resident  int64  `json:"resident_bytes"`   // the part of the content that is in the cache

	Overlay    *OverlayInfo    `json:"overlay,omitempty"` // nil if the device is read-only
	Commit     *CommitInfo     `json:"commit,omitempty"`  // that is running
	Prefetch   *PrefetchInfo   `json:"prefetch,omitempty"`
	Recording  *RecordingInfo  `json:"recording,omitempty"`
	Completion *CompletionInfo `json:"completion,omitempty"`
}

// Info describes the current state of the device.
func (d *Device) Info() DeviceInfo {
	d.of.mu.Lock()
	in := DeviceInfo{
		ID: d.id, Name: d.spec.Name, Image: d.spec.Image, State: Ready, Permanent: d.permanent, Users: d.users,
	}
	if d.permanent {
		in.Users--
	}
	if d.socket != nil {
		in.Socket = d.socket.path
	}
	if d.of.mu.named[d.key()] != d {
		in.State = Closing
	}
	trouble := d.trouble
	d.of.mu.Unlock()
	select {
	case <-d.ready:
	default:
		in.State = Opening
		if trouble != nil {
			in.Error = trouble.Error()
		}
		return in
	}
	if d.err != nil {
		in.State, in.Error = Failed, d.err.Error()
		return in
	}
	image := d.whose().image
	in.Image, in.Digest, in.Size = image.of.Reference(), image.of.Digest.String(), image.Size()
	for i := range image.of.Index.Streams {
		t := &image.of.Index.Streams[i]
		in.Stored += t.BlobSize
		in.Content += int64(t.Blocks()) * blockmap.BlockSize
	}
	in.Resident, in.Overlay, in.Commit = image.Resident(), d.overlayInfo(), d.committing.info()
	if d.base == nil {
		in.Prefetch, in.Recording, in.Completion = d.start.prefetchInfo(), d.start.recordingInfo(), d.completion.info()
	}
	return in
}

// whose is the device that has the image of d, which is open: d, or the base of a client's
// device.
func (d *Device) whose() *Device {
	if d.base != nil {
		return d.base
	}
	return d
}

// AwaitPrefetch returns when this share (0 to 1) of the known reads of startup has been
// prefetched, when the prefetch will bring no more of it, or when ctx ends. If no trace
// is found in time, it returns at once: the device is usable without one.
func (d *Device) AwaitPrefetch(ctx context.Context, share float64) {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return
	}
	if d.err == nil {
		d.whose().start.await(ctx, share)
	}
}

// Errors of a Host that callers tell apart.
var (
	ErrNoDevice = errors.New("no such device")
	ErrClosed   = errors.New("the host is stopping")
)

// devices are the devices of a host. A device is opened once, even if several clients
// ask for it at once, and is closed when its last user has left. A device that was
// added has one user more, which leaves when the device is removed.
type devices struct {
	open    func(ctx context.Context, d *Device) error
	close   func(d *Device) // closes an open device
	clients bool            // NAME~CLIENT is a device of that client's
	linger  time.Duration   // how long such a device stays open without users
	log     *slog.Logger
	lines   *rate.Limiter // limits the log lines that clients can cause

	ctx    context.Context // ends all openings
	cancel context.CancelFunc

	mu struct {
		sync.Mutex
		named    map[deviceKey]*Device // devices that can be acquired
		all      []*Device             // also devices that are closing, in the order of the requests for them
		alone    *Device               // the last device that was added while there was no permanent one
		last     int                   // the last ID
		stopping bool                  // set: no device can be opened any more
		stopped  bool                  // set: no device is closed any more
	}
}

// openTimeout bounds the opening of a device that clients wait for.
const openTimeout = time.Minute

func newDevices(log *slog.Logger, open func(context.Context, *Device) error, close func(*Device)) *devices {
	t := &devices{open: open, close: close, log: log, lines: rate.NewLimiter(1, 20)}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.mu.named = make(map[deviceKey]*Device)
	return t
}

// add opens devices that stay until they are removed. If one fails, it adds none.
func (t *devices) add(ctx context.Context, specs []Spec) ([]*Device, error) {
	added, err := t.reserve(specs)
	if err == nil {
		g, gctx := errgroup.WithContext(ctx)
		for _, d := range added {
			g.Go(func() error {
				select {
				case <-d.ready:
					return d.err
				case <-gctx.Done():
					return context.Cause(gctx)
				}
			})
		}
		if err = g.Wait(); err == nil {
			err = ctx.Err()
		}
	}
	if err != nil {
		for _, d := range added {
			t.remove(d)
		}
		return nil, err
	}
	return added, nil
}

// reserve makes devices permanent, and begins to open those that are not open.
func (t *devices) reserve(specs []Spec) (added []*Device, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.stopping {
		return nil, ErrClosed
	}
	first := !t.anyPermanent()
	for _, spec := range specs {
		d, err := t.reserveOne(spec)
		if err != nil {
			return added, err
		}
		d.permanent = true
		t.use(d)
		added = append(added, d)
	}
	if d := onlyImage(added); first && d != nil {
		t.mu.alone = d
	}
	return added, nil
}

// onlyImage returns the only device, or the only one that is no client's, if there is one.
func onlyImage(devices []*Device) (only *Device) {
	if len(devices) == 1 {
		return devices[0]
	}
	for _, d := range devices {
		switch {
		case d.client != "":
		case only != nil:
			return nil
		default:
			only = d
		}
	}
	return only
}

// reserveOne returns the device of spec, which it begins to open if it is not open. t.mu is
// held.
func (t *devices) reserveOne(spec Spec) (*Device, error) {
	spec.Image = cmp.Or(spec.Image, spec.Name)
	image, client := SplitClient(spec.Image)
	mine := t.clients && client != ""
	d := t.mu.named[deviceKey{name: spec.Name}]
	switch {
	case mine && spec.Name != spec.Image:
		return nil, InvalidError{fmt.Errorf("a device %s of the client %s: it has to be called %s, the name by which the client opens it", spec.Name, client, spec.Image)}
	case d != nil && (d.permanent || !mine && (d.spec.Image != spec.Image || d.client != "")):
		return nil, InvalidError{conflict("there is a device %s already: give each image once, or each device a name of its own", spec.Name)}
	case d != nil:
		return d, nil
	case mine:
		return t.beginClient(&Device{spec: Spec{Image: image, saved: spec.saved}, client: client, mayOpenBase: true}, 0)
	}
	return t.begin(&Device{spec: spec}, 0), nil
}

// remove undoes add. It reports whether d was permanent.
func (t *devices) remove(d *Device) bool {
	t.mu.Lock()
	was := d.permanent
	d.permanent = false
	if was && t.mu.named[d.key()] == d {
		delete(t.mu.named, d.key())
	}
	s := d.socket
	d.socket = nil
	t.mu.Unlock()
	s.close()
	if was {
		t.release(d)
	}
	return was
}

// acquire makes the caller a user of the device of that name, and waits until it is
// open. If there is no such device and mayOpen allows it, acquire opens the device. The
// caller calls release once.
func (t *devices) acquire(ctx context.Context, name string, mayOpen func(string) bool) (d *Device, release func(), err error) {
	if d, err = t.join(name, mayOpen); err != nil {
		return nil, nil, err
	}
	if err := d.troubled(); err != nil {
		t.release(d)
		return nil, nil, err
	}
	return t.await(ctx, d)
}

// troubled says why d is not open yet, and may not be for long.
func (d *Device) troubled() error {
	d.of.mu.Lock()
	defer d.of.mu.Unlock()
	if d.trouble == nil || d.isOpen() {
		return nil
	}
	return fmt.Errorf("device %s is not open yet: %w", d.spec.Name, d.trouble)
}

// await waits until d is open for a caller that is a user of it already.
func (t *devices) await(ctx context.Context, d *Device) (_ *Device, release func(), err error) {
	select {
	case <-d.ready:
		err = d.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		t.release(d)
		return nil, nil, err
	}
	return d, func() { t.release(d) }, nil
}

func (t *devices) join(name string, mayOpen func(string) bool) (*Device, error) {
	t.mu.Lock()
	d := t.find(name)
	forgotten := d != nil && t.forgets(d)
	if d != nil && !forgotten {
		t.use(d)
	}
	t.mu.Unlock()
	switch {
	case forgotten:
		return nil, ErrClosed
	case d != nil:
		return d, nil
	}
	image, client := name, ""
	if t.clients {
		var err error
		if image, client, _, err = splitClient(name); err != nil {
			return nil, err
		}
	}
	may := mayOpen != nil && mayOpen(image) // not under the lock, because mayOpen may read directories
	t.mu.Lock()
	defer t.mu.Unlock()
	if client != "" {
		return t.joinClient(image, client, may)
	}
	if d = t.find(name); d == nil {
		if !may {
			return nil, ErrNoDevice
		}
		if t.mu.stopping {
			return nil, ErrClosed
		}
		d = t.begin(&Device{spec: Spec{Name: name, Image: name}}, openTimeout)
	}
	t.use(d)
	return d, nil
}

// joinClient makes the caller a user of the device that a client has over the device image.
// t.mu is held.
func (t *devices) joinClient(image, client string, may bool) (*Device, error) {
	base := t.find(image)
	switch {
	case base == nil && !may, base != nil && base.client != "":
		return nil, ErrNoDevice
	case base != nil:
		image = base.spec.Name // "" and the name of the default device lead to one device
	}
	name := image + clientMark + client
	d := t.mu.named[deviceKey{name: name}]
	if d == nil {
		var err error
		if d, err = t.beginClient(&Device{spec: Spec{Image: image}, client: client, mayOpenBase: may}, openTimeout); err != nil {
			return nil, err
		}
	}
	if t.forgets(d) {
		return nil, ErrClosed
	}
	t.use(d)
	return d, nil
}

// beginClient begins to open d, the device that a client has over the device d.spec.Image.
// t.mu is held.
func (t *devices) beginClient(d *Device, timeout time.Duration) (*Device, error) {
	if t.mu.stopping {
		return nil, ErrClosed
	}
	n := 0
	for _, x := range t.mu.all {
		if x.client != "" {
			n++
		}
	}
	if n >= maxClients {
		return nil, conflict("%d clients have devices of their own open, the most that a server takes", n)
	}
	d.spec.Name = d.spec.Image + clientMark + d.client
	for _, x := range t.mu.all {
		if x.client == d.client && t.mu.named[x.key()] != x {
			d.after = append(d.after, x)
		}
	}
	return t.begin(d, timeout), nil
}

// forgets reports whether the changes of d go with it, since the host stops and nobody had d
// open: whoever opened it now would find it without them in the next host. t.mu is held.
func (t *devices) forgets(d *Device) bool {
	return t.mu.stopping && d.ephemeral != "" && !d.outlives
}

// use adds a user to d. t.mu is held.
func (t *devices) use(d *Device) {
	d.users++
	if d.lingering != nil {
		d.lingering.Stop()
		d.lingering = nil
	}
}

// byName is find for a caller that does not hold t.mu.
func (t *devices) byName(name string) *Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.find(name)
}

// find returns the device of that name. "" is the device that was added while there was
// no other, so that devices added later do not take it from its clients. If there is no
// such device, "" is the only permanent device. t.mu is held.
func (t *devices) find(name string) (d *Device) {
	if name != "" {
		return t.mu.named[deviceKey{name: name}]
	}
	if d := t.mu.alone; d != nil && d.permanent {
		return d
	}
	for _, x := range t.mu.named {
		if x.permanent && x.client == "" {
			if d != nil {
				return nil
			}
			d = x
		}
	}
	return d
}

// anyPermanent reports whether a device was added. t.mu is held.
func (t *devices) anyPermanent() bool {
	for _, d := range t.mu.named {
		if d.permanent {
			return true
		}
	}
	return false
}

// begin begins to open a device, with a timeout if there is one. The opening continues
// when the first caller leaves, and ends when the last caller that waits for it leaves.
// t.mu is held.
func (t *devices) begin(d *Device, timeout time.Duration) *Device {
	if d.spec.saved != nil {
		d.troubles = make(chan struct{})
	}
	t.mu.last++
	d.of, d.id, d.ready, d.closed = t, strconv.Itoa(t.mu.last), make(chan struct{}), make(chan struct{})
	t.mu.named[d.key()] = d
	t.mu.all = append(t.mu.all, d)
	var ctx context.Context
	if timeout > 0 {
		ctx, d.cancel = context.WithTimeout(t.ctx, timeout)
	} else {
		ctx, d.cancel = context.WithCancel(t.ctx)
	}
	go t.make(ctx, d)
	return d
}

// make opens d for the callers that wait for it.
func (t *devices) make(ctx context.Context, d *Device) {
	defer d.cancel()
	err := t.open(ctx, d)
	t.mu.Lock()
	d.err = err
	close(d.ready)
	forClient, abandoned := !d.permanent, d.users == 0
	t.mu.Unlock()
	if err != nil && forClient && ctx.Err() == nil && t.lines.Allow() {
		t.log.Warn("cannot open an image for a client", "image", d.spec.Image, "err", err)
	}
	if abandoned {
		t.end(d)
	}
}

func (t *devices) release(d *Device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d.users--; d.users > 0 {
		return
	}
	if d.client != "" && t.linger > 0 && !t.mu.stopping && t.mu.named[d.key()] == d && d.isOpen() {
		var timer *time.Timer
		timer = time.AfterFunc(t.linger, func() {
			t.mu.Lock()
			defer t.mu.Unlock()
			if d.lingering == timer {
				t.leave(d)
			}
		})
		d.lingering = timer
		return
	}
	t.leave(d)
}

// isOpen reports whether the opening of d has succeeded.
func (d *Device) isOpen() bool {
	select {
	case <-d.ready:
		return d.err == nil
	default:
		return false
	}
}

// leave closes d, which has no users. t.mu is held.
func (t *devices) leave(d *Device) {
	d.lingering = nil
	if t.mu.named[d.key()] == d {
		delete(t.mu.named, d.key())
	}
	if t.mu.stopped {
		return
	}
	select {
	case <-d.ready:
		go t.end(d) // which may push a recording
	default:
		d.cancel() // and then make ends it
	}
}

// end closes d, which has no users and cannot get any.
func (t *devices) end(d *Device) {
	if d.err == nil {
		t.close(d)
	}
	t.mu.Lock()
	t.mu.all = slices.DeleteFunc(t.mu.all, func(x *Device) bool { return x == d })
	t.mu.Unlock()
	close(d.closed)
}

// stop ends all openings, removes the devices that were added, and waits until all
// devices without users are closed. Devices that still have users stay open.
func (t *devices) stop() {
	t.mu.Lock()
	t.mu.stopping = true
	t.cancel()
	for _, d := range t.mu.all {
		if d.lingering != nil {
			d.lingering.Stop()
			t.leave(d)
		}
	}
	t.mu.Unlock()
	for _, d := range t.list() {
		t.remove(d)
	}
	for wait := t.ending(); wait != nil; wait = t.ending() {
		<-wait
	}
}

// ending returns a channel that closes when one more device has been opened or closed.
// It returns nil if no device is being opened or closed.
func (t *devices) ending() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.mu.all {
		select {
		case <-d.ready:
			if d.users == 0 || d.err != nil { // the callers that waited for a failed device leave by themselves
				return d.closed
			}
		default:
			return d.ready
		}
	}
	t.mu.stopped = true
	return nil
}

func (t *devices) list() []*Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.mu.all)
}
