package flatten

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"log/slog"
	"math"
	"runtime"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// sealTOC makes a TOC blob of a body, with a checksum that is right.
func sealTOC(t testing.TB, body []byte) []byte {
	t.Helper()
	b := append([]byte(tocMagic), 0, 0, 0, 0)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(body, castagnoli))
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	return enc.EncodeAll(append(b, body...), nil)
}

// layOut lays out a tree and checks the file system, as far as it is one. The
// streams of layers need not exist for that.
func layOut(t testing.TB, tr *tree, streams ...blockmap.Table) error {
	t.Helper()
	b := &builder{}
	b.src = &Source{}
	o := b.ext4Options()
	o.Plan = tr.plan
	fs, err := ext4.Layout(tr.inodes(), o)
	if err != nil {
		return err
	}
	c, err := newCompressor(MinChunkSize, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	var meta bytes.Buffer
	p := newStreamWriter(t.Context(), c, io.Discard)
	table, err := p.finish(fs.WriteMeta(io.MultiWriter(p, &meta)))
	if err != nil {
		t.Fatal(err)
	}
	ix := &blockmap.Index{Blocks: fs.Blocks(), Runs: fs.Runs(), Streams: append([]blockmap.Table{*table}, streams...)}
	if err := ix.Seal(); err != nil {
		t.Fatalf("the index: %v", err)
	}
	if err := checkRuns(ix, len(ix.Streams)); err != nil {
		t.Fatalf("the index: %v", err)
	}
	if err := ext4.Check(&metadata{ix, bytes.NewReader(meta.Bytes()), map[uint32]int64{0: 0}}, int64(ix.Blocks)*blockSize); err != nil {
		t.Fatalf("what was laid out is no file system: %v", err)
	}
	return nil
}

// FuzzTOC reads TOCs that nothing is known of, and builds from those that can be
// read.
func FuzzTOC(f *testing.F) {
	for _, tars := range fuzzTars(f) {
		var b bytes.Buffer
		_, toc, err := convertPlain(f, tars, &b)
		if err != nil {
			continue
		}
		dec, err := zstd.NewReader(nil)
		if err != nil {
			f.Fatal(err)
		}
		body, err := dec.DecodeAll(toc, nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body[12:])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if _, err := openTOC(body, math.MaxInt64); err == nil && len(body) < 12 {
			t.Fatal("nothing was read as a TOC")
		}
		blob := sealTOC(t, body)
		toc, err := openTOC(blob, math.MaxInt64)
		if err != nil {
			if !errors.Is(err, blockmap.ErrCorrupt) {
				t.Fatalf("%v is not ErrCorrupt", err)
			}
			return
		}
		// What can be read is written the same, and builds or fails.
		var w tocWriter
		for {
			e, err := toc.read()
			if err == io.EOF {
				break
			}
			if err != nil {
				if !errors.Is(err, blockmap.ErrCorrupt) {
					t.Fatalf("%v is not ErrCorrupt", err)
				}
				return
			}
			w.add(e)
		}
		again, err := w.close(&toc.table)
		if err != nil {
			t.Fatal(err)
		}
		tr := newTree()
		if err := tr.applyLayer(t.Context(), again, 1, math.MaxInt64); err != nil {
			return
		}
		_ = layOut(t, tr, toc.table) // which fails the test where it must
	})
}

// convertTime is more than a layer of fuzzTars takes on a busy machine.
const convertTime = 5 * time.Second

// convertPlain converts a layer that is whatever it is: its digest is right.
func convertPlain(t testing.TB, layer []byte, out io.Writer) (*blockmap.Table, []byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), convertTime) // a header can ask for 16 TiB of hole
	defer cancel()
	r, err := decompress(ctx, bytes.NewReader(layer), semaphore.NewWeighted(blockmap.MaxWindow))
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(r, 64<<20)); err != nil {
		return nil, nil, err
	}
	c, err := newCompressor(MinChunkSize, 1, runtime.GOMAXPROCS(0))
	if err != nil {
		t.Fatal(err)
	}
	f, toc, err := newConverter(slog.New(slog.DiscardHandler)).convert(ctx, bytes.NewReader(layer), blockmap.Digest(h.Sum(nil)), newStreamWriter(ctx, c, out))
	if err != nil {
		return nil, nil, err
	}
	return f.Table, toc, nil
}

// fuzzTars are layers of all sorts, small ones.
func fuzzTars(t testing.TB) [][]byte {
	t.Helper()
	tars := [][]byte{nil, make([]byte, 1024), gzipped(t, make([]byte, 1024))}
	for _, set := range [][]treeCase{layerCases, nameCases, metadataCases} {
		for _, c := range set {
			if c.name == "the same layer twice" || c.name == "a directory whose index has two levels" || c.name == "over 4 GiB" || c.name == "contents" {
				continue
			}
			for _, b := range c.layers(t) {
				if len(b) < 50_000 {
					tars = append(tars, b)
				}
			}
		}
	}
	small := tarball(t, dir("d"), reg("d/f", "content"), hardlink("g", "d/f"))
	return append(tars, gzipped(t, small), zstdded(t, small), inParts(gzipped)(t, small),
		tarball(t, raw(headerBlock('S', "sparse", 5, map[int]string{386: "00000000003\x0000000000002\x00", 483: "00000100000\x00"}), padded("hello"))))
}

// FuzzLayer puts one layer, whatever it is, over another, and lays out what
// comes of it: an error or a sound file system.
func FuzzLayer(f *testing.F) {
	for _, b := range fuzzTars(f) {
		f.Add(b)
	}
	lower := tarball(f, dir("d"), reg("d/f", "lower"), symlink("l", "d"), symlink("up", "../l/.."), hardlink("h", "d/f"), dir("d/e"), reg("d/e/g", "x"), fifo("p"))
	_, lowerTOC, err := convertPlain(f, lower, io.Discard)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, layer []byte) {
		var out bytes.Buffer
		table, toc, err := convertPlain(t, layer, &out)
		if err != nil {
			return
		}
		if int64(out.Len()) != table.BlobSize || sha256.Sum256(out.Bytes()) != table.Blob {
			t.Fatal("the table is not that of the blob")
		}
		tr := newTree()
		if err := tr.applyLayer(t.Context(), lowerTOC, 1, math.MaxInt64); err != nil {
			t.Fatal(err)
		}
		if err := tr.applyLayer(t.Context(), toc, 2, math.MaxInt64); err != nil {
			return
		}
		lower, err := openTOC(lowerTOC, math.MaxInt64)
		if err != nil {
			t.Fatal(err)
		}
		_ = layOut(t, tr, lower.table, *table) // which fails the test where it must
	})
}
