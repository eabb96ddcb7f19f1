package nbd

import (
	"encoding/binary"

	"thaw/blockmap"
)

// batch is replies that are sent together: headers in its own memory, payloads where
// they lie, and the views that pin the payloads until they are sent. Its memory is
// reused.
type batch struct {
	bufs  [][]byte // what to write, in order
	head  []byte   // backs the headers in bufs
	reads []read   // the replies with a view, in order
	size  int      // bytes in bufs

	copies pieces // what bufs are after detach, instead of all above

	handed bool // to the holder of the write side; guarded by the session's mu
}

// read is a view to release, and the part of a batch that its content makes up, so that
// the part can be composed anew if the bytes turn out to be unreadable.
type read struct {
	view   blockmap.View
	cookie uint64
	offset uint64
	first  int32 // of its bufs
	end    int32 // 0: the content is memory of the server
}

// A batch of this size is written. A larger one would hold up its first reply, and the
// client has enough to work on by then.
const (
	batchReplies = 64
	batchBytes   = 256 << 10
)

func (b *batch) full() bool  { return len(b.reads) >= batchReplies || b.size >= batchBytes }
func (b *batch) empty() bool { return len(b.bufs) == 0 }

// detached reports whether all of b is in its copies.
func (b *batch) detached() bool {
	return len(b.copies.list) > 0 && len(b.copies.list) == len(b.bufs)
}

// reset releases what was written.
func (b *batch) reset() {
	for i := range b.reads {
		b.reads[i].view.Release()
	}
	clear(b.bufs)
	b.bufs, b.reads, b.size = b.bufs[:0], b.reads[:0], 0
	b.head = b.head[:0]
	b.copies.truncate(0)
	const keep = 64 << 10
	if cap(b.head) > keep {
		b.head = nil
	}
	if cap(b.bufs) > keep/16 {
		b.bufs = nil
	}
}

// slot returns room for the next view. dropSlot takes it back where it was not filled.
func (b *batch) slot() *read {
	if len(b.reads) < cap(b.reads) {
		b.reads = b.reads[:len(b.reads)+1]
	} else {
		b.reads = append(b.reads, read{})
	}
	return &b.reads[len(b.reads)-1]
}

func (b *batch) dropSlot() { b.reads = b.reads[:len(b.reads)-1] }

// header makes p the new b.head, and adds its bytes from from on. Growing b.head moves
// it, but leaves headers that were added before where they are.
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

// data adds the reply to a READ: the view of d, the last slot of b.
func (b *batch) data(r *request, d *read, structured bool) {
	segs := d.view.Segments()
	d.cookie, d.offset, d.first = r.cookie, r.offset, int32(len(b.bufs))
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
	d.end = int32(len(b.bufs))
}

// largeChunk is a size from which a chunk may be sent in parts. An error after its
// header can be reported only in another chunk, so such a chunk is not the last one.
const largeChunk = 64 << 10

// chunks adds content chunks for segs, which are the device's bytes from
// offset; the last one has the flags. With holes, each hole becomes a chunk of its
// own.
func (b *batch) chunks(cookie, offset uint64, segs []blockmap.Segment, flags uint16, holes bool) {
	for len(segs) > 0 {
		hole := holes && segs[0].Zero
		n, size := 0, 0
		for n < len(segs) && (holes && segs[n].Zero) == hole {
			size += len(segs[n].Bytes)
			n++
		}
		f := flags
		apart := f&chunkDone != 0 && !hole && size >= largeChunk && n == len(segs)
		if n < len(segs) || apart {
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
		if apart {
			b.header(appendChunk(b.head, cookie, chunkDone, chunkNone, 0), len(b.head))
		}
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
