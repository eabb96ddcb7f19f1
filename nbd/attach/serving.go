package attach

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
	"thaw/nbd"
)

// errDetached is why a request fails that waits while its node is detached.
var errDetached = errors.New("the node is being detached")

// serving answers the requests of one node, for the drivers that do not leave that to an
// nbd.Server. It knows no wire format: the results are errnos.
type serving struct {
	dev     blockmap.Device
	wdev    blockmap.WritableDevice // nil: read-only
	size    int64
	timeout time.Duration
	client  *nbd.Client // bounds what is in flight, with other transports
	log     *slog.Logger
	lines   rate.Sometimes

	ctx    context.Context // of all requests that wait
	cancel context.CancelCauseFunc

	hits, misses, others, errors atomic.Int64
	more                         func() Stats // of a driver that counts by itself
}

// Stats are counts of requests.
type Stats struct {
	Hits   int64 // reads answered at once
	Misses int64 // reads that waited for the disk or for the network
	Others int64 // writes, flushes and all that is not a read
	Errors int64 // requests answered with an error
}

func newServing(dev blockmap.Device, o Options) *serving {
	s := &serving{
		dev: dev, size: dev.Size(), timeout: o.FaultTimeout, client: o.Admission.Client(nbd.Limits{}),
		log: o.Log.With("device", o.Name), lines: rate.Sometimes{Interval: time.Second},
	}
	if w, ok := dev.(blockmap.WritableDevice); ok && !o.ReadOnly {
		s.wdev = w
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

func (s *serving) stats() Stats {
	if s.more != nil {
		return s.more()
	}
	return Stats{s.hits.Load(), s.misses.Load(), s.others.Load(), s.errors.Load()}
}

// admit waits until a request of that many bytes may begin; the caller calls
// s.client.Release(1, bytes).
func (s *serving) admit(ctx context.Context, bytes int64) error {
	if s.client.TryAcquire(bytes) {
		return nil
	}
	return s.client.Acquire(ctx, bytes)
}

// read reads e, for however long it takes. The caller releases the view.
func (s *serving) read(e blockmap.Extent) (blockmap.View, syscall.Errno) {
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	if err := s.admit(ctx, e.Len()); err != nil {
		return blockmap.View{}, s.fail(nbd.OpRead, e, err)
	}
	defer s.client.Release(1, e.Len())
	v, err := blockmap.Read(ctx, s.dev, e)
	if err != nil {
		return blockmap.View{}, s.fail(nbd.OpRead, e, err)
	}
	return v, 0
}

// readAgain reads e to p, after the bytes of a view of it could not be read.
func (s *serving) readAgain(e blockmap.Extent, p []byte) syscall.Errno {
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	if err := blockmap.ReadInto(ctx, s.dev, e, p); err != nil {
		return s.fail(nbd.OpRead, e, err)
	}
	return 0
}

// write writes p at off, and makes it durable if fua is true.
func (s *serving) write(p []byte, off int64, fua bool) syscall.Errno {
	e := blockmap.Range(off, int64(len(p)))
	return s.do(nbd.OpWrite, e, e.Len(), fua, func(ctx context.Context) error { return s.wdev.WriteAt(ctx, p, off) })
}

func (s *serving) zero(e blockmap.Extent, mayDiscard, fua bool) syscall.Errno {
	return s.do(nbd.OpWrite, e, 0, fua, func(ctx context.Context) error { return s.wdev.Zero(ctx, e, mayDiscard) })
}

func (s *serving) discard(e blockmap.Extent) syscall.Errno {
	return s.do(nbd.OpOther, e, 0, false, func(ctx context.Context) error { return s.wdev.Discard(ctx, e) })
}

func (s *serving) flush() syscall.Errno {
	if s.wdev == nil {
		return 0 // nothing was written
	}
	return s.do(nbd.OpOther, blockmap.Extent{}, 0, false, s.wdev.Flush)
}

// do does what is not a read.
func (s *serving) do(op nbd.Op, e blockmap.Extent, bytes int64, fua bool, f func(context.Context) error) syscall.Errno {
	s.others.Add(1)
	if s.wdev == nil {
		return s.fail(op, e, blockmap.ErrReadOnly)
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	err := s.admit(ctx, bytes)
	if err == nil {
		defer s.client.Release(1, bytes)
		err = f(ctx)
	}
	if err == nil && fua {
		err = s.wdev.Flush(ctx)
	}
	if err != nil {
		return s.fail(op, e, err)
	}
	return 0
}

// fail counts and logs a request that fails, and returns its errno.
func (s *serving) fail(op nbd.Op, e blockmap.Extent, err error) syscall.Errno {
	errno := nbd.Errno(op, err)
	s.errors.Add(1)
	if s.ctx.Err() == nil {
		s.lines.Do(func() {
			s.log.Warn("request failed", "extent", e, "errno", uint32(errno), "err", err)
		})
	}
	return errno
}
