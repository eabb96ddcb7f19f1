package flatten

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// packed is a stream that was made of files.
type packed struct {
	blob    []byte
	content []byte // as the zstd tool has it, or the library where that is not installed
	table   *blockmap.Table
	runs    map[string][]ext4.Run
}

// named is a file to pack.
type named struct{ name, content string }

func pack(t testing.TB, chunkSize int, files []named) *packed {
	t.Helper()
	c, err := newCompressor(chunkSize, 1, 3)
	if err != nil {
		t.Fatal(err)
	}
	r := &packed{runs: make(map[string][]ext4.Run)}
	var out bytes.Buffer
	p := newPacker(newStreamWriter(t.Context(), c, &out))
	for _, f := range files {
		if r.runs[f.name], err = p.file(strings.NewReader(f.content), int64(len(f.content))); err != nil {
			t.Fatal(err)
		}
	}
	if r.table, err = p.finish(nil); err != nil {
		t.Fatal(err)
	}
	r.blob = out.Bytes()
	dst := newTarget(t)
	if err := os.WriteFile(dst.path("blobs", r.table.Blob.String()), r.blob, 0o644); err != nil {
		t.Fatal(err)
	}
	f := unpackStream(t, r.table, dst)
	defer f.Close()
	if r.content, err = io.ReadAll(f); err != nil {
		t.Fatal(err)
	}
	return r
}

// file reads a file back from where its runs say. What lies behind its end must
// be zeros, since a mapping of the file shows it.
func (r *packed) file(t testing.TB, f named) string {
	t.Helper()
	b := make([]byte, (len(f.content)+blockSize-1)/blockSize*blockSize)
	for _, run := range r.runs[f.name] {
		n := copy(b[run.FileBlock*blockSize:], r.content[run.Block*blockSize:][:run.Count*blockSize])
		if n != int(run.Count*blockSize) {
			t.Errorf("%q: run %v is beyond the file's end", f.name, run)
		}
	}
	if tail := b[len(f.content):]; len(bytes.Trim(tail, "\x00")) > 0 {
		t.Errorf("%q: behind its end there are not only zeros", f.name)
	}
	return string(b[:len(f.content)])
}

// digests are those of the chunks that hold a file.
func (r *packed) digests(name string) (l []blockmap.Digest) {
	for _, run := range r.runs[name] {
		for _, c := range r.table.Chunks {
			if c.Block < run.Block+run.Count && run.Block < c.Block+c.Count && (len(l) == 0 || l[len(l)-1] != c.Digest) {
				l = append(l, c.Digest)
			}
		}
	}
	return l
}

// randomFiles are of all sizes, with zeros here and there.
func randomFiles(rng *rand.Rand, n int) (files []named) {
	for i := range n {
		var b strings.Builder
		for range rng.IntN(5) {
			size := int(1) << rng.IntN(19)
			size += rng.IntN(size)
			if rng.IntN(3) == 0 {
				b.WriteString(strings.Repeat("\x00", size))
			} else {
				b.WriteString(noise(rng.Uint64(), size))
			}
		}
		files = append(files, named{fmt.Sprint(i), b.String()})
	}
	return files
}

// TestPack packs random files and reads them back, from chunks of every size.
func TestPack(t *testing.T) {
	for size := MinChunkSize; size <= MaxChunkSize; size *= 4 {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(uint64(size), 0))
			files := randomFiles(rng, 60)
			r := pack(t, size, files)
			for _, f := range files {
				if r.file(t, f) != f.content {
					t.Errorf("%q does not come back", f.name)
				}
				for i := 1; i < len(r.runs[f.name]); i++ {
					a, b := r.runs[f.name][i-1], r.runs[f.name][i]
					if a.FileBlock+a.Count == b.FileBlock && a.Block+a.Count == b.Block {
						t.Errorf("%q: runs %v and %v are one", f.name, a, b)
					}
				}
			}
			r.checkBlob(t, size)
		})
	}
}

// checkBlob holds a stream's blob against the zstd seekable format, and against
// what the zstd tool makes of it.
func (r *packed) checkBlob(t *testing.T, chunkSize int) {
	t.Helper()
	b := r.blob
	if int64(len(b)) != r.table.BlobSize {
		t.Errorf("a blob of %d bytes, and %d in the table", len(b), r.table.BlobSize)
	}
	foot := b[len(b)-9:]
	if binary.LittleEndian.Uint32(foot[5:]) != 0x8F92EAB1 || foot[4] != 0 {
		t.Fatalf("the blob ends in % x", foot)
	}
	n := int(binary.LittleEndian.Uint32(foot))
	table := b[len(b)-9-8*n-8:]
	if n != len(r.table.Chunks) || binary.LittleEndian.Uint32(table) != 0x184D2A5E || int(binary.LittleEndian.Uint32(table[4:])) != 8*n+9 {
		t.Fatalf("a seek table of %d entries for %d chunks, headed % x", n, len(r.table.Chunks), table[:8])
	}
	var at int64
	var block uint32
	for i, c := range r.table.Chunks {
		entry := table[8+8*i:]
		stored, size := binary.LittleEndian.Uint32(entry), binary.LittleEndian.Uint32(entry[4:])
		if stored != c.Stored || int(size) != c.Size() || c.Offset != at || c.Block != block {
			t.Errorf("chunk %d: %+v; %d and %d bytes in the seek table, at %d", i, c, stored, size, at)
		}
		if c.Size() > chunkSize || c.Count == 0 {
			t.Errorf("chunk %d has %d bytes", i, c.Size())
		}
		at, block = at+int64(stored), block+c.Count
	}
	if at != int64(len(b)-len(table)) {
		t.Errorf("the chunks end at %d, the seek table begins at %d", at, len(b)-len(table))
	}
	need(t, "zstd")
	path := filepath.Join(t.TempDir(), "blob.zst")
	writeFile(t, path, b)
	run(t, "zstd", "-q", "-t", path)
	if out := pipe(t, b, "zstd", "-dc"); !bytes.Equal(out, r.content) {
		t.Errorf("zstd -d gives %d bytes that are not the %d of the stream", len(out), len(r.content))
	}
}

// testChunk is small enough for many chunks of little content.
const testChunk = 256 << 10

// TestEmptyStream packs nothing that has content.
func TestEmptyStream(t *testing.T) {
	r := pack(t, testChunk, []named{{"empty", ""}, {"zeros", strings.Repeat("\x00", 1<<20+5)}})
	if len(r.table.Chunks) != 0 || len(r.runs["empty"])+len(r.runs["zeros"]) != 0 {
		t.Errorf("%d chunks, runs %v", len(r.table.Chunks), r.runs)
	}
}

// TestSameFileSameChunks packs a large file among others of two kinds.
func TestSameFileSameChunks(t *testing.T) {
	for _, size := range []int{testChunk, testChunk + 1, 5*testChunk - 1, 1_000_003} {
		file := named{"the file", noise(7, size)}
		a := pack(t, testChunk, []named{{"x", noise(1, 5000)}, {"y", noise(2, 70_000)}, file, {"z", noise(3, 100)}})
		b := pack(t, testChunk, []named{file, {"other", noise(4, 600_000)}})
		if got, want := a.digests("the file"), b.digests("the file"); fmt.Sprint(got) != fmt.Sprint(want) || len(got) != (size+testChunk-1)/testChunk {
			t.Errorf("%d bytes: chunks %v and %v", size, got, want)
		}
	}
	// A change in place changes the chunk that it is in.
	content := noise(7, 5*testChunk)
	a := pack(t, testChunk, []named{{"f", content}}).digests("f")
	b := pack(t, testChunk, []named{{"f", content[:2*testChunk] + "!" + content[2*testChunk+1:]}}).digests("f")
	for i := range a {
		if (a[i] == b[i]) == (i == 2) {
			t.Errorf("chunk %d: same is %v", i, a[i] == b[i])
		}
	}
}

// TestChunksFallIntoStep changes, adds and removes one small file of many.
func TestChunksFallIntoStep(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	var files []named
	for i := range 3000 {
		files = append(files, named{fmt.Sprint(i), noise(uint64(i), rng.IntN(12_000))})
	}
	base := pack(t, testChunk, files)
	old := make(map[blockmap.Digest]bool)
	for _, c := range base.table.Chunks {
		old[c.Digest] = true
	}
	for name, changed := range map[string][]named{
		"one more at the front":   append([]named{{"new", noise(1<<40, 4000)}}, files...),
		"one less at the front":   files[1:],
		"one larger at the front": append([]named{{"0", noise(0, 20_000)}}, files[1:]...),
	} {
		r := pack(t, testChunk, changed)
		shared := 0
		for _, c := range r.table.Chunks {
			if old[c.Digest] {
				shared++
			}
		}
		t.Logf("%s: %d of %d chunks are the same", name, shared, len(r.table.Chunks))
		if shared < len(r.table.Chunks)*9/10 {
			t.Errorf("%s: %d of %d chunks are the same", name, shared, len(r.table.Chunks))
		}
	}
	// Packs are not to be much smaller for it.
	if mean := len(base.content) / len(base.table.Chunks); mean < testChunk/2 {
		t.Errorf("chunks of %d bytes in the mean", mean)
	}
}

// TestEmptyFilesEndNoPack puts an empty file behind every small one, which must
// change no chunk.
func TestEmptyFilesEndNoPack(t *testing.T) {
	var files, more []named
	for i := range 500 {
		f := named{fmt.Sprint(i), noise(uint64(i), 5000)}
		files = append(files, f)
		more = append(more, f, named{fmt.Sprint("empty ", i), ""})
	}
	a, b := pack(t, testChunk, files), pack(t, testChunk, more)
	if !bytes.Equal(a.blob, b.blob) {
		t.Errorf("%d chunks, and %d with empty files between", len(a.table.Chunks), len(b.table.Chunks))
	}
}

type failingWriter struct{ after int }

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.after -= len(b); w.after < 0 {
		return 0, errPush
	}
	return len(b), nil
}

// TestPackFails fails at writes here and there, and at reads.
func TestPackFails(t *testing.T) {
	c, err := newCompressor(MinChunkSize, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, after := range []int{0, 1, 100_000, 300_000, 500_000 + 100} {
		p := newPacker(newStreamWriter(t.Context(), c, &failingWriter{after}))
		_, err := p.file(strings.NewReader(noise(1, 500_000)), 500_000)
		if _, err = p.finish(err); err != errPush {
			t.Errorf("failing after %d bytes: %v", after, err)
		}
	}
	p := newPacker(newStreamWriter(t.Context(), c, io.Discard))
	_, err = p.file(strings.NewReader("short"), 100_000)
	if _, err = p.finish(err); err != io.ErrUnexpectedEOF {
		t.Errorf("a short file: %v", err)
	}
	if n := len(c.slots) + len(c.unwritten); n != 0 {
		t.Errorf("%d slots are still taken", n)
	}
}

// TestTinyFiles packs files of 2 KB: a chunk has few of them, most chunks are the same
// after a change at the front, and files of some KB still fill chunks.
func TestTinyFiles(t *testing.T) {
	var tiny, usual []named
	for i := range 4000 {
		tiny = append(tiny, named{fmt.Sprint(i), noise(uint64(i), 2000)})
	}
	for i := range 400 {
		usual = append(usual, named{fmt.Sprint(i), noise(uint64(i), 20_000)})
	}
	base := pack(t, DefaultChunkSize, tiny)
	old := make(map[blockmap.Digest]bool)
	for _, c := range base.table.Chunks {
		old[c.Digest] = true
		if c.Count > packTiny {
			t.Errorf("a chunk has %d files", c.Count)
		}
	}
	if mean := len(tiny) / len(base.table.Chunks); mean < packTiny/2 {
		t.Errorf("chunks of %d files in the mean", mean)
	}
	r := pack(t, DefaultChunkSize, append([]named{{"new", "new"}}, tiny...))
	shared := 0
	for _, c := range r.table.Chunks {
		if old[c.Digest] {
			shared++
		}
	}
	if shared < len(r.table.Chunks)*9/10 {
		t.Errorf("%d of %d chunks are the same", shared, len(r.table.Chunks))
	}
	if r := pack(t, DefaultChunkSize, usual); len(r.content)/len(r.table.Chunks) < DefaultChunkSize/2 {
		t.Errorf("files of 20 KB: %d chunks for %d bytes", len(r.table.Chunks), len(r.content))
	}
}
