package flatten

import (
	"fmt"
	"io"
)

// maxHoles bounds the holes in the sparse files of a layer together, in bytes: a header
// of 512 bytes can ask for 16 TiB of zeros, which take minutes.
const maxHoles = 64 << 30

// tally counts the bytes that are read.
type tally struct {
	r io.Reader
	n int64
}

func (t *tally) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.n += int64(n)
	return n, err
}

// sparseFile reads the files of a tar, and bounds the bytes of holes: those that are not
// in the tar.
type sparseFile struct {
	r     io.Reader
	in    *tally
	limit int64 // bytes of holes, in all files
	left  int64 // of these
	holes int64 // of this file
}

// next begins another file.
func (s *sparseFile) next() io.Reader {
	s.left -= max(s.holes, 0)
	s.holes = 0
	return s
}

func (s *sparseFile) Read(p []byte) (int, error) {
	before := s.in.n
	n, err := s.r.Read(p)
	s.holes += int64(n) - (s.in.n - before)
	if s.holes > s.left {
		return 0, fmt.Errorf("the sparse files of the layer have more than %d MiB of holes", s.limit>>20)
	}
	return n, err
}
