package attach

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ublkDevice is a device of the kernel's ublk driver.
type ublkDevice struct {
	n       *Node
	control *ublkControl
	file    *os.File // /dev/ublkcN
	queues  []*ublkQueue
	threads sync.WaitGroup // of the queues
	work    sync.WaitGroup // requests that were given away
	buffers ublkBuffers
	over    chan struct{} // closed when all threads have ended and the file is closed
}

const (
	ublkMaxIO = 1 << 20 // the largest read and write
	// What is discarded or zeroed at a time. To discard takes bits; zeros may take space.
	ublkMaxDiscard = 1 << 30
	ublkMaxZeroes  = 64 << 20
)

func attachUBLK(ctx context.Context, n *Node, o Options) (driver, error) {
	c, err := openUBLK()
	if err != nil {
		return nil, err
	}
	d := &ublkDevice{n: n, control: c}
	features, err := c.features(ctx)
	if err != nil {
		c.close()
		return nil, err
	}
	info := ublkInfo{queues: uint16(cmp.Or(o.Queues, min(maxQueues, runtime.NumCPU()))), depth: uint16(o.Depth), maxIOBytes: ublkMaxIO, devID: ^uint32(0), pid: int32(os.Getpid()), flags: features & ublkFWanted, mark: ublkMark(n.state.Token)}
	if err := exchange(ctx, c, "ADD_DEV", ublkAdd, ^uint32(0), &info, int(unsafe.Sizeof(info))); err != nil {
		c.close()
		return nil, err
	}
	n.state.Number, n.state.Path, n.state.Queues = info.devID, nodePath(UBLK, info.devID), int(info.queues)
	err = d.begin(ctx, o, &info)
	if err != nil {
		d.abandon()
		return nil, err
	}
	return d, nil
}

// begin makes a device that was added one that can be read.
func (d *ublkDevice) begin(ctx context.Context, o Options, info *ublkInfo) error {
	if info.flags&ublkFNeeded != ublkFNeeded {
		return fmt.Errorf("the kernel has refused USER_COPY: %w", ErrUnavailable)
	}
	s := d.n.serving
	p := ublkParams{
		len: ublkParamsLen, types: ublkParamBasic,
		logicalShift: 9, physicalShift: 12, optShift: 12, min: 12,
		maxSectors: min(info.maxIOBytes, ublkMaxIO) >> ublkSector, sectors: uint64(s.size) >> ublkSector,
	}
	if s.wdev == nil {
		p.attrs = ublkAttrReadOnly
	} else {
		p.attrs = ublkAttrVolatile | ublkAttrFUA
		p.types |= ublkParamTrim
		p.discardGranularity, p.maxDiscardSegments = 4096, 1
		p.maxDiscardSectors, p.maxZeroes = ublkMaxDiscard>>ublkSector, ublkMaxZeroes>>ublkSector
	}
	if err := exchange(ctx, d.control, "SET_PARAMS", ublkSetParams, info.devID, &p, ublkParamsLen); err != nil {
		return err
	}
	if err := d.serve(ctx, info); err != nil {
		return err
	}
	// The kernel looks for partitions, and waits for what that reads. If the command fails,
	// the requests that it waits for fail.
	id := info.devID
	if err := d.control.command(ctx, "START_DEV", ublkStart, id, uint64(os.Getpid()), o.FaultTimeout+ublkPatience); err != nil {
		return err
	}
	f, err := openNode(ctx, d.n.state.Path, unix.O_RDONLY, func() (uint64, error) { return sysDev(fmt.Sprintf("/sys/block/ublkb%d/dev", id)) })
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := deviceSize(f)
	if err == nil && size != d.n.serving.size {
		err = fmt.Errorf("%s has %d bytes, and its device %d", f.Name(), size, d.n.serving.size)
	}
	return err
}

// serve starts a thread for each queue.
func (d *ublkDevice) serve(ctx context.Context, info *ublkInfo) (err error) {
	if info.queues == 0 || info.depth == 0 || info.depth > ublkMaxDepth {
		return fmt.Errorf("the kernel has made %d queues of depth %d", info.queues, info.depth)
	}
	d.file, err = openNode(ctx, fmt.Sprintf("/dev/ublkc%d", info.devID), unix.O_RDWR, func() (uint64, error) {
		return 0, errors.New("a character device requires udev, or a devtmpfs on /dev")
	})
	if err != nil {
		return err
	}
	d.over = make(chan struct{})
	ready := make(chan error, info.queues)
	for i := range info.queues {
		q := &ublkQueue{d: d, id: i, depth: int(info.depth)}
		d.queues = append(d.queues, q)
		d.threads.Go(func() { q.run(ready) })
	}
	d.n.serving.more = d.stats
	go func() {
		d.threads.Wait()
		d.work.Wait()
		d.file.Close()
		close(d.over)
		// Whoever has stopped it deletes it, too.
		if !d.n.leaving.Load() {
			d.control.close()
			d.n.end(errors.New("the kernel has stopped the device: another program has removed it"))
		}
	}()
	for range d.queues {
		err = errors.Join(err, <-ready)
	}
	return err
}

func (d *ublkDevice) stats() Stats {
	s := d.n.serving
	st := Stats{Others: s.others.Load(), Errors: s.errors.Load()}
	for _, q := range d.queues {
		st.Hits += q.hits.Load()
		st.Misses += q.misses.Load()
	}
	return st
}

// abandon removes a device that could not be made to work, as far as possible.
func (d *ublkDevice) abandon() {
	d.n.leaving.Store(true)
	d.n.serving.cancel(errDetached)
	ctx, cancel := context.WithTimeout(context.Background(), detachPatience)
	defer cancel()
	if err := d.detach(ctx); err != nil {
		d.n.serving.log.Error("cannot remove a device of ublk", "node", d.n.state.Path, "err", err)
	}
}

func (d *ublkDevice) detach(ctx context.Context) error {
	id := d.n.state.Number
	if d.control.waits() { // for a command that was not answered yet
		c, err := openUBLK()
		if err != nil {
			return err
		}
		d.control.close()
		d.control = c
	}
	err := d.control.stop(ctx, id)
	if errors.Is(err, os.ErrClosed) {
		return nil // another program has removed it meanwhile
	}
	if err != nil {
		return err
	}
	if d.over != nil {
		// The kernel has taken its requests back, so the threads end. Where the device
		// was never started, they end because the file has no device any more.
		select {
		case <-d.over:
		case <-ctx.Done():
			return fmt.Errorf("wait for the queues: %w", context.Cause(ctx))
		}
	}
	if err := d.control.remove(ctx, id); err != nil {
		return err
	}
	d.control.close()
	return nil
}

// mustBe fails with ErrGone unless the device is the one that a dead process has served.
func (c *ublkControl) mustBe(ctx context.Context, s State) (ublkInfo, error) {
	info, err := c.info(ctx, s.Number)
	if err != nil {
		return info, err
	}
	if info.mark != ublkMark(s.Token) {
		return info, fmt.Errorf("the device belongs to another program by now: %w", ErrGone)
	}
	// The kernel forgets the process when it has noticed its end.
	if info.pid != int32(s.PID) && info.pid > 0 {
		return info, fmt.Errorf("process %d serves it: %w", info.pid, ErrGone)
	}
	p := ublkParams{len: ublkParamsLen}
	if err := exchange(ctx, c, "GET_PARAMS", ublkGetParams, s.Number, &p, ublkParamsLen); err != nil {
		return info, err
	}
	if p.sectors != uint64(s.Size)>>ublkSector || (p.attrs&ublkAttrReadOnly != 0) != s.ReadOnly {
		return info, fmt.Errorf("the device has another size or mode by now: %w", ErrGone)
	}
	return info, nil
}

func recoverUBLK(ctx context.Context, n *Node, o Options) (_ driver, err error) {
	c, err := openUBLK()
	if err != nil {
		return nil, err
	}
	d := &ublkDevice{n: n, control: c}
	defer func() {
		if err != nil {
			d.giveBack()
		}
	}()
	info, err := c.mustBe(ctx, n.state)
	if err != nil {
		return nil, err
	}
	if info.flags&ublkFRecovery == 0 || info.state == ublkStateDead {
		return nil, fmt.Errorf("the kernel cannot recover this device (flags %#x, state %d): %w", info.flags, info.state, ErrGone)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		// EBUSY until the kernel has noticed that the old process is gone.
		err := c.command(ctx, "START_USER_RECOVERY", ublkBeginRecov, info.devID, 0, ublkPatience)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		if e := sleep(ctx, pause); e != nil {
			return nil, fmt.Errorf("%w: %w", err, e)
		}
	}
	if err := d.serve(ctx, &info); err != nil {
		return nil, err
	}
	// The requests of the dead server come again while the command runs. The node is not
	// opened: it has been open all the time, and mustBe knows its size.
	return d, d.control.command(ctx, "END_USER_RECOVERY", ublkEndRecov, info.devID, uint64(os.Getpid()), o.FaultTimeout+ublkPatience)
}

// giveBack ends a recovery that has failed. The device stays, and may be recovered by
// another process, or removed.
func (d *ublkDevice) giveBack() {
	d.n.leaving.Store(true)
	for _, q := range d.queues {
		q.quit()
	}
	if d.over != nil {
		<-d.over
	}
	d.control.close()
}

func removeUBLK(ctx context.Context, s State) error {
	c, err := openUBLK()
	if err != nil {
		return err
	}
	defer c.close()
	if _, err := c.mustBe(ctx, s); err != nil {
		return err
	}
	return c.removeUnserved(ctx, s.Number)
}

// removeUnserved removes a device whose server is dead.
func (c *ublkControl) removeUnserved(ctx context.Context, id uint32) error {
	if err := notMounted(ctx, nodePath(UBLK, id)); err != nil {
		return err
	}
	if err := c.stop(ctx, id); err != nil {
		return err
	}
	return c.remove(ctx, id)
}

// ublkMark is what the kernel keeps of a token.
func ublkMark(token string) uint64 {
	sum := sha256.Sum256([]byte(token))
	return binary.BigEndian.Uint64(sum[:])
}
