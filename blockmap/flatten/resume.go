package flatten

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// What an interrupted build has done for a large layer stays in the temporary directory,
// also after kill -9, and the next build goes on from there:
//
//	layer-DIGEST   the first bytes of the layer as it is stored, as they were downloaded
//	stream-TAG     the stream of a layer that was converted and not pushed yet
//	toc-TAG        the SHA-256 digest of its TOC, and the TOC; written first
//
// TAG is the tag of the conversion, which names all that it depends on. The digests are
// checked before anything is used. A directory with such files is left when a build
// fails, for a day; the next build that uses the same place for temporary files takes
// them over.
const (
	partPrefix   = "layer-"
	streamPrefix = "stream-thaw-layer-"
	tocPrefix    = "toc-thaw-layer-"

	// resumeLeast is the size from which on the work for a layer is worth keeping.
	resumeLeast = 16 << 20
	// resumeFor is how long it is kept.
	resumeFor = 24 * time.Hour
)

// worthKeeping says whether a file of the temporary directory helps a later build.
func worthKeeping(name string, info os.FileInfo) bool {
	named := strings.HasPrefix(name, partPrefix) || strings.HasPrefix(name, streamPrefix) || strings.HasPrefix(name, tocPrefix)
	return named && info.Mode().IsRegular() && time.Since(info.ModTime()) < resumeFor
}

// useful are the files of a temporary directory that help a later build.
func useful(dir string) (names []string, bytes int64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && worthKeeping(e.Name(), info) {
			names = append(names, e.Name())
			bytes += info.Size()
		}
	}
	return names, bytes
}

// salvage takes over the useful files of a directory that a killed or failed build left.
// A file that is here already is the one to keep.
func (t *tempDir) salvage(dir string) {
	names, _ := useful(dir)
	for _, name := range names {
		to := filepath.Join(t.path, name)
		if _, err := os.Lstat(to); errors.Is(err, os.ErrNotExist) {
			_ = os.Rename(filepath.Join(dir, name), to) // or the work is done again
		}
	}
}

// finish gives a converted stream a name by which a later build finds it.
func (t *tempDir) finish(tag string, f *StreamFile, toc []byte) error {
	sum := sha256.Sum256(toc)
	if err := os.WriteFile(filepath.Join(t.path, "toc-"+tag), append(sum[:], toc...), 0o600); err != nil {
		return err
	}
	path := filepath.Join(t.path, "stream-"+tag)
	if err := os.Rename(f.file.Name(), path); err != nil {
		return err
	}
	f.file.path = path
	return nil
}

// finished returns the conversion that an earlier build has finished, or nil.
func (t *tempDir) finished(ctx context.Context, tag string) (*StreamFile, []byte) {
	raw, err := os.ReadFile(filepath.Join(t.path, "toc-"+tag))
	if err != nil || len(raw) < sha256.Size {
		return nil, nil
	}
	toc := raw[sha256.Size:]
	f, err := os.OpenFile(filepath.Join(t.path, "stream-"+tag), os.O_RDWR, 0)
	if err != nil {
		return nil, nil
	}
	file := &tempFile{File: f, dir: t, path: f.Name()}
	h := sha256.New()
	if file.size, err = io.Copy(h, ctxReader{ctx, f}); err == nil && sha256.Sum256(toc) == [sha256.Size]byte(raw) {
		d := v1.Descriptor{Size: file.size, Digest: hashOf(blockmap.Digest(h.Sum(nil)))}
		c := &converted{toc: toc, stream: &d}
		if err = c.check(ctx); err == nil {
			return &StreamFile{Table: c.table, file: file}, toc
		}
	}
	if ctx.Err() != nil {
		f.Close()
		return nil, nil
	}
	file.discard() // a power cut, or a full disk
	t.forget(tag)
	return nil, nil
}

// forget removes what finish has written, apart from the stream.
func (t *tempDir) forget(tag string) { os.Remove(filepath.Join(t.path, "toc-"+tag)) }

// ctxReader fails when its context has ended.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// part is the beginning of a layer on disk, which grows as the layer is read.
type part struct {
	io.ReadCloser
	dir  *tempDir
	file *os.File

	mu    sync.Mutex
	ended bool // it does not grow any more
}

// cutOff is the error of a layer whose source has failed before its end: what was read
// until then is good, as far as is known.
type cutOff struct{ error }

func (e cutOff) Unwrap() error { return e.error }

func newPart(rc io.ReadCloser, file *os.File, dir *tempDir) *part {
	p := &part{ReadCloser: rc, dir: dir, file: file}
	dir.mu.Lock()
	defer dir.mu.Unlock()
	dir.parts[p] = true
	return p
}

// drop gives up what was kept of the layer: the disk is full, and the streams need the
// room more. The layer is read on without.
func (p *part) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		p.ended = true
		_ = p.file.Truncate(0)
	}
}

// openLayer opens a layer. It goes on with what an earlier build has read of a large one,
// and keeps what this one reads.
func (b *builder) openLayer(ctx context.Context, i int) (io.ReadCloser, error) {
	l := &b.src.Layers[i]
	if l.OpenFrom == nil || l.Size < resumeLeast {
		return l.Open(ctx)
	}
	f, err := os.OpenFile(b.partPath(i), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return l.Open(ctx)
	}
	rc, err := b.resumed(ctx, l, f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return rc, nil
}

func (b *builder) resumed(ctx context.Context, l *Layer, f *os.File) (io.ReadCloser, error) {
	n, err := f.Seek(0, io.SeekEnd)
	if err == nil && n > 0 && n <= l.Size {
		var rest io.ReadCloser
		if rest, err = l.OpenFrom(ctx, n, io.NewSectionReader(f, 0, n)); err == nil {
			b.Log.Info("going on with the download of a layer", "layer", l.Digest.String(), "bytes", n)
			p := newPart(rest, f, b.streams.temp)
			return struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.NewSectionReader(f, 0, n), p), p}, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	rc, err := l.Open(ctx)
	if err != nil {
		return nil, err
	}
	_, err = f.Seek(0, io.SeekStart)
	if err = errors.Join(err, f.Truncate(0)); err != nil {
		return nil, errors.Join(err, rc.Close())
	}
	return newPart(rc, f, b.streams.temp), nil
}

func (p *part) Read(b []byte) (int, error) {
	n, err := p.ReadCloser.Read(b)
	if n > 0 && !p.write(b[:n]) {
		p.drop()
	}
	if err != nil && err != io.EOF && !errors.Is(err, blockmap.ErrDigest) {
		err = cutOff{err}
	}
	return n, err
}

func (p *part) write(b []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return true
	}
	_, err := p.file.Write(b)
	return err == nil
}

func (p *part) Close() error {
	p.dir.mu.Lock()
	delete(p.dir.parts, p)
	p.dir.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	return errors.Join(p.ReadCloser.Close(), p.file.Close())
}

func (b *builder) partPath(i int) string {
	return filepath.Join(b.streams.temp.path, partPrefix+b.src.Layers[i].Digest.Hex)
}

// dropPart removes what was kept of a layer as it is stored.
func (b *builder) dropPart(i int) { os.Remove(b.partPath(i)) }

// hasPart says whether a layer was read from its beginning on disk.
func (b *builder) hasPart(i int) bool {
	info, err := os.Stat(b.partPath(i))
	return err == nil && info.Size() > 0
}

// obtain returns the stream and the TOC of a layer: what an earlier build has finished, or
// the layer is read.
func (b *builder) obtain(ctx context.Context, i int) (*StreamFile, []byte, error) {
	tag := b.layerTag(i)
	if f, toc := b.streams.temp.finished(ctx, tag); f != nil {
		b.Log.Info("an interrupted build has converted the layer", "layer", b.src.Layers[i].Digest.String(), "bytes", f.Table.BlobSize)
		return f, toc, nil
	}
	resumed := b.hasPart(i)
	f, toc, err := b.read(ctx, i)
	if _, cut := errors.AsType[cutOff](err); err != nil && !cut && resumed && ctx.Err() == nil {
		// What was on disk may be damaged.
		b.Log.Warn("cannot go on with what an interrupted build has read of the layer: reading it again", "layer", b.src.Layers[i].Digest.String(), "err", err)
		b.dropPart(i)
		f, toc, err = b.read(ctx, i)
	}
	if err != nil {
		return nil, nil, err
	}
	if f.Table.BlobSize >= resumeLeast {
		if err := b.streams.temp.finish(tag, f, toc); err != nil {
			b.Log.Debug("cannot keep the converted layer for a later build", "err", err)
		}
	}
	b.dropPart(i)
	return f, toc, nil
}

// left is a sentence about what the temporary directory keeps, or nothing.
func (t *tempDir) left() string {
	names, n := useful(t.path)
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("%d MiB of what it has read and converted are kept in %s for a day, and the next build goes on from there", (n+1<<20-1)>>20, t.path)
}
