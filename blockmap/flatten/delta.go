package flatten

import (
	"bytes"
	"context"
	"fmt"

	"thaw/blockmap"
)

// delta sorts the blocks that were written to a device: into those that the base has, those
// that are zeros, and those that go to the new stream.
//
// A run of at least a chunk begins a chunk, as large files do in a layer's stream, and so
// does one of at least a quarter of it where the chunk before is half full: a reader of it
// fetches little else. Smaller runs are packed, since neighbours on the device are as a
// rule of one directory, and written at one time.
type delta struct {
	ctx      context.Context
	base     CommitBase
	device   Changed
	progress *CommitProgress
	w        *StreamWriter
	chunk    int

	table    *blockmap.Table // of the new stream; nil: it is empty
	runs     []blockmap.Run  // of the new stream
	replaced []blockRange    // blocks of the device that are no longer the base's

	changed, equal, zeros int64
	buf, other            []byte
}

// deltaWindow is how much is read and compared at a time, in blocks: all of the largest chunk.
const deltaWindow = blockmap.MaxChunkBlocks

// write sorts all changes.
func (d *delta) write() (err error) {
	defer recovered(&err)
	var end int64
	for x := range d.device.Changes() {
		if err := x.Check(d.device.Size()); err != nil || x.Start%blockSize != 0 || x.End%blockSize != 0 || x.Start < end {
			return fmt.Errorf("the changes of the device are not runs of its blocks in order: %v behind byte %d", x.Extent, end)
		}
		end = x.End
		d.changed += x.Len()
	}
	d.progress.Changed.Store(d.changed)
	d.buf, d.other = make([]byte, deltaWindow*blockSize), make([]byte, deltaWindow*blockSize)
	for x := range d.device.Changes() {
		if err := d.ctx.Err(); err != nil {
			return context.Cause(d.ctx)
		}
		r := blockRange{uint32(x.Start / blockSize), uint32(x.Len() / blockSize)}
		if x.Zero {
			d.zero(r)
			d.progress.Read.Add(x.Len())
		} else if err := d.data(r); err != nil {
			return err
		}
	}
	// An image with other runs than its base needs an overlay. One block of zeros makes
	// one.
	if len(d.runs) == 0 && len(d.replaced) > 0 {
		clear(d.buf[:blockSize])
		return d.put(d.replaced[0].start, d.buf[:blockSize])
	}
	return nil
}

// zero notes blocks that read as zeros.
func (d *delta) zero(r blockRange) {
	for end := r.start + r.count; r.start < end; {
		run, ok := d.base.Index.Lookup(r.start)
		n := min(end, run.Device+run.Count) - r.start
		if ok {
			d.replace(blockRange{r.start, n})
			d.zeros += int64(n) * blockSize
		} else {
			d.equal += int64(n) * blockSize
		}
		r.start += n
	}
}

func (d *delta) replace(r blockRange) {
	if k := len(d.replaced) - 1; k >= 0 && d.replaced[k].start+d.replaced[k].count == r.start {
		d.replaced[k].count += r.count
		return
	}
	d.replaced = append(d.replaced, r)
}

// data sorts blocks that have data.
func (d *delta) data(r blockRange) error {
	full := uint32(d.chunk / blockSize)
	half := d.w.Blocks()-d.w.block >= full/2
	if r.count >= full || half && r.count >= full/4 {
		if err := d.w.Cut(); err != nil {
			return err
		}
	}
	for end := r.start + r.count; r.start < end; {
		if err := d.ctx.Err(); err != nil {
			return context.Cause(d.ctx)
		}
		n, err := d.window(r.start, end)
		if err != nil {
			return err
		}
		d.progress.Read.Add(int64(n) * blockSize)
		r.start += n
	}
	return nil
}

// window sorts blocks from start on, not beyond end, and returns how many.
func (d *delta) window(start, end uint32) (uint32, error) {
	run, ok := d.base.Index.Lookup(start)
	end = min(end, run.Device+run.Count)
	if !ok { // the base has zeros
		n := min(end-start, deltaWindow)
		p, err := d.read(start, n)
		if err != nil {
			return 0, err
		}
		for i := range n {
			b := p[i*blockSize:][:blockSize]
			if isZero(b) {
				d.equal += blockSize
			} else if err := d.put(start+i, b); err != nil {
				return 0, err
			}
		}
		return n, nil
	}
	// To the end of a chunk at most, of which all or a part was written.
	t := &d.base.Index.Streams[run.Stream]
	at := run.Block + start - run.Device
	c := &t.Chunks[t.Find(at)]
	n := min(end-start, c.Block+c.Count-at)
	p, err := d.read(start, n)
	if err != nil {
		return 0, err
	}
	e := blockmap.Range(int64(start)*blockSize, int64(n)*blockSize)
	if at == c.Block && n == c.Count && !blockmap.Resident(d.base.Device, e) && blockmap.ChunkDigest(p) == c.Digest {
		d.equal += e.Len()
		return n, nil
	}
	for i := uint32(0); i < n; {
		m, here, err := d.compare(start+i, n-i)
		if err != nil {
			return 0, err
		}
		for k := i; k < i+m; k++ {
			b := p[k*blockSize:][:blockSize]
			switch {
			case isZero(b):
				d.zeros += blockSize
				d.replace(blockRange{start + k, 1})
			case here && bytes.Equal(b, d.other[(k-i)*blockSize:][:blockSize]):
				d.equal += blockSize
			default:
				if err := d.put(start+k, b); err != nil {
					return 0, err
				}
			}
		}
		i += m
	}
	return n, nil
}

// compare reads the first of n blocks of the base to d.other, as many as are alike, if
// they need not be fetched.
func (d *delta) compare(start, n uint32) (count uint32, here bool, err error) {
	e := blockmap.Range(int64(start)*blockSize, int64(n)*blockSize)
	st := d.base.Device.Status(e)
	e.End = min(st.End, e.End)
	if e.Len() <= 0 {
		return 0, false, fmt.Errorf("the base device says nothing of block %d", start)
	}
	count = uint32(e.Len() / blockSize)
	if !st.Resident {
		return count, false, nil
	}
	v, ok := d.base.Device.Load(d.ctx, e)
	if !ok {
		// Its file is opened by the first Fault, which has nothing to fetch.
		if err := d.base.Device.Fault(d.ctx, e); err != nil {
			return count, false, context.Cause(d.ctx)
		}
		if v, ok = d.base.Device.Load(d.ctx, e); !ok {
			return count, false, nil // evicted meanwhile
		}
	}
	defer v.Release()
	return count, v.CopyTo(d.other[:e.Len()]) == nil, nil
}

// read reads blocks of the device.
func (d *delta) read(start, n uint32) ([]byte, error) {
	p := d.buf[:int64(n)*blockSize]
	return p, blockmap.ReadInto(d.ctx, d.device, blockmap.Range(int64(start)*blockSize, int64(len(p))), p)
}

// put appends a block of the device to the stream.
func (d *delta) put(block uint32, b []byte) error {
	at := d.w.Blocks()
	if _, err := d.w.Write(b); err != nil {
		return err
	}
	if k := len(d.runs) - 1; k >= 0 && d.runs[k].Device+d.runs[k].Count == block && d.runs[k].Block+d.runs[k].Count == at {
		d.runs[k].Count++
	} else {
		d.runs = append(d.runs, blockmap.Run{Device: block, Block: at, Count: 1})
	}
	if k := len(d.replaced) - 1; k < 0 || d.replaced[k].start+d.replaced[k].count <= block {
		d.replace(blockRange{block, 1})
	}
	return nil
}

func isZero(b []byte) bool { return bytes.Equal(b, zeroWindow[:len(b)]) }

// assemble makes the streams and the runs of the new image. Overlays of the base that
// have no run any more are dropped.
func (d *delta) assemble(base []Stream) (streams []Stream, runs []blockmap.Run, dropped int) {
	gone := d.replaced
	used := make([]bool, len(base))
	for _, r := range d.base.Index.Runs {
		gone = subtract(blockRange{r.Device, r.Count}, gone, func(p blockRange) {
			runs = append(runs, blockmap.Run{Device: p.start, Stream: r.Stream, Block: r.Block + p.start - r.Device, Count: p.count})
			used[r.Stream] = true
		})
	}
	number := make([]uint32, len(base))
	for i, s := range base {
		if s.Role == RoleOverlay && !used[i] {
			dropped++
			continue
		}
		number[i] = uint32(len(streams))
		streams = append(streams, s)
	}
	for i := range runs {
		runs[i].Stream = number[runs[i].Stream]
	}
	if d.table != nil {
		for _, r := range d.runs {
			r.Stream = uint32(len(streams))
			runs = append(runs, r)
		}
		streams = append(streams, Stream{Role: RoleOverlay, Table: d.table})
	}
	return streams, runs, dropped
}

// guess is the guess of the base without the blocks that were written. What was written
// there may belong to another file by now, or to none.
func (d *delta) guess(base *Image) (kept []blockmap.Extent, err error) {
	all, err := base.Guess(d.base.Index.Blocks)
	for _, e := range all {
		subtract(blockRange{uint32(e.Start / blockSize), uint32(e.Len() / blockSize)}, d.replaced, func(p blockRange) {
			kept = append(kept, blockmap.Range(int64(p.start)*blockSize, int64(p.count)*blockSize))
		})
	}
	return kept, err
}
