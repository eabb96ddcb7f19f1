package host

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
	"thaw/nbd/attach"
)

// needRoot skips a test where nodes cannot be made.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("nodes require root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip(err)
	}
}

// attachTo makes a node until the test ends.
func attachTo(t testing.TB, h *Host, spec NodeSpec) NodeInfo {
	t.Helper()
	if spec.Driver == attach.Auto {
		spec.Driver = attach.FUSE
	}
	n, err := h.Attach(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), atMost)
		defer cancel()
		if _, err := h.Detach(ctx, n.ID, false); err != nil && !errors.Is(err, ErrNoNode) {
			t.Errorf("detach %s: %v", n.Node, err)
		}
	})
	return n
}

// readNode compares a part of a node with what it is to be.
func readNode(t testing.TB, path string, want []byte, e blockmap.Extent) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, e.Len())
	if _, err := f.ReadAt(got, e.Start); err != nil || string(got) != string(want[e.Start:e.End]) {
		t.Errorf("%s: bytes %v are wrong: %v", path, e, err)
	}
}

// A node holds its device as a client does, and the device closes with it.
func TestNode(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 600)
	image := r.push("team/app:v1", m)
	h := r.open(Options{})
	n := attachTo(t, h, NodeSpec{Image: image})
	readNode(t, n.Node, m.Content, blockmap.Range(0, 1<<20))
	if in := h.Devices()[0].Info(); in.Users != 1 || in.ID != n.Device || in.Permanent {
		t.Errorf("%+v", in)
	}
	if n.State != NodeAttached || n.Writable || n.Overlay != nil || n.Name != image || !strings.Contains(n.Image, "@sha256:") || n.Size != int64(len(m.Content)) || n.Requests == nil {
		t.Errorf("%+v", n)
	}
	// A client and a second node share the device.
	if _, release, err := h.Acquire(t.Context(), image, nil); err != nil {
		t.Error(err)
	} else {
		release()
	}
	two := attachTo(t, h, NodeSpec{Image: image})
	if two.Device != n.Device {
		t.Errorf("devices %s and %s", n.Device, two.Device)
	}
	for _, x := range []NodeInfo{n, two} {
		if gone, err := h.Detach(t.Context(), x.ID, false); err != nil || !gone {
			t.Errorf("%v, %v", gone, err)
		}
		if _, err := h.Node(x.ID); !errors.Is(err, ErrNoNode) {
			t.Errorf("a node that is detached: %v", err)
		}
	}
	await(t, "the device is closed", func() bool { return len(h.Devices()) == 0 })
	if h.Used() {
		t.Error("a host without nodes and devices is used")
	}
	if _, err := os.Stat(filepath.Join(h.dir, stateName)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state file: %v", err)
	}
}

// Overlays of nodes are out of reach for clients, are one node's, and leave those of the host
// alone.
func TestNodeOverlays(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 600)
	image := r.push("team/app:v1", m)
	served, dir := filepath.Join(t.TempDir(), "served"), filepath.Join(t.TempDir(), "own")
	h := r.open(Options{Overlay: OverlayOptions{Dir: served}})
	if _, err := h.Add(t.Context(), Spec{Name: image}); err != nil {
		t.Fatal(err)
	}
	n := attachTo(t, h, NodeSpec{Image: image, Overlay: dir})
	f, err := os.OpenFile(n.Node, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	changed := []byte(strings.Repeat("changed ", 512))
	if _, err := f.WriteAt(changed, 4096); err != nil {
		t.Error(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Error(err)
	}
	if in, err := h.Node(n.ID); err != nil || in.Overlay == nil || in.Overlay.Data != 4096 || in.Overlay.Directory != dir {
		t.Errorf("%+v, %v", in, err)
	}
	// The host's own overlay has not changed, and neither has a read-only node.
	d, release, err := h.Acquire(t.Context(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if st := d.Overlay().Stats(); st.Data != 0 {
		t.Errorf("%+v", st)
	}
	release()
	plain := attachTo(t, h, NodeSpec{Image: image})
	readNode(t, plain.Node, m.Content, blockmap.Range(0, 64<<10))

	for what, spec := range map[string]NodeSpec{
		"in use by " + n.Node:                            {Image: image, Overlay: dir},
		"clients of this server can open it as " + image: {Image: image, Overlay: served},
	} {
		var c ConflictError
		if _, err := h.Attach(t.Context(), spec); !errors.As(err, &c) || !strings.Contains(err.Error(), what) {
			t.Errorf("%v instead of %q", err, what)
		}
	}
	// By no name do clients reach it.
	x := NewExports(h, Allow{"**"}, nil, false)
	for _, d := range h.Devices() {
		if !d.private {
			continue
		}
		reached, release, err := h.Acquire(t.Context(), d.Name(), nil)
		if err != nil {
			continue
		}
		if release(); reached.private {
			t.Errorf("a client opens %s", d.Name())
		}
	}
	list, err := x.List(t.Context(), nbd.ClientInfo{})
	if err != nil || len(list) != 1 {
		t.Errorf("%d exports, %v", len(list), err)
	}
	// Detached, the overlay is unlocked at once.
	if _, err := h.Detach(t.Context(), n.ID, false); err != nil {
		t.Fatal(err)
	}
	if in, err := blockmap.ReadOverlay(blockmap.OS, dir); err != nil || in.InUse || in.Data != 4096 {
		t.Errorf("%+v, %v", in, err)
	}
}

// A limit bounds what is written to a node.
func TestNodeLimit(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	h := r.open(Options{})
	n := attachTo(t, h, NodeSpec{Image: image, Ephemeral: true, Limit: 8 << 10})
	f, err := os.OpenFile(n.Node, os.O_RDWR|unix.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 8<<10), 0); err != nil {
		t.Error(err)
	}
	if _, err := f.WriteAt([]byte(strings.Repeat("x", 64<<10)), 1<<20); err == nil {
		t.Error("more than the limit can be written")
	}
}

// Stop detaches nodes that nobody uses, waits for others, and says which it cannot end.
func TestStopNodes(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	h := r.open(Options{})
	free := attachTo(t, h, NodeSpec{Image: image})
	used := attachTo(t, h, NodeSpec{Image: image, Mount: "/mnt/app"})
	fd, err := unix.Open(used.Node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- h.StopNodes(t.Context()) }()
	await(t, "the node that nobody uses is gone", func() bool { _, err := h.Node(free.ID); return err != nil })
	if _, err := h.Attach(t.Context(), NodeSpec{Image: image, Driver: attach.FUSE}); !errors.Is(err, ErrClosed) {
		t.Errorf("attach meanwhile: %v", err)
	}
	select {
	case err := <-stopped:
		t.Errorf("it does not wait: %v", err)
	default:
	}
	unix.Close(fd)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := h.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// Requests that make no sense are refused before anything happens.
func TestNodeSpecs(t *testing.T) {
	r := newRegistry(t)
	h := r.open(Options{})
	long := "/" + strings.Repeat("a", maxPath)
	for what, spec := range map[string]NodeSpec{
		"no image": {}, "a relative overlay": {Image: "a", Overlay: "x"}, "an unclean overlay": {Image: "a", Overlay: "/x/../y"}, "a slash": {Image: "a", Overlay: "/x/"},
		"a zero": {Image: "a", Overlay: "/x\x00y"}, "a long path": {Image: "a", Mount: long}, "a relative mount": {Image: "a", Mount: "."},
		"two overlays": {Image: "a", Overlay: "/x", Ephemeral: true}, "a negative limit": {Image: "a", Ephemeral: true, Limit: -1}, "a limit of nothing": {Image: "a", Limit: 1},
		"queues": {Image: "a", Queues: 65}, "fewer queues": {Image: "a", Queues: -1}, "a driver": {Image: "a", Driver: "floppy"}, "no name": {Image: "not a name"},
	} {
		var invalid InvalidError
		if _, err := h.Attach(t.Context(), spec); !errors.As(err, &invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	await(t, "nothing is left", func() bool { return !h.Used() })
	if e, err := os.ReadDir(filepath.Join(h.dir, ephemeralDir)); err == nil && len(e) > 0 {
		t.Errorf("left: %v", e)
	}
}

// The nodes of an earlier boot are gone, and so are their ephemeral overlays. A state file
// that cannot be read is kept for a person to look at, and so are the overlays then.
func TestRecoverNothing(t *testing.T) {
	r := newRegistry(t)
	dir, err := os.MkdirTemp("", "thaw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// Their images cannot be had, and nobody asks for them.
	for _, text := range []string{strings.ReplaceAll(sampleState(), "registry.example/app@"+testDigest, "127.0.0.1:1/app@"+testDigest), "damaged"} {
		if err := os.WriteFile(filepath.Join(dir, stateName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "UNUSEDUNUSEDUNUSED"} {
			if err := os.MkdirAll(filepath.Join(dir, ephemeralDir, name), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		h := r.open(Options{Dir: dir})
		h.Recover()
		if text == "damaged" {
			if got, err := os.ReadFile(filepath.Join(dir, stateName+".damaged")); err != nil || string(got) != text {
				t.Errorf("%s, %v", got, err)
			}
		}
		await(t, "the nodes are gone", func() bool { return len(h.Nodes()) == 0 })
		left := 0
		if text == "damaged" { // it may have named them
			left = 2
		}
		if e, err := os.ReadDir(filepath.Join(dir, ephemeralDir)); err != nil || len(e) != left {
			t.Errorf("%.10s: ephemeral overlays: %v, %v", text, e, err)
		}
		h.Close()
	}
}

// A node whose image cannot be had can be detached all the same, at once: nobody waits for
// the image any more.
func TestDetachWhileRecovering(t *testing.T) {
	needRoot(t)
	// A loop device that is not marked with the token of the state: there is nothing to remove.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", "--read-only", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	path := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", path).Run(); err != nil {
			t.Error(err)
		}
	})
	number, err := strconv.ParseUint(strings.TrimPrefix(path, "/dev/loop"), 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	state := attach.State{
		Driver: attach.FUSE, Path: path, Number: uint32(number), PID: os.Getpid(), Started: 1, Boot: bootText(), Token: "of-no-node-at-all",
		Size: 1 << 20, ReadOnly: true,
	}
	r := newRegistry(t)
	dir := t.TempDir()
	if err := writeState(dir, saved{Nodes: []savedNode{{Image: "127.0.0.1:1/app@" + testDigest, Name: "127.0.0.1:1/app:v1", Node: state.Encode()}}}, false); err != nil {
		t.Fatal(err)
	}
	h := r.open(Options{Dir: dir})
	h.Recover()
	await(t, "the image cannot be had", func() bool {
		all := h.Nodes()
		return len(all) == 1 && all[0].State == NodeRecovering && all[0].Error != ""
	})
	// The recovery gives the node another token, which the next server is to know if this one is
	// killed meanwhile.
	if kept, _, err := readState(dir); err != nil || len(kept.Nodes) != 1 || len(kept.Attaching) != 1 || kept.Attaching[0] == state.Token {
		t.Errorf("while it is recovering: %+v, %v", kept, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	defer cancel()
	if gone, err := h.Detach(ctx, h.Nodes()[0].ID, true); err != nil || !gone {
		t.Errorf("gone: %v, %v", gone, err)
	}
	if all := h.Nodes(); len(all) > 0 {
		t.Errorf("left: %+v", all)
	}
}

// A node that a killed server was attaching, and of which nobody knows, is removed by the next
// one; and the state file has the token of a node as long as it is being attached.
func TestAttachingIsSwept(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	dir := t.TempDir()
	tokens := []string{attach.NewToken(), attach.NewToken()} // the other was kept, and no node was made
	a, err := attach.Attach(t.Context(), blocktest.NewMemory(1<<20), attach.Options{Driver: attach.FUSE, Token: tokens[0]})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Detach(context.Background()) })
	if err := writeState(dir, saved{Attaching: tokens}, false); err != nil {
		t.Fatal(err)
	}
	h := r.open(Options{Dir: dir})
	h.Recover()
	await(t, "the node is gone", gone(a))
	await(t, "the tokens are gone", func() bool {
		_, err := os.Stat(filepath.Join(dir, stateName))
		return errors.Is(err, fs.ErrNotExist)
	})
	// While a node is being attached, as here, the file has its token. Afterwards it has the node.
	n, err := h.nodes.reserve(NodeSpec{Image: image, Driver: attach.FUSE})
	if err != nil {
		t.Fatal(err)
	}
	h.nodes.save()
	if during, _, err := readState(dir); err != nil || len(during.Nodes) != 0 || !slices.Equal(during.Attaching, []string{n.token}) {
		t.Errorf("while it is being attached: %+v, %v", during, err)
	}
	h.nodes.drop(n)
	info, err := h.Attach(t.Context(), NodeSpec{Image: image, Driver: attach.FUSE})
	if err != nil {
		t.Fatal(err)
	}
	after, _, err := readState(dir)
	if err != nil || len(after.Attaching) != 0 || len(after.Nodes) != 1 || after.Nodes[0].state.Path != info.Node || !attach.ValidToken(after.Nodes[0].state.Token) {
		t.Errorf("once it is attached: %+v, %v", after, err)
	}
}

// What cannot be removed of a node that is gone is left to the next server, which finds it by
// its token.
func TestGoneIsSweptLater(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	dir := t.TempDir()
	token := attach.NewToken()
	a, err := attach.Attach(t.Context(), blocktest.NewMemory(1<<20), attach.Options{Driver: attach.FUSE, Token: token, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Detach(context.Background()) })
	fd, err := unix.Open(a.Path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0) // as a mount has it
	if err != nil {
		t.Fatal(err)
	}
	state := a.State()
	state.Number, state.Path = 1<<20, "/dev/loop1048576" // there is no such node
	if err := writeState(dir, saved{Nodes: []savedNode{{Image: "127.0.0.1:1/app@" + testDigest, Name: "127.0.0.1:1/app:v1", Node: state.Encode()}}}, false); err != nil {
		t.Fatal(err)
	}
	h := r.open(Options{Dir: dir})
	h.Recover()
	await(t, "the node is gone", func() bool { return len(h.Nodes()) == 0 })
	h.Close()
	if kept, _, err := readState(dir); err != nil || len(kept.Nodes) != 0 || !slices.Equal(kept.Attaching, []string{token}) {
		t.Errorf("while it is in use: %+v, %v", kept, err)
	}
	unix.Close(fd)
	h = r.open(Options{Dir: dir})
	h.Recover()
	await(t, "nothing is left", func() bool {
		_, err := os.Stat(filepath.Join(dir, stateName))
		return errors.Is(err, fs.ErrNotExist)
	})
	await(t, "the node is gone", gone(a))
}

// While an attach goes on, the state file has the token of its node.
func TestTokenIsKept(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	dir := t.TempDir()
	h := r.open(Options{Dir: dir})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := make(chan string, 1)
	go func() { // each time the file is replaced, what it says is true of that moment
		defer close(seen)
		for ctx.Err() == nil {
			kept, _, err := readState(dir)
			if err == nil && len(kept.Attaching) == 1 {
				seen <- kept.Attaching[0]
				return
			}
		}
	}()
	for range 50 {
		info, err := h.Attach(ctx, NodeSpec{Image: image, Driver: attach.FUSE})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.Detach(ctx, info.ID, false); err != nil {
			t.Fatal(err)
		}
		if len(seen) > 0 {
			return
		}
	}
	t.Error("in 50 attaches, the file never had a token")
}

// gone says whether a node has gone.
func gone(n *attach.Node) func() bool {
	return func() bool {
		select {
		case <-n.Gone():
			return true
		default:
			return false
		}
	}
}

// onMessage calls do when a line with this message is logged.
type onMessage struct {
	slog.Handler
	message string
	do      func()
}

func (o onMessage) Handle(_ context.Context, r slog.Record) error {
	if r.Message == o.message {
		o.do()
	}
	return nil
}

func (o onMessage) Enabled(context.Context, slog.Level) bool { return true }

// A client that leaves when its node is just ready leaves no node behind.
func TestAttachWithoutClient(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 600))
	h := r.open(Options{})
	ctx, cancel := context.WithCancel(t.Context())
	h.log = slog.New(onMessage{slog.DiscardHandler, "attached", cancel})
	if n, err := h.Attach(ctx, NodeSpec{Image: image, Driver: attach.FUSE}); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", n, err)
	}
	await(t, "no node is left", func() bool { return len(h.Nodes()) == 0 })
}
