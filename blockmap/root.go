package blockmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
)

// Root says what an image needs of the cache. The evictor takes streams and small
// files that no root names before those that one does. A root may name content
// that the cache does not have, or has only in part.
//
// Roots lie in roots/IMAGE, one file an image. Integers are little-endian, numbers
// in the body unsigned varints:
//
//	 0  8  magic "thawroot"
//	 8  4  version, 1
//	12  4  length of the body in bytes
//	16  4  CRC-32C of bytes 0 to 15 and of the body
//	20     the body:
//	       32 bytes: digest of the image
//	       number of streams; for each 32 bytes: its ID
//	       number of small blobs; for each 32 bytes: its digest
//	       number of names; for each its length and its bytes
//
// Streams, blobs and names are sorted, and none is listed twice.
type Root struct {
	Image   Digest   // of the manifest of the block image
	Streams []Digest // IDs
	Blobs   []Digest // small blobs: manifest, config, index
	Refs    []string // names under which PutRef keeps what leads to the image
}

// RootOf returns the root of an image with the streams of ix. The caller adds small
// blobs and names.
func RootOf(image Digest, ix *Index) Root {
	r := Root{Image: image}
	for i := range ix.Streams {
		r.Streams = append(r.Streams, ix.Streams[i].ID())
	}
	return r
}

const (
	rootMagic   = "thawroot"
	rootVersion = 1
	rootHeader  = 20

	// Limits of the format.
	maxRootBlobs = 1024
	maxRootRefs  = 1024
	maxRefName   = 4096
	rootLimit    = 8 << 20 // bytes of a file
)

// union returns r with the lists of o added, sorted as in the format.
func (r *Root) union(o Root) Root {
	digests := func(a, b []Digest) []Digest {
		all := slices.Concat(a, b)
		slices.SortFunc(all, Digest.compare)
		return slices.Compact(all)
	}
	refs := slices.Concat(r.Refs, o.Refs)
	slices.Sort(refs)
	return Root{r.Image, digests(r.Streams, o.Streams), digests(r.Blobs, o.Blobs), slices.Compact(refs)}
}

// fits says whether the root is within the limits of the format.
func (r *Root) fits() bool {
	tooLong := func(name string) bool { return len(name) > maxRefName }
	return len(r.Streams) <= MaxStreams && len(r.Blobs) <= maxRootBlobs && len(r.Refs) <= maxRootRefs && !slices.ContainsFunc(r.Refs, tooLong)
}

func (r *Root) tooLarge() error {
	return fmt.Errorf("the root of image %.12s has %d streams, %d blobs and %d names; at most %d, %d and %d are allowed, and names of %d bytes",
		r.Image, len(r.Streams), len(r.Blobs), len(r.Refs), MaxStreams, maxRootBlobs, maxRootRefs, maxRefName)
}

// Encode returns the root in its format.
func (r *Root) Encode() []byte {
	sorted := r.union(Root{})
	b := make([]byte, rootHeader, rootHeader+32*(1+len(r.Streams)+len(r.Blobs))+64)
	copy(b, rootMagic)
	binary.LittleEndian.PutUint32(b[8:], rootVersion)
	b = append(b, r.Image[:]...)
	for _, list := range [][]Digest{sorted.Streams, sorted.Blobs} {
		b = binary.AppendUvarint(b, uint64(len(list)))
		for _, d := range list {
			b = append(b, d[:]...)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(sorted.Refs)))
	for _, name := range sorted.Refs {
		b = binary.AppendUvarint(b, uint64(len(name)))
		b = append(b, name...)
	}
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-rootHeader))
	binary.LittleEndian.PutUint32(b[16:], rootSum(b))
	return b
}

func rootSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:16], castagnoli), castagnoli, b[rootHeader:])
}

func (d Digest) compare(o Digest) int { return bytes.Compare(d[:], o[:]) }

// DecodeRoot reads a root without trusting it. It fails with ErrCorrupt.
func DecodeRoot(b []byte) (*Root, error) {
	if len(b) < rootHeader || string(b[:8]) != rootMagic {
		return nil, fmt.Errorf("%w: not the root of an image", ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != rootVersion {
		return nil, fmt.Errorf("%w: root version %d, this program reads %d", ErrCorrupt, v, rootVersion)
	}
	if n := binary.LittleEndian.Uint32(b[12:]); int64(n) != int64(len(b)-rootHeader) {
		return nil, fmt.Errorf("%w: the body of the root has %d bytes, and its header says %d", ErrCorrupt, len(b)-rootHeader, n)
	}
	if rootSum(b) != binary.LittleEndian.Uint32(b[16:]) {
		return nil, fmt.Errorf("%w: the root does not match its checksum", ErrCorrupt)
	}
	d := NewDecoder(b[rootHeader:])
	r := &Root{Image: d.Digest()}
	digests := func(what string, limit int) []Digest {
		n := d.Count(len(Digest{}))
		if n > limit {
			d.Fail("%d %s; at most %d are allowed", n, what, limit)
		}
		if d.Err() != nil {
			return nil
		}
		list := make([]Digest, n)
		for i := range list {
			list[i] = d.Digest()
		}
		return list
	}
	r.Streams = digests("streams", MaxStreams)
	r.Blobs = digests("blobs", maxRootBlobs)
	n := d.Count(1)
	if n > maxRootRefs {
		d.Fail("%d names; at most %d are allowed", n, maxRootRefs)
	}
	for i := 0; i < n && d.Err() == nil; i++ {
		r.Refs = append(r.Refs, d.String(maxRefName))
	}
	d.End()
	if d.Err() != nil {
		return nil, fmt.Errorf("root: %w", d.Err())
	}
	if !bytes.Equal(r.Encode(), b) {
		return nil, fmt.Errorf("%w: the lists of the root are not sorted, or its numbers are too long", ErrCorrupt)
	}
	return r, nil
}
