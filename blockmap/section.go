package blockmap

import (
	"context"
	"io"

	"golang.org/x/sys/unix"
)

// This file is the part of a Stream for callers that send its content elsewhere: from the
// file to a socket, without a copy in this process, or from a view.

// Table describes the chunks of the stream. The caller must not change it. Its Blob is
// that of one of the images that have the stream.
func (s *Stream) Table() *Table { return s.table }

// Size is the length of the stream in bytes.
func (s *Stream) Size() int64 { return s.size() }

// ChunkRange is the range of the bytes of chunk i in the stream.
func (s *Stream) ChunkRange(i int) Extent {
	c := &s.table.Chunks[i]
	return Range(int64(c.Block)*BlockSize, int64(c.Size()))
}

// Section is a range of a stream in the file that it lies in. It is pinned: until Release
// it is not evicted, and the file stays open. The zero Section is empty.
type Section struct {
	stream *Stream
	file   *dataFile
	token  uint64
	off, n int64
}

// Section pins the bytes of e, if all of them are on disk and the file can be sent from.
// It refuses what is only in memory, and all of a cache that does not use the page cache:
// see LoadRange.
func (s *Stream) Section(e Extent) (x Section, ok bool) {
	if e.Len() <= 0 || e.Check(s.size()) != nil || s.prepare() != nil {
		return Section{}, false
	}
	f, token := s.pin(e.Start, e.Len())
	if f == nil {
		return Section{}, false
	}
	if f.direct != nil || f.f.Descriptor() < 0 {
		s.Unpin(token)
		return Section{}, false
	}
	return Section{s, f, token, e.Start, e.Len()}, true
}

// Len is the number of bytes in the section.
func (x *Section) Len() int64 { return x.n }

// InMemory reports whether no byte of the section has to be read from the disk.
func (x *Section) InMemory() bool { return x.n > 0 && x.file.inMemory(x.off, x.n) }

// SendTo sends n bytes of the section, from off on, to a socket, and returns how many it
// has sent: as many as the socket takes at once. It may wait for the disk. For a
// non-blocking socket that takes none it fails with unix.EAGAIN. If the file was cut short,
// or cannot be read, it fails and the chunks are absent from then on.
func (x *Section) SendTo(socket int, off, n int64) (sent int64, err error) {
	if off < 0 || n <= 0 || n > x.n-off {
		return 0, io.EOF
	}
	at := x.off + off
	for {
		m, err := unix.Sendfile(socket, x.file.f.Descriptor(), &at, int(n))
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EIO:
			x.stream.Damaged(x.token)
			return 0, err
		case err != nil:
			return 0, err
		case m == 0:
			x.stream.Damaged(x.token)
			return 0, io.ErrUnexpectedEOF
		}
		return int64(m), nil
	}
}

// Intact reports whether what was sent is what was stored. If another program has cut the
// file short and made it longer again, zeros were sent instead.
func (x *Section) Intact() bool { return x.file == nil || x.file.intact() }

// Release unpins the bytes. The section is empty afterwards.
func (x *Section) Release() {
	if x.stream != nil {
		x.stream.Unpin(x.token)
	}
	*x = Section{}
}

// LoadRange returns the bytes of e if all of them are resident, on disk or in memory. It
// may wait for the disk. The caller releases the view, and reads it by CopyTo or CopyMapped.
func (s *Stream) LoadRange(ctx context.Context, e Extent) (v View, ok bool) {
	if e.Len() <= 0 || e.Check(s.size()) != nil {
		return View{}, false
	}
	_ = s.prepare() // where it fails, the bytes may be in memory
	l := new(load)
	if !s.addTo(l, e.Start, e.Len()) {
		l.drop()
		return View{}, false
	}
	return l.wait(ctx)
}
