package flatten

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// entry is one line of a layer: a file, or the absence of one.
type entry struct {
	kind  kind
	name  string      // clean, relative to the root; "" is the root itself
	link  string      // symlinks: the target as it stands; hard links: the name of the target, clean
	inode *ext4.Inode // of kindFile
}

type kind uint8

const (
	kindFile     kind = iota // of any type: it is in the inode's mode
	kindHardLink             // another name for link
	kindWhiteout             // name is not there any more
	kindOpaque               // the directory name has nothing of the layers below
)

// A TOC (table of contents) is what a conversion keeps of a layer beside its
// stream: the chunk table and all entries in tar order. With it an image is
// built from the layer without reading it. The blob is one zstd frame of
//
//	 0  8  magic "thawtoc1"
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
	b    []byte
	next uint32 // stream block behind the last run
}

const (
	tocMagic = "thawtoc1"
	tocEnd   = 0xff

	// Bounds on what a TOC may ask for.
	maxPath    = 1 << 20
	maxXattr   = 64 << 10
	tocLimit   = 2 << 30
	leastXattr = 2
	leastRun   = 3
)

func (w *tocWriter) str(s string) {
	w.b = binary.AppendUvarint(w.b, uint64(len(s)))
	w.b = append(w.b, s...)
}

func (w *tocWriter) num(n uint64) { w.b = binary.AppendUvarint(w.b, n) }

func (w *tocWriter) add(e *entry) {
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

// toc reads a TOC without trusting it.
type toc struct {
	d     *blockmap.Decoder
	table blockmap.Table
	next  uint32
}

func openTOC(blob []byte) (*toc, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(tocLimit))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	b, err := dec.DecodeAll(blob, nil)
	if err != nil {
		return nil, fmt.Errorf("layer contents: %w: %w", blockmap.ErrCorrupt, err)
	}
	if len(b) < 12 || string(b[:8]) != tocMagic {
		return nil, fmt.Errorf("layer contents: %w: not a table of contents", blockmap.ErrCorrupt)
	}
	if binary.LittleEndian.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli) {
		return nil, fmt.Errorf("layer contents: %w: the checksum does not match", blockmap.ErrCorrupt)
	}
	t := &toc{d: blockmap.NewDecoder(b[12:])}
	blockmap.DecodeTable(t.d, &t.table)
	if t.d.Err() != nil {
		return nil, fmt.Errorf("layer contents: %w", t.d.Err())
	}
	return t, nil
}

// read returns the next entry, or io.EOF behind the last.
func (t *toc) read() (*entry, error) {
	e := new(entry)
	d := t.d
	k := d.Bytes(1)
	if d.Err() == nil && k[0] == tocEnd {
		d.End()
		if d.Err() == nil {
			return nil, io.EOF
		}
	}
	if d.Err() != nil {
		return nil, fmt.Errorf("layer contents: %w", d.Err())
	}
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
	if d.Err() == nil && (clean(e.name) != e.name || e.kind == kindHardLink && clean(e.link) != e.link) {
		d.Fail("the name %q is not clean", e.name)
	}
	if d.Err() != nil {
		return nil, fmt.Errorf("layer contents: %w", d.Err())
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
	if n := d.Count(leastXattr); n > 0 {
		in.Xattrs = make([]ext4.Xattr, n)
		for i := range in.Xattrs {
			in.Xattrs[i] = ext4.Xattr{Name: d.String(maxXattr), Value: []byte(d.String(maxXattr))}
		}
	}
	switch in.Mode & modeType {
	case modeRegular:
		in.Size = int64(d.Uvarint(maxFileSize))
		if n := d.Count(leastRun); n > 0 {
			in.Data = make([]ext4.Run, n)
			t.runs(in)
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

func (t *toc) runs(in *ext4.Inode) {
	d := t.d
	var at uint64
	size, fileBlocks := uint64(t.table.Blocks()), uint64(in.Size+blockSize-1)/blockSize
	for i := range in.Data {
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
		}
		in.Data[i] = ext4.Run{FileBlock: uint32(at), Block: uint32(block), Count: uint32(count)}
		at += count
		t.next = uint32(block + count)
	}
}
