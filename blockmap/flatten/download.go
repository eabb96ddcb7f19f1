package flatten

import (
	"context"
	"errors"
	"io"
	"sync"
)

// download reads a layer on a goroutine of its own, at most window bytes ahead of the
// conversion: a layer that waits for its turn of the processor does not wait for the
// network then.
type download struct {
	rc     io.ReadCloser
	window int64
	pieces *sync.Pool
	done   chan struct{}

	mu struct {
		sync.Mutex
		queue  [][]byte // pieces that were read
		at     int      // read from the first piece
		queued int64    // bytes in queue
		err    error    // behind them
		closed bool
	}
	changed sync.Cond // of mu
}

// pieceSize is how much one read of a layer asks for.
const pieceSize = 64 << 10

// newDownload begins to read rc, which it closes. The caller closes the download.
func newDownload(rc io.ReadCloser, window int64, pieces *sync.Pool) *download {
	d := &download{rc: rc, window: window, pieces: pieces, done: make(chan struct{})}
	d.changed.L = &d.mu
	go d.run()
	return d
}

func newPieces() *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, pieceSize); return &b }}
}

func (d *download) run() {
	defer close(d.done)
	defer d.rc.Close()
	for {
		d.mu.Lock()
		for d.mu.queued > 0 && d.mu.queued+pieceSize > d.window && !d.mu.closed {
			d.changed.Wait()
		}
		closed := d.mu.closed
		d.mu.Unlock()
		if closed {
			return
		}
		p := *d.pieces.Get().(*[]byte)
		n, err := fill(d.rc, p[:pieceSize])
		d.mu.Lock()
		if n > 0 {
			d.mu.queue = append(d.mu.queue, p[:n])
			d.mu.queued += int64(n)
		}
		d.mu.err = err
		d.changed.Broadcast()
		d.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (d *download) Read(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.mu.queue) == 0 && d.mu.err == nil && !d.mu.closed {
		d.changed.Wait()
	}
	switch {
	case d.mu.closed:
		return 0, errors.New("read of a closed layer")
	case len(d.mu.queue) == 0:
		return 0, d.mu.err
	}
	first := d.mu.queue[0]
	n := copy(p, first[d.mu.at:])
	d.mu.at += n
	d.mu.queued -= int64(n)
	if d.mu.at == len(first) {
		first = first[:cap(first)]
		d.pieces.Put(&first)
		d.mu.queue[0] = nil
		d.mu.queue, d.mu.at = d.mu.queue[1:], 0
	}
	d.changed.Broadcast()
	return n, nil
}

// Close ends the goroutine. A read of the layer in progress must end with its context.
func (d *download) Close() error {
	d.mu.Lock()
	d.mu.closed = true
	for _, p := range d.mu.queue {
		p = p[:cap(p)]
		d.pieces.Put(&p)
	}
	d.mu.queue = nil
	d.changed.Broadcast()
	d.mu.Unlock()
	<-d.done
	return nil
}

// open begins to read a layer. The download is to be closed, and ctx to end before:
// close does both.
func (b *builder) open(parent context.Context, i int) (r io.Reader, close func(), err error) {
	window := min(max(b.sizeOf(i), aheadLeast), aheadWindow)
	n, err := b.bounds.ahead.take(parent, i, window)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(parent)
	in, err := b.openLayer(ctx, i)
	if err != nil {
		cancel()
		b.bounds.ahead.give(n)
		return nil, nil, err
	}
	d := newDownload(&layerReader{counter{in, b.Progress, i}, in}, window, b.pieces)
	return d, func() {
		cancel()
		d.Close()
		b.bounds.ahead.give(n)
	}, nil
}

// layerReader counts the bytes of a layer.
type layerReader struct {
	counter
	io.Closer
}
