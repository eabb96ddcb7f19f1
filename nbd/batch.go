package nbd

import (
	"encoding/binary"

	"thaw/blockmap"
)

// batch is replies that leave together: headers that it holds, payloads where
// they lie, and the views that pin them until they have left. Its memory is
// used over and over.
type batch struct {
	bufs  [][]byte        // what to write, in order
	head  []byte          // backs the headers in bufs
	views []blockmap.View // to release
	size  int             // bytes in bufs

	handed bool // to whoever is writing; guarded by the session's mu
}

// A batch is written when it has this much: more would hold up its first reply
// for nothing, since the client has enough to do by then.
const (
	batchReplies = 64
	batchBytes   = 256 << 10
)

func (b *batch) full() bool  { return len(b.views) >= batchReplies || b.size >= batchBytes }
func (b *batch) empty() bool { return len(b.bufs) == 0 }

// reset releases what was written.
func (b *batch) reset() {
	for i := range b.views {
		b.views[i].Release()
	}
	clear(b.bufs)
	b.bufs, b.views, b.size = b.bufs[:0], b.views[:0], 0
	b.head = b.head[:0]
	const keep = 64 << 10
	if cap(b.head) > keep {
		b.head = nil
	}
	if cap(b.bufs) > keep/16 {
		b.bufs = nil
	}
}

// view is the next free slot for a view; it is given back by dropView where it
// was not filled.
func (b *batch) view() *blockmap.View {
	if len(b.views) < cap(b.views) {
		b.views = b.views[:len(b.views)+1]
	} else {
		b.views = append(b.views, blockmap.View{})
	}
	return &b.views[len(b.views)-1]
}

func (b *batch) dropView() { b.views = b.views[:len(b.views)-1] }

// header adds what f appends to b.head. Growing b.head moves it, but what was
// handed out before stays as it was where it was.
func (b *batch) header(p []byte, from int) {
	b.head = p
	b.payload(p[from:])
}

func (b *batch) payload(p []byte) {
	b.bufs = append(b.bufs, p)
	b.size += len(p)
}

// simple adds a reply without payload.
func (b *batch) simple(cookie uint64, e errno) {
	b.header(appendSimpleReply(b.head, cookie, e), len(b.head))
}

// data adds the reply to a READ: all of v, which is in a slot of b or outlives
// it.
func (b *batch) data(r *request, v *blockmap.View, structured bool) {
	segs := v.Segments()
	switch {
	case !structured:
		b.simple(r.cookie, 0)
		for i := range segs {
			b.payload(segs[i].Bytes)
		}
	case r.length == 0:
		b.header(appendChunk(b.head, r.cookie, chunkDone, chunkNone, 0), len(b.head))
	case r.flags&cmdFlagDF != 0:
		b.chunks(r.cookie, r.offset, segs, chunkDone, false)
	default:
		b.chunks(r.cookie, r.offset, segs, chunkDone, true)
	}
}

// chunks adds content chunks for segs, which are the device's bytes from
// offset; the last one has the flags. Holes become chunks of their own where
// that is asked for.
func (b *batch) chunks(cookie, offset uint64, segs []blockmap.Segment, flags uint16, holes bool) {
	for len(segs) > 0 {
		hole := holes && segs[0].Zero
		n, size := 0, 0
		for n < len(segs) && (holes && segs[n].Zero) == hole {
			size += len(segs[n].Bytes)
			n++
		}
		f := flags
		if n < len(segs) {
			f = 0
		}
		from := len(b.head)
		if hole {
			p := appendChunk(b.head, cookie, f, chunkHole, holePayloadLen)
			p = binary.BigEndian.AppendUint64(p, offset)
			b.header(binary.BigEndian.AppendUint32(p, uint32(size)), from)
		} else {
			p := appendChunk(b.head, cookie, f, chunkData, uint32(8+size))
			b.header(binary.BigEndian.AppendUint64(p, offset), from)
			for i := range n {
				b.payload(segs[i].Bytes)
			}
		}
		offset += uint64(size)
		segs = segs[n:]
	}
}

// fail adds an error reply. Structured ones carry a sentence, and the offset
// where it is known (at >= 0).
func (b *batch) fail(cookie uint64, e errno, why string, at int64, structured bool) {
	if !structured {
		b.simple(cookie, e)
		return
	}
	why = truncate(why, 512)
	from := len(b.head)
	var p []byte
	if at >= 0 {
		p = appendChunk(b.head, cookie, chunkDone, chunkErrorOffset, uint32(4+2+len(why)+8))
	} else {
		p = appendChunk(b.head, cookie, chunkDone, chunkError, uint32(4+2+len(why)))
	}
	p = binary.BigEndian.AppendUint32(p, uint32(e))
	p = binary.BigEndian.AppendUint16(p, uint16(len(why)))
	p = append(p, why...)
	if at >= 0 {
		p = binary.BigEndian.AppendUint64(p, uint64(at))
	}
	b.header(p, from)
}

// status adds the reply to a BLOCK_STATUS.
func (b *batch) status(cookie uint64, contexts []extents) {
	for i := range contexts {
		flags := uint16(0)
		if i == len(contexts)-1 {
			flags = chunkDone
		}
		b.header(appendChunk(b.head, cookie, flags, chunkStatus, uint32(len(contexts[i].p))), len(b.head))
		b.payload(contexts[i].p)
	}
}
