package flatten

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Streams makes streams. The streams that are written at once share its
// compressors and its temporary directory.
type Streams struct {
	*compressor
	temp *tempDir
}

// NewStreams makes the temporary directory below dir ("": the system's) and takes
// the leftovers of killed builds from there. Chunks of chunkSize bytes are
// compressed at a zstd level from 1 to 22. The caller closes the Streams.
func NewStreams(dir string, chunkSize, level int) (*Streams, error) {
	if err := CheckChunkSize(chunkSize); err != nil {
		return nil, err
	}
	c, err := newCompressor(chunkSize, level, runtime.GOMAXPROCS(0))
	if err != nil {
		return nil, err
	}
	temp, err := newTempDir(dir)
	if err != nil {
		return nil, err
	}
	return &Streams{c, temp}, nil
}

// Close removes the temporary directory with every stream that is still in it.
// Nothing writes or pushes a stream any more.
func (s *Streams) Close() error { return s.temp.remove() }

// Create begins a stream in a temporary file. The caller ends it by Close or by
// Abort.
func (s *Streams) Create(ctx context.Context) (*StreamWriter, error) {
	f, err := s.temp.create()
	if err != nil {
		return nil, err
	}
	w := newStreamWriter(ctx, s.compressor, f)
	w.file = f
	return w, nil
}

// StreamWriter writes one stream: it cuts the bytes that it is given into chunks,
// has several compressed at once, and writes them in order.
//
// The blob of a stream is the chunks' zstd frames and a seek table, as the zstd
// seekable format has it (contrib/seekable_format of zstd): a skippable frame that
// lists the frames before it.
//
//	0  4  0x184D2A5E, little-endian as all that follows
//	4  4  length of the rest
//	8     for each chunk: 4 bytes compressed length, 4 bytes content length
//	..  4  number of chunks
//	..  1  0: no checksums
//	..  4  0x8F92EAB1
type StreamWriter struct {
	ctx  context.Context
	c    *compressor
	w    io.Writer
	file *tempFile // w, where the stream is one of Streams

	chunk *[]byte // being filled
	block uint32  // of the stream, where chunk begins

	// pending holds the chunks that are not written yet, in stream order.
	pending chan *compressed
	done    chan struct{} // closed when all of pending has been written
	err     error         // of writing; readable once done or failed is closed
	failed  chan struct{} // closed when err is set
	table   blockmap.Table
	sha     hash.Hash
	seek    []byte
}

type compressed struct {
	count  uint32
	digest blockmap.Digest
	frame  *[]byte
	buf    *[]byte
	err    error
	ready  chan struct{}
}

// newStreamWriter begins a stream that is written to w. finish ends it, in any
// case.
func newStreamWriter(ctx context.Context, c *compressor, w io.Writer) *StreamWriter {
	s := &StreamWriter{
		ctx: ctx, c: c, w: w, sha: sha256.New(),
		pending: make(chan *compressed, cap(c.unwritten)),
		done:    make(chan struct{}),
		failed:  make(chan struct{}),
	}
	s.chunk = c.bufs.Get().(*[]byte)
	go s.write()
	return s
}

// Write adds bytes to the stream. A chunk ends where it is full, or at Cut.
func (s *StreamWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		m := min(len(b), s.c.size-len(*s.chunk))
		*s.chunk = append(*s.chunk, b[:m]...)
		b = b[m:]
		if len(*s.chunk) == s.c.size {
			if err := s.Cut(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// Blocks is the length of the stream so far. The bytes written so far must be
// whole blocks.
func (s *StreamWriter) Blocks() uint32 { return s.block + uint32(len(*s.chunk)/blockSize) }

// Cut ends the chunk here, if it is not empty. The chunk must be whole blocks.
func (s *StreamWriter) Cut() error {
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	n := len(*s.chunk)
	if n == 0 {
		return nil
	}
	if n%blockSize != 0 {
		return fmt.Errorf("a stream of whole blocks ends within a block, after %d bytes", int64(s.block)*blockSize+int64(n))
	}
	x := &compressed{count: uint32(n / blockSize), buf: s.chunk, ready: make(chan struct{})}
	if int64(s.block)+int64(x.count) > 1<<32-1 {
		return errors.New("a stream of more than 16 TiB")
	}
	// A chunk only waits for earlier chunks of its own stream, so the earliest one
	// of all always goes on.
	select {
	case s.c.unwritten <- struct{}{}:
	case <-s.failed:
		return s.err
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
	go s.c.compress(x)
	// Only this goroutine sends, so the order is that of the stream. write
	// receives until pending is closed.
	s.pending <- x
	s.block += x.count
	s.chunk = s.c.bufs.Get().(*[]byte)
	return nil
}

func (s *StreamWriter) write() {
	defer close(s.done)
	for x := range s.pending {
		<-x.ready
		if s.err == nil {
			if err := s.add(x); err != nil {
				s.err = err
				close(s.failed)
			}
		}
		if x.frame != nil {
			s.c.frames.Put(x.frame)
		}
		<-s.c.unwritten
	}
}

func (s *StreamWriter) add(x *compressed) (err error) {
	defer recovered(&err)
	if x.err != nil {
		return x.err
	}
	stored := uint32(len(*x.frame))
	s.table.Chunks = append(s.table.Chunks, blockmap.Chunk{
		Digest: x.digest, Offset: s.table.BlobSize, Stored: stored,
		Block: s.table.Blocks(), Count: x.count,
	})
	s.seek = binary.LittleEndian.AppendUint32(s.seek, stored)
	s.seek = binary.LittleEndian.AppendUint32(s.seek, x.count*blockSize)
	return s.put(*x.frame)
}

func (s *StreamWriter) put(b []byte) error {
	s.sha.Write(b)
	s.table.BlobSize += int64(len(b))
	_, err := s.w.Write(b)
	return err
}

// finish ends the stream and returns its chunk table. With a cause, the rest of
// the stream is thrown away and finish fails with it.
func (s *StreamWriter) finish(cause error) (*blockmap.Table, error) {
	if cause == nil {
		cause = s.Cut()
	}
	close(s.pending)
	<-s.done
	if cause == nil {
		cause = s.err
	}
	if cause == nil {
		n := len(s.seek)
		tail := binary.LittleEndian.AppendUint32(nil, 0x184D2A5E)
		tail = binary.LittleEndian.AppendUint32(tail, uint32(n+9))
		tail = append(tail, s.seek...)
		tail = binary.LittleEndian.AppendUint32(tail, uint32(n/8))
		tail = append(tail, 0)
		tail = binary.LittleEndian.AppendUint32(tail, 0x8F92EAB1)
		cause = s.put(tail)
	}
	if cause != nil {
		return nil, cause
	}
	s.sha.Sum(s.table.Blob[:0])
	return &s.table, nil
}

// Close ends the stream. The caller pushes or discards the StreamFile.
func (s *StreamWriter) Close() (*StreamFile, error) { return s.end(nil) }

// Abort ends the stream and removes its file.
func (s *StreamWriter) Abort() { _, _ = s.end(errors.New("the stream was given up")) }

func (s *StreamWriter) end(cause error) (*StreamFile, error) {
	table, err := s.finish(cause)
	if err != nil {
		s.file.discard()
		return nil, err
	}
	return &StreamFile{Table: table, file: s.file}, nil
}

// StreamFile is a finished stream in a temporary file.
type StreamFile struct {
	Table *blockmap.Table
	file  *tempFile
}

// Push brings the stream to dst. progress hears how many bytes were sent so far,
// from another goroutine.
func (f *StreamFile) Push(ctx context.Context, dst Target, progress func(sent int64)) error {
	return dst.PushFile(ctx, describeBlob(f.Table), f.file.Name(), progress)
}

// release removes the file, unless it has a name by which a later build finds it.
func (f *StreamFile) release() {
	if f.file != nil && f.file.path != "" {
		f.file.Close()
		return
	}
	f.Discard()
}

// Discard removes the file.
func (f *StreamFile) Discard() { f.file.discard() }

// Role says what a stream of a block image holds. The index alone says what the
// device reads as; the role says what the stream is good for: metadata is worth
// prefetching, and a verification holds each role to rules of its own.
type Role string

// The roles of streams.
const (
	RoleMetadata Role = "metadata" // the blocks of the file system itself
	RoleLayer    Role = "layer"    // the contents of the files of one layer of the source image
	RoleOverlay  Role = "overlay"  // blocks that were written to a device of an earlier block image

	// RoleUnknown stands for a role that this version of thaw does not know, and
	// for none.
	RoleUnknown Role = ""
)

// Stream is one stream of a block image.
type Stream struct {
	Role   Role
	DiffID v1.Hash // of the layer, if Role is RoleLayer
	Table  *blockmap.Table
}

// describeBlob is the descriptor of a stream's blob.
func describeBlob(t *blockmap.Table) v1.Descriptor {
	return v1.Descriptor{MediaType: MediaTypeStream, Size: t.BlobSize, Digest: hashOf(t.Blob)}
}

// descriptor is the stream's entry in the manifest of a block image.
func (s *Stream) descriptor() v1.Descriptor {
	d := describeBlob(s.Table)
	d.Annotations = map[string]string{AnnotationRole: string(s.Role)}
	if s.Role == RoleLayer {
		d.Annotations[AnnotationDiffID] = s.DiffID.String()
	}
	return d
}
