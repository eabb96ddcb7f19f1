package tracefile

import (
	"context"
	"io"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// Options say when a recording ends by itself, and how much memory it may take. The
// first end that is reached counts. Without any, the recording lasts until Stop, or
// until its file reaches MaxSize.
type Options struct {
	For   time.Duration // this long after the first read
	Bytes int64         // when so much of the device has been touched
	// Quiet ends it when no block was touched for the first time for so long.
	// A read of touched blocks does not count, since nothing is written for
	// it. A Fault that still waits counts.
	Quiet time.Duration

	// Buffer is how many touches may wait to be written. 0 means 8192, which
	// take 400 KiB. Touches that do not fit are dropped and counted.
	Buffer int
}

const defaultBuffer = 8192

// Recorder is a blockmap.Device around another one. It records each block of that
// device when the block is read for the first time.
//
// A read of touched blocks costs one look at a bitmap, which it does not change. A
// first touch sets the bits of its blocks and appends an event to a buffer, under a
// lock that is held for no longer than that. A goroutine merges the events and writes
// them. No read waits for the writer.
//
// A read that misses calls View, Fault and Load. The View touches the
// blocks. All blocks that this read is the first to touch are recorded as a miss.
//
// A Recorder takes no writes: the blocks of a trace are those of the image, so the
// recorder of a writable device belongs below the overlay.
type Recorder struct {
	dev     blockmap.Device
	touched []uint64 // one bit a block
	size    int64
	base    time.Time
	o       Options

	// The fields below change. Those above are only read, and stay in the
	// caches of all processors.
	_ [64]byte

	over    atomic.Bool // no more events are taken
	waiting atomic.Int64
	faulted atomic.Int64 // when a Fault ended last, in nanoseconds since base
	dropped atomic.Uint64
	ranges  atomic.Int64
	blocks  atomic.Int64

	mu struct {
		sync.Mutex
		events []event
	}

	stopOnce sync.Once
	stop     chan struct{}
	kick     chan struct{} // the buffer is no longer empty, or is half full
	done     chan struct{}
	end      End // like err: good once done is closed
	err      error
}

// event is a run of blocks on its way to the writer.
type event struct {
	at           time.Duration // since base
	block, count uint32
	miss         bool
}

// NewRecorder starts to record the reads of dev to w. dev is the device of the image
// with that index. The caller must call Stop.
func NewRecorder(dev blockmap.Device, index blockmap.Digest, w io.Writer, o Options) *Recorder {
	if o.Buffer <= 0 {
		o.Buffer = defaultBuffer
	}
	blocks := uint32(dev.Size() / blockmap.BlockSize)
	r := &Recorder{
		dev: dev, size: dev.Size(), base: time.Now(), o: o,
		touched: make([]uint64, (int64(blocks)+63)/64),
		stop:    make(chan struct{}), kick: make(chan struct{}, 1), done: make(chan struct{}),
	}
	r.mu.events = make([]event, 0, o.Buffer)
	loop := &writeLoop{r: r, first: -1, spare: make([]event, 0, o.Buffer)}
	go func() {
		defer close(r.done)
		if loop.out, r.err = NewWriter(w, Header{Index: index, Blocks: blocks, Starts: 1}); r.err == nil {
			r.end, r.err = loop.run()
		}
		r.over.Store(true)
	}()
	return r
}

// Size implements blockmap.Device.
func (r *Recorder) Size() int64 { return r.size }

// View implements blockmap.Device.
func (r *Recorder) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	// e is not checked here: touch and the device check it, and this look does
	// no harm for an extent that is out of range.
	first, last := uint64(e.Start)/blockmap.BlockSize, uint64(e.End-1)/blockmap.BlockSize
	if w := first / 64; w == last/64 && w < uint64(len(r.touched)) {
		mask := uint64(2)<<(last%64) - uint64(1)<<(first%64)
		if atomic.LoadUint64(&r.touched[w])&mask == mask {
			return r.dev.View(e)
		}
	}
	v, ok = r.dev.View(e)
	r.touch(e, !ok && !blockmap.Resident(r.dev, e)) // it may be resident, and not in memory
	return v, ok
}

// Load implements blockmap.Device.
func (r *Recorder) Load(ctx context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	r.touch(e, !blockmap.Resident(r.dev, e))
	return r.dev.Load(ctx, e)
}

// LoadAsync implements blockmap.AsyncDevice.
func (r *Recorder) LoadAsync(e blockmap.Extent, done func(v blockmap.View, ok bool)) {
	r.touch(e, !blockmap.Resident(r.dev, e))
	blockmap.LoadAsync(r.dev, e, done)
}

// Fault implements blockmap.Device.
func (r *Recorder) Fault(ctx context.Context, e blockmap.Extent) error {
	r.touch(e, true)
	r.waiting.Add(1)
	defer func() {
		r.faulted.Store(int64(time.Since(r.base)))
		r.waiting.Add(-1)
	}()
	return r.dev.Fault(ctx, e)
}

// Status implements blockmap.Device. It touches no block.
func (r *Recorder) Status(e blockmap.Extent) blockmap.Status { return r.dev.Status(e) }

// Prefetch implements blockmap.Device. It touches no block: what is fetched ahead
// is not read yet.
func (r *Recorder) Prefetch(e blockmap.Extent) { r.dev.Prefetch(e) }

// Stop ends the recording, unless it has ended by itself, and waits until it is
// written. It fails with the first error of w. Reads go on as before.
func (r *Recorder) Stop() error {
	r.stopOnce.Do(func() { close(r.stop) })
	<-r.done
	return r.err
}

// Done returns a channel that is closed once the recording has ended and is written.
// Stop then returns at once.
func (r *Recorder) Done() <-chan struct{} { return r.done }

// End says how the recording ended, once it has.
func (r *Recorder) End() End {
	<-r.done
	return r.end
}

// Stats counts what a Recorder has done so far.
type Stats struct {
	Ranges  int64 // taken from the buffer, before neighbours were merged
	Bytes   int64 // in these ranges
	Dropped int64 // bytes that were touched but did not fit in the buffer
}

// Stats returns the counts so far.
func (r *Recorder) Stats() Stats {
	return Stats{
		Ranges: r.ranges.Load(), Bytes: r.blocks.Load() * blockmap.BlockSize,
		Dropped: int64(r.dropped.Load()) * blockmap.BlockSize,
	}
}

// touch marks e as touched, and records the blocks that were not touched before.
func (r *Recorder) touch(e blockmap.Extent, miss bool) {
	if e.Check(r.size) != nil || e.Len() == 0 {
		return
	}
	first, last := uint32(e.Start/blockmap.BlockSize), uint32((e.End-1)/blockmap.BlockSize)
	var run event // of fresh blocks, which may go on in the next word
	for w := first / 64; w <= last/64; w++ {
		mask := ^uint64(0)
		if w == first/64 {
			mask <<= first % 64
		}
		if w == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		if atomic.LoadUint64(&r.touched[w])&mask == mask {
			continue
		}
		fresh := mask &^ atomic.OrUint64(&r.touched[w], mask)
		for fresh != 0 {
			bit := uint32(bits.TrailingZeros64(fresh))
			n := uint32(bits.TrailingZeros64(^(fresh >> bit)))
			fresh &^= ^uint64(0) >> (64 - n) << bit
			if block := w*64 + bit; run.count > 0 && run.block+run.count == block {
				run.count += n
			} else {
				r.put(run)
				run = event{time.Since(r.base), block, n, miss}
			}
		}
	}
	r.put(run)
}

// put appends x to the buffer of the writeLoop, or drops it where the buffer is full.
func (r *Recorder) put(x event) {
	if x.count == 0 || r.over.Load() {
		return
	}
	r.mu.Lock()
	n := len(r.mu.events)
	full := n == cap(r.mu.events)
	if !full {
		r.mu.events = append(r.mu.events, x)
	}
	r.mu.Unlock()
	if full {
		r.dropped.Add(uint64(x.count))
		return
	}
	if n == 0 || n+1 == r.o.Buffer/2 {
		select {
		case r.kick <- struct{}{}:
		default: // the writeLoop is awake already
		}
	}
}
