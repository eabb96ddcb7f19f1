package zone

import (
	"net/http"

	"thaw/blockmap"
)

// form is how a chunk is sent. The plain form is its content.
type form struct {
	// stored says that the chunk is sent as the registry has it, compressed.
	stored bool
	// leaves says that the leaves that were asked for come first, uncompressed, behind the
	// digests of all leaves of the chunk. So they can be verified, and read, before the
	// rest arrives. Then the rest follows: in plain form the other leaves in their order,
	// else all of the chunk as it is stored.
	leaves bool
}

// formHeader is the header field that says the form. It is absent from plain answers.
const formHeader = "Thaw-Form"

func (x form) String() string {
	switch {
	case x.stored && x.leaves:
		return "leaves, stored"
	case x.stored:
		return "stored"
	case x.leaves:
		return "leaves"
	}
	return ""
}

// parseForm reads the header of an answer.
func parseForm(h http.Header) (x form, ok bool) {
	fields := h[formHeader]
	if len(fields) == 0 {
		return form{}, true
	}
	for _, x := range []form{{stored: true}, {leaves: true}, {stored: true, leaves: true}} {
		if len(fields) == 1 && fields[0] == x.String() {
			return x, true
		}
	}
	return form{}, false
}

// digestsOf returns how many bytes the digests of the leaves of a chunk of size bytes take.
func digestsOf(size int64) int64 {
	return (size + blockmap.LeafSize - 1) / blockmap.LeafSize * int64(len(blockmap.Digest{}))
}

// leavesOf returns where leaves of a chunk of size bytes lie in it. They are neighbours.
func leavesOf(leaves blockmap.LeafSet, size int64) (e blockmap.Extent) {
	first := true
	for i := range leaves.Each {
		if first {
			e.Start, first = int64(i)*blockmap.LeafSize, false
		}
		e.End = min(int64(i+1)*blockmap.LeafSize, size)
	}
	return e
}

// length returns how many bytes an answer of this form has. The chunk has size bytes, and
// stored bytes in the registry.
func (x form) length(size, stored int64, leaves blockmap.LeafSet) (n int64) {
	n = size
	if x.stored {
		n = stored
	}
	if x.leaves {
		n += digestsOf(size)
		if x.stored {
			e := leavesOf(leaves, size)
			n += e.Len()
		}
	}
	return n
}
