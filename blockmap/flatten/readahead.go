package flatten

import "io"

// readAhead decompresses on a goroutine of its own, a few blocks ahead of the reader,
// which hashes and packs.
type readAhead struct {
	blocks chan block
	free   chan []byte
	stop   chan struct{}
	done   chan struct{}
	cur    block
	at     int
}

type block struct {
	b   []byte
	err error
}

func newReadAhead(r io.Reader, closeSource func()) *readAhead {
	const ahead, size = 4, 256 << 10
	a := &readAhead{
		blocks: make(chan block, ahead), free: make(chan []byte, ahead+2),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for range ahead {
		a.free <- make([]byte, size)
	}
	go func() {
		defer close(a.done)
		if closeSource != nil {
			defer closeSource()
		}
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-a.stop:
				return
			}
			n, err := fill(r, b[:size])
			a.blocks <- block{b[:n], err}
			if err != nil {
				return
			}
		}
	}()
	return a
}

// fill reads until b is full or r ends. It is not io.ReadFull, which calls a clean
// end and a layer cut short by the same name.
func fill(r io.Reader, b []byte) (n int, err error) {
	defer recovered(&err)
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func (a *readAhead) Read(p []byte) (int, error) {
	for a.at == len(a.cur.b) {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.b != nil {
			a.free <- a.cur.b
		}
		a.cur, a.at = <-a.blocks, 0
	}
	n := copy(p, a.cur.b[a.at:])
	a.at += n
	return n, nil
}

// Close ends the goroutine. The source of the bytes must not block forever.
func (a *readAhead) Close() error {
	close(a.stop)
	for {
		select {
		case <-a.blocks:
		case <-a.done:
			return nil
		}
	}
}
