package flatten

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// A TOC (table of contents) is what a conversion keeps of a layer beside its
// stream: the chunk table and all entries in tar order. With it an image is
// built from the layer without reading it. The blob is one zstd frame of
//
//	 0  8  magic "thawtoc2"
//	 8  4  CRC-32C of what follows, little-endian
//	12     the chunk table, as in a blockmap.Index
//	       for each entry (numbers are varints, signed where said):
//	           1 byte: kind; name, as length and bytes
//	           hard links: link, as length and bytes
//	           files: mode, uid, gid; three times (mtime, atime, ctime):
//	               seconds (signed), nanoseconds; number of xattrs, for each
//	               name and value as length and bytes
//	             regular files: size; number of runs, for each:
//	               file blocks skipped since the end of the run before;
//	               stream blocks skipped since the end of the file's, or the
//	               stream's, run before (signed); blocks
//	             symlinks: link, as length and bytes
//	             devices: major, minor
//	       1 byte 0xff: the end
type tocWriter struct {
	b       []byte
	next    uint32 // stream block behind the last run
	entries int
}

const (
	tocMagic = "thawtoc2"
	tocEnd   = 0xff

	// Bounds on a layer, and so on its TOC. maxPath is Linux's PATH_MAX;
	// maxEntries entries of the usual length take a quarter of tocLimit.
	maxPath    = 4096
	maxEntries = 4 << 20
	tocLimit   = 1 << 30 // bytes of all entries

	// leastChunk is how many bytes of a stream's blob a chunk has at least: the
	// smallest zstd frame, and 8 bytes in the seek table.
	// The blob of an empty stream, which is not stored, has a length as well.
	leastChunk = 9 + 8
	emptyBlob  = 17
	mostChunk  = 2 + 10 + 5 + 32 // bytes of a chunk in the table

	// An entry is of no more than mostEntry bytes without its runs, which are
	// read in batches.
	mostEntry = 2*(3+maxPath) + 128 + maxXattrs + maxXattrs/xattrCost*6
	mostRun   = 5 + 10 + 5
	runBatch  = 4096
	tocBuffer = 256 << 10
	tocWindow = 32 << 20 // of the zstd frame
)

var errTOCLimit = fmt.Errorf("the layer's table of contents exceeds %d entries or %d MiB", maxEntries, tocLimit>>20)

func (w *tocWriter) str(s string) {
	w.b = binary.AppendUvarint(w.b, uint64(len(s)))
	w.b = append(w.b, s...)
}

func (w *tocWriter) num(n uint64) { w.b = binary.AppendUvarint(w.b, n) }

// full reports whether there is no room for another entry.
func (w *tocWriter) full() bool { return w.entries >= maxEntries || len(w.b) >= tocLimit }

func (w *tocWriter) add(e *entry) {
	w.entries++
	w.b = append(w.b, byte(e.kind))
	w.str(e.name)
	switch e.kind {
	case kindHardLink:
		w.str(e.link)
		return
	case kindWhiteout, kindOpaque:
		return
	}
	in := e.inode
	w.num(uint64(in.Mode))
	w.num(uint64(in.UID))
	w.num(uint64(in.GID))
	for _, t := range []ext4.Time{in.Mtime, in.Atime, in.Ctime} {
		w.b = binary.AppendVarint(w.b, t.Sec)
		w.num(uint64(t.Nsec))
	}
	w.num(uint64(len(in.Xattrs)))
	for _, x := range in.Xattrs {
		w.str(x.Name)
		w.str(string(x.Value))
	}
	switch in.Mode & modeType {
	case modeRegular:
		w.num(uint64(in.Size))
		w.num(uint64(len(in.Data)))
		var at uint32
		for _, r := range in.Data {
			w.num(uint64(r.FileBlock - at))
			w.b = binary.AppendVarint(w.b, int64(r.Block)-int64(w.next))
			w.num(uint64(r.Count))
			at, w.next = r.FileBlock+r.Count, r.Block+r.Count
		}
	case modeSymlink:
		w.str(e.link)
	case modeChar, modeBlock:
		w.num(uint64(in.Major))
		w.num(uint64(in.Minor))
	}
}

// close returns the TOC blob of a layer whose stream is t.
func (w *tocWriter) close(t *blockmap.Table) ([]byte, error) {
	entries := append(w.b, tocEnd)
	w.b = nil
	table := t.Append(nil)
	head := append([]byte(tocMagic), 0, 0, 0, 0)
	binary.LittleEndian.PutUint32(head[8:], crc32.Update(crc32.Checksum(table, castagnoli), castagnoli, entries))
	var out bytes.Buffer
	enc, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	// In pieces: together they can be a hundred MiB.
	for _, b := range [][]byte{head, table, entries} {
		if _, err := enc.Write(b); err != nil {
			return nil, err
		}
	}
	if err := enc.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// toc reads a TOC without trusting it and without holding all of it in memory: a few
// hundred bytes of zstd can become gigabytes. A wrong checksum is found at the end.
type toc struct {
	z     *zstd.Decoder
	d     *blockmap.Decoder // of buf
	buf   []byte
	left  int   // bytes that may still come
	ended error // of z: io.EOF, or what is wrong

	sum, want uint32

	table   blockmap.Table
	next    uint32
	free    uint64 // blocks of the stream that are in no run yet
	entries int
}

// openTOC reads the beginning of a TOC. stored is the length of the stream's blob,
// which bounds the chunk table.
func openTOC(blob []byte, stored int64) (*toc, error) {
	z, err := zstd.NewReader(bytes.NewReader(blob), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(tocWindow))
	if err != nil {
		return nil, err
	}
	t := &toc{z: z, d: blockmap.NewDecoder(nil), left: tocLimit}
	t.need(12 + sha256.Size + 2*binary.MaxVarintLen64)
	head := t.d.Bytes(12)
	switch {
	case t.d.Err() != nil:
	case string(head[:8]) != tocMagic:
		t.d.Fail("not a table of contents")
	default:
		t.want = binary.LittleEndian.Uint32(head[8:])
		t.sum = crc32.Checksum(t.rest(), castagnoli)
		t.head(stored)
	}
	if t.d.Err() != nil {
		defer t.close()
		return nil, t.fault()
	}
	return t, nil
}

// head reads the chunk table.
func (t *toc) head(stored int64) {
	ahead := blockmap.NewDecoder(t.rest())
	ahead.Digest()
	size := ahead.Uvarint(uint64(max(stored, emptyBlob)))
	count := ahead.Uvarint(size / leastChunk)
	if ahead.Err() != nil {
		t.d.Fail("a table of %d chunks for a blob of %d bytes", count, stored)
		return
	}
	t.need(sha256.Size + 2*binary.MaxVarintLen64 + int(count)*mostChunk)
	blockmap.DecodeTable(t.d, &t.table)
	t.free = uint64(t.table.Blocks())
	t.left = tocLimit
}

func (t *toc) close() { t.z.Close() }

// rest is the part of the buffer that is not read yet.
func (t *toc) rest() []byte { return t.buf[len(t.buf)-t.d.Len():] }

// need makes n bytes readable, or all that are left.
func (t *toc) need(n int) {
	if t.ended != nil || t.d.Err() != nil || t.d.Len() >= n {
		return
	}
	size := max(n, tocBuffer)
	b := t.buf[:0]
	if cap(b) < size || cap(b) > 4*size {
		b = make([]byte, 0, min(size, max(2*cap(b), tocBuffer)))
	}
	b = append(b, t.rest()...)
	for len(b) < size && t.ended == nil {
		b = slices.Grow(b, min(size-len(b), max(len(b), tocBuffer)))
		m, err := t.z.Read(b[len(b):min(cap(b), size)])
		t.sum = crc32.Update(t.sum, castagnoli, b[len(b):len(b)+m])
		b = b[:len(b)+m]
		if t.left -= m; t.left < 0 && err == nil {
			err = errTOCLimit
		}
		t.ended = err
	}
	t.buf, t.d = b, blockmap.NewDecoder(b)
}

// fault is the error about the TOC.
func (t *toc) fault() error {
	if t.ended != nil && t.ended != io.EOF {
		return fmt.Errorf("layer contents: %w: %w", blockmap.ErrCorrupt, t.ended)
	}
	return fmt.Errorf("layer contents: %w", t.d.Err())
}

// read returns the next entry, or io.EOF behind the last.
func (t *toc) read() (*entry, error) {
	e := new(entry)
	t.need(mostEntry)
	k := t.d.Bytes(1)
	if t.d.Err() == nil && k[0] == tocEnd {
		t.need(1)
		t.d.End()
		if t.d.Err() == nil && t.ended == io.EOF && t.sum != t.want {
			t.d.Fail("the checksum does not match")
		}
		if t.d.Err() == nil && t.ended == io.EOF {
			return nil, io.EOF
		}
	}
	if t.entries++; t.entries > maxEntries {
		t.d.Fail("more than %d entries", maxEntries)
	}
	if t.d.Err() != nil {
		return nil, t.fault()
	}
	d := t.d
	e.kind = kind(k[0])
	e.name = d.String(maxPath)
	switch e.kind {
	case kindFile:
		t.inode(e)
	case kindHardLink:
		e.link = d.String(maxPath)
	case kindWhiteout, kindOpaque:
	default:
		d.Fail("an entry of kind %d", e.kind)
	}
	if t.d.Err() == nil && (clean(e.name) != e.name || e.kind == kindHardLink && clean(e.link) != e.link) {
		t.d.Fail("the name %s is not clean", quoted(e.name))
	}
	if t.d.Err() != nil {
		return nil, t.fault()
	}
	return e, nil
}

func (t *toc) inode(e *entry) {
	d, in := t.d, new(ext4.Inode)
	e.inode = in
	in.Mode = uint32(d.Uvarint(0o177777))
	in.UID = uint32(d.Uvarint(math.MaxUint32))
	in.GID = uint32(d.Uvarint(math.MaxUint32))
	for _, p := range []*ext4.Time{&in.Mtime, &in.Atime, &in.Ctime} {
		p.Sec = d.Varint()
		p.Nsec = uint32(d.Uvarint(999_999_999))
	}
	if n := int(d.Uvarint(maxXattrs / xattrCost)); n > 0 {
		in.Xattrs = make([]ext4.Xattr, n)
		left := maxXattrs
		for i := range in.Xattrs {
			x := ext4.Xattr{Name: d.String(maxXattrName), Value: []byte(d.String(maxXattr))}
			if left -= xattrSize(&x); left < 0 {
				d.Fail("extended attributes of more than %d bytes", maxXattrs)
			}
			in.Xattrs[i] = x
		}
	}
	switch in.Mode & modeType {
	case modeRegular:
		in.Size = int64(d.Uvarint(maxFileSize))
		if n := int(d.Uvarint(t.free)); n > 0 {
			t.runs(in, n)
		}
	case modeSymlink:
		e.link = d.String(maxPath)
		in.Target = e.link
	case modeChar, modeBlock:
		in.Major = uint32(d.Uvarint(math.MaxUint32))
		in.Minor = uint32(d.Uvarint(math.MaxUint32))
	case modeDir, modeFifo:
	default:
		d.Fail("a file of mode %o", in.Mode)
	}
}

// runs reads n runs of a file.
func (t *toc) runs(in *ext4.Inode, n int) {
	var at uint64
	size, fileBlocks := uint64(t.table.Blocks()), uint64(in.Size+blockSize-1)/blockSize
	in.Data = make([]ext4.Run, 0, min(n, runBatch))
	for i := range n {
		if i%runBatch == 0 {
			t.need(min(n-i, runBatch) * mostRun)
		}
		d := t.d
		at += d.Uvarint(math.MaxUint32)
		block := uint64(int64(t.next) + d.Varint())
		count := d.Uvarint(math.MaxUint32)
		switch {
		case d.Err() != nil:
			return
		case count == 0 || at+count > fileBlocks:
			d.Fail("blocks %d+%d of a file of %d", at, count, fileBlocks)
			return
		case block >= size || count > size-block:
			d.Fail("blocks %d+%d of a stream of %d", block, count, size)
			return
		case count > t.free:
			d.Fail("files of more blocks than the %d of the stream", size)
			return
		}
		in.Data = append(in.Data, ext4.Run{FileBlock: uint32(at), Block: uint32(block), Count: uint32(count)})
		at += count
		t.next = uint32(block + count)
		t.free -= count
	}
}
