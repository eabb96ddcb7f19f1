package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// fuseNode is a file system of one file, and the loop device on it.
//
// The file system is mounted nowhere. Its mount has a descriptor until the file is open,
// and afterwards lives as long as the file is: as long as the loop device. When this
// process dies, nothing of it is left to be unmounted.
type fuseNode struct {
	n      *Node
	server *fuse.Server
	ended  chan struct{} // the kernel has let go of the file system
}

const (
	// fuseRequest is the largest request. The kernel cuts larger ones in pieces, and
	// caps it at fs.fuse.max_pages_limit.
	fuseRequest = 1 << 20
	// fuseBackground is how many requests the kernel has in flight. All those of direct
	// I/O count, and a loop device has at most 128.
	fuseBackground = 256
)

func attachFUSE(ctx context.Context, n *Node, o Options) (driver, error) {
	d, file, err := serveFUSE(ctx, n, o)
	if err != nil {
		return nil, err
	}
	// From here on the file system ends when the file is closed.
	number, err := makeLoop(ctx, file, n.state.Token, n.serving.wdev == nil)
	if e := file.Close(); err == nil {
		err = e
	}
	if err != nil {
		<-d.ended
		return nil, err
	}
	n.state.Number, n.state.Path = number, nodePath(FUSE, number)
	if l, err := openLoop(n.state, false); err == nil {
		if !l.direct() {
			o.Log.Warn("the kernel refuses direct I/O on a loop device; it caches all that is read a second time", "node", n.state.Path)
		}
		l.f.Close()
	}
	d.watch()
	return d, nil
}

// recoverFUSE gives the loop device of a dead process a new file.
func recoverFUSE(ctx context.Context, n *Node, o Options) (_ driver, err error) {
	l, err := openLoop(n.state, false)
	if err != nil {
		return nil, err
	}
	defer l.f.Close()
	if n.serving.wdev != nil {
		return nil, errors.New("the driver fuse cannot go on with a writable node: writes have failed since its server died. Unmount it, remove the node, and attach again")
	}
	// Another process with the same state comes too late from now on, unless this one fails.
	before := n.state.Token
	n.state.Token = cmp.Or(o.Token, NewToken())
	if err := l.mark(n.state.Token); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.mark(before))
		}
	}()
	d, file, err := serveFUSE(ctx, n, o)
	if err != nil {
		return nil, err
	}
	err = l.change(file)
	if e := file.Close(); err == nil {
		err = e
	}
	if err != nil {
		<-d.ended
		return nil, err
	}
	d.watch()
	return d, nil
}

func removeFUSE(_ context.Context, s State) error {
	l, err := openLoop(s, true)
	if err != nil {
		return err
	}
	defer l.f.Close()
	return errors.Join(flushPages(l.f), l.clear())
}

// serveFUSE makes the file system, and opens its file.
func serveFUSE(ctx context.Context, n *Node, o Options) (*fuseNode, *os.File, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, nil, fmt.Errorf("/dev/fuse is missing: load the kernel module by `modprobe fuse`: %w", ErrUnavailable)
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return nil, nil, fmt.Errorf("cannot open /dev/fuse: %w: a container requires this device and CAP_SYS_ADMIN: %w", err, ErrUnavailable)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	mount, err := mountFUSE(dev)
	if err != nil {
		unix.Close(dev)
		return nil, nil, err
	}
	defer unix.Close(mount)
	// The server takes the descriptor over, even where it fails.
	server, err := fuse.NewServer(newFuseFile(n.serving), fmt.Sprintf("/dev/fd/%d", dev), &fuse.MountOptions{
		Name: "thaw", MaxWrite: fuseRequest, MaxBackground: fuseBackground,
		DisableXAttrs: true, DisableSplice: true, DisableReadDirPlus: true,
		ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		Logger:            log.New(&lineLogger{log: o.Log}, "", 0),
	})
	if err != nil {
		return nil, nil, fmt.Errorf("start the FUSE file system: %w", err)
	}
	d := &fuseNode{n: n, server: server, ended: make(chan struct{})}
	go func() {
		server.Serve()
		close(d.ended)
	}()
	flags := unix.O_RDWR
	if n.serving.wdev == nil {
		flags = unix.O_RDONLY
	}
	fd, err := openAt(ctx, mount, fuseFileName(), flags)
	if err != nil {
		unix.Close(mount)
		<-d.ended
		return nil, nil, fmt.Errorf("open the file of the FUSE file system: %w", err)
	}
	return d, os.NewFile(uintptr(fd), fuseFileName()), nil
}

// mountFUSE makes a mount of the file system that is served on dev. It is in no tree of
// mounts. With its descriptor its file can be opened.
func mountFUSE(dev int) (int, error) {
	ctx, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, mountError("fsopen", err)
	}
	defer unix.Close(ctx)
	for _, o := range [][2]string{
		{"source", "thaw"}, {"subtype", "thaw"}, {"fd", fmt.Sprint(dev)}, {"rootmode", fmt.Sprintf("%o", unix.S_IFDIR)},
		{"user_id", "0"}, {"group_id", "0"}, {"max_read", fmt.Sprint(fuseRequest)},
	} {
		if err := unix.FsconfigSetString(ctx, o[0], o[1]); err != nil {
			return -1, mountError("fsconfig "+o[0], err)
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, mountError("fsconfig", err)
	}
	mount, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, mountError("fsmount", err)
	}
	return mount, nil
}

func mountError(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: %w: mounting a FUSE file system requires CAP_SYS_ADMIN: %w", what, err, ErrUnavailable)
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s: %w: it requires Linux 5.4: %w", what, err, ErrUnavailable)
	}
	return fmt.Errorf("mount a FUSE file system: %s: %w", what, err)
}

// openAt opens a file of a mount on a thread that may wait.
func openAt(ctx context.Context, dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
		if ctx.Err() != nil {
			return -1, context.Cause(ctx)
		}
	}
}

// watch notes when the kernel lets go of the file system, whoever has made it so.
func (d *fuseNode) watch() {
	go func() {
		<-d.ended
		d.n.end(errors.New("the loop device was taken from its file by another program"))
	}()
}

// wait waits until the kernel has let go of the file system.
func (d *fuseNode) wait(ctx context.Context) error {
	select {
	case <-d.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *fuseNode) detach(ctx context.Context) error {
	l, err := openLoop(d.n.state, false)
	if err != nil && !errors.Is(err, ErrGone) {
		return err
	}
	if err == nil {
		err = errors.Join(flushPages(l.f), l.clear())
		if e := l.f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
	}
	if err := d.wait(ctx); err != nil {
		return fmt.Errorf("another program has it open, and the kernel removes it when that closes it: %w", err)
	}
	return nil
}

// lineLogger passes the lines of go-fuse on.
type lineLogger struct{ log *slog.Logger }

func (l *lineLogger) Write(p []byte) (int, error) {
	l.log.Debug("fuse", "line", strings.TrimSpace(string(p)))
	return len(p), nil
}
