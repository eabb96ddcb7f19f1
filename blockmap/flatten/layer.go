package flatten

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"

	"golang.org/x/sync/semaphore"

	"thaw/blockmap"
)

// converter converts layers, several at once.
type converter struct {
	windows *semaphore.Weighted // bytes of memory for the windows of zstd layers
	log     *slog.Logger
}

func newConverter(log *slog.Logger) *converter {
	return &converter{semaphore.NewWeighted(blockmap.MaxWindow), log}
}

// convert reads the tar of a layer, compressed or not, writes the contents of its
// files to the stream s, and ends s. It returns the TOC of the layer. diffID is
// the digest of the uncompressed tar.
func (c *converter) convert(ctx context.Context, r io.Reader, diffID blockmap.Digest, s *StreamWriter) (*StreamFile, []byte, error) {
	var toc tocWriter
	f, err := s.end(c.readLayer(ctx, r, diffID, newPacker(s), &toc))
	if err != nil {
		return nil, nil, err
	}
	blob, err := toc.close(f.Table)
	if err != nil {
		f.Discard()
		return nil, nil, err
	}
	return f, blob, nil
}

func (c *converter) readLayer(ctx context.Context, r io.Reader, diffID blockmap.Digest, p *packer, toc *tocWriter) (err error) {
	defer recovered(&err)
	plain, err := decompress(ctx, r, c.windows)
	if err != nil {
		return err
	}
	defer plain.Close()
	sum := sha256.New()
	err = readTar(ctx, io.TeeReader(plain, hashWriter{sum}), p, toc, maxHoles, c.log)
	if err == nil && blockmap.Digest(sum.Sum(nil)) != diffID {
		err = fmt.Errorf("the layer is not the one that the image config names: its content has digest sha256:%x, not %v", sum.Sum(nil), diffID)
	}
	return err
}

// hashWriter is a hash without its io.StringWriter and the like.
type hashWriter struct{ h hash.Hash }

func (w hashWriter) Write(p []byte) (int, error) { return w.h.Write(p) }

// readTar packs the files of a tar and lists its entries. holes bounds the bytes of
// the holes of its sparse files.
func readTar(ctx context.Context, r io.Reader, p *packer, toc *tocWriter, holes int64, log *slog.Logger) error {
	in := &tally{r: r}
	tr := tar.NewReader(in)
	files := &sparseFile{r: tr, in: in, left: holes, limit: holes}
	drop := dropper(log)
	last := ""
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		switch {
		case err == io.EOF:
			// The digest covers what follows the end mark as well, and
			// compressed layers have their checksum at the very end.
			if _, err := io.Copy(io.Discard, r); err != nil {
				return fmt.Errorf("read the layer to its end: %w", err)
			}
			return nil
		case errors.Is(err, tar.ErrInsecurePath): // clean and the tree see to that
		case err != nil && n == 0:
			return fmt.Errorf("read the first entry of the layer's tar: %w", err)
		case err != nil:
			return fmt.Errorf("read the layer's tar behind entry %d, %s: %w", n, quoted(last), err)
		}
		last = h.Name
		if toc.full() {
			return errTOCLimit
		}
		e, err := fromHeader(h, drop)
		if err == nil && e != nil {
			if e.kind == kindFile && e.inode.Mode&modeType == modeRegular {
				e.inode.Size = h.Size
				e.inode.Data, err = p.file(files.next(), h.Size)
			}
		}
		if err != nil {
			return fmt.Errorf("layer entry %s: %w", quoted(h.Name), err)
		}
		if e != nil {
			toc.add(e)
		}
	}
}
