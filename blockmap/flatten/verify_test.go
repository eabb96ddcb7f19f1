package flatten

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// fakeImage is an image with a fault: its parts can be changed, and their
// digests are made to fit again where that is wanted.
type fakeImage struct {
	t   *testing.T
	m   *Image
	ix  *blockmap.Index
	dst *dirTarget
}

// stream decompresses a stream, has it changed, and puts it in the place of the
// old one: only who knows what it means can tell.
func (f *fakeImage) stream(n int, change func(content []byte)) {
	f.t.Helper()
	in := unpackStream(f.t, &f.ix.Streams[n], f.dst)
	content, err := io.ReadAll(in)
	if err != nil {
		f.t.Fatal(err)
	}
	change(content)
	c, err := newCompressor(DefaultChunkSize, 1, 1)
	if err != nil {
		f.t.Fatal(err)
	}
	var out bytes.Buffer
	p := newStreamWriter(f.t.Context(), c, &out)
	_, err = p.Write(content)
	table, err := p.finish(err)
	if err != nil {
		f.t.Fatal(err)
	}
	for i := range f.m.Layers {
		if d := &f.m.Layers[i]; d.Digest == hashOf(f.ix.Streams[n].Blob) {
			d.Digest, d.Size = hashOf(table.Blob), table.BlobSize
		}
	}
	if err := f.dst.PushBytes(f.t.Context(), describeBlob(table), out.Bytes()); err != nil {
		f.t.Fatal(err)
	}
	f.ix.Streams[n] = *table
	f.seal()
}

func (f *fakeImage) seal() {
	f.t.Helper()
	if err := f.ix.Seal(); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeImage) config(b []byte) {
	f.t.Helper()
	f.m.Config = describe(f.m.Config.MediaType, b)
	if err := f.dst.PushBytes(f.t.Context(), f.m.Config, b); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeImage) change(path string, change func(b []byte) []byte) {
	f.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeImage) blob(n int) string { return f.dst.path("blobs", f.ix.Streams[n].Blob.String()) }

// dataRun is the number of the first run of contents.
func (f *fakeImage) dataRun() int {
	for i, r := range f.ix.Runs {
		if r.Stream != 0 {
			return i
		}
	}
	f.t.Fatal("no run of contents")
	return 0
}

func flip(at float64) func([]byte) []byte {
	return func(b []byte) []byte {
		b[int(at*float64(len(b)-1))] ^= 1
		return b
	}
}

func TestVerifyFinds(t *testing.T) {
	var many []line
	for i := range 300 {
		many = append(many, reg(strings.Repeat("n", i%200+1)+string(rune('a'+i%26)), noise(uint64(i), 3000)))
	}
	src := newSource(t, gzipped,
		tarball(t, append(many, reg("large", noise(1, 900_000)), reg("hidden", noise(2, 5000)), reg("behind", noise(3, 5000)))...),
		tarball(t, whiteout("hidden"), reg("upper", noise(4, 500_000)), reg("attr", "x").with(pax("SCHILY.xattr.user.x", strings.Repeat("x", 500)))))
	whole := newTarget(t)
	res := build(t, src, whole, testOptions)
	for _, c := range []struct {
		name  string
		plant func(f *fakeImage)
		is    error
		says  string
	}{
		{"nothing", func(*fakeImage) {}, nil, ""},
		{"a flipped bit in a blob", func(f *fakeImage) { f.change(f.blob(1), flip(0.5)) }, nil, "stream 1: chunk"},
		{"a flipped bit in the first frame", func(f *fakeImage) { f.change(f.blob(2), flip(0)) }, blockmap.ErrCorrupt, "stream 2: chunk 0"},
		{"a flipped bit in the seek table", func(f *fakeImage) { f.change(f.blob(2), flip(1)) }, blockmap.ErrDigest, "stream 2"},
		{"a flipped bit in the metadata's blob", func(f *fakeImage) { f.change(f.blob(0), flip(0.5)) }, nil, "stream 0"},
		{"a blob that is cut short", func(f *fakeImage) { f.change(f.blob(1), func(b []byte) []byte { return b[:len(b)-5] }) }, blockmap.ErrDigest, "stream 1"},
		{"a blob that is cut within a chunk", func(f *fakeImage) { f.change(f.blob(1), func(b []byte) []byte { return b[:len(b)/2] }) }, nil, "stream 1"},
		{"a blob that is too long", func(f *fakeImage) { f.change(f.blob(1), func(b []byte) []byte { return append(b, 0) }) }, blockmap.ErrDigest, "stream 1"},
		{"a blob that is not there", func(f *fakeImage) {
			if err := os.Remove(f.blob(1)); err != nil {
				f.t.Fatal(err)
			}
		}, os.ErrNotExist, "stream 1"},
		{"two chunks that have changed places in the index", func(f *fakeImage) {
			c := f.ix.Streams[1].Chunks
			c[1].Digest, c[2].Digest = c[2].Digest, c[1].Digest
		}, blockmap.ErrDigest, "stream 1: chunk 1"},
		{"a chunk of another length", func(f *fakeImage) {
			c := f.ix.Streams[1].Chunks
			c[len(c)-1].Count++
		}, blockmap.ErrDigest, "stream 1"},

		// From here on all digests are right.
		{"a superblock with a wrong count", func(f *fakeImage) { f.stream(0, func(b []byte) { b[1024] ^= 1 }) }, nil, "the file system: ext4: "},
		{"a byte of an inode table", func(f *fakeImage) {
			f.stream(0, func(b []byte) {
				at := bytes.Index(b, []byte(strings.Repeat("x", 500)))
				if at < 0 {
					f.t.Fatal("the attribute is not in the metadata")
				}
				b[at] ^= 1
			})
		}, nil, "the file system: ext4: "},
		{"a name in a directory", func(f *fakeImage) {
			f.stream(0, func(b []byte) { b[bytes.Index(b, []byte("behind"))] ^= 1 })
		}, nil, "the file system: ext4: "},
		{"metadata cut short", func(f *fakeImage) {
			r := &f.ix.Runs[f.dataRun()-1]
			r.Count--
			f.seal()
		}, blockmap.ErrCorrupt, "of the metadata is at block"},
		{"the end of the metadata is missing", func(f *fakeImage) {
			for i := range slices.Backward(f.ix.Runs) {
				if r := &f.ix.Runs[i]; r.Stream == 0 {
					if r.Count--; r.Count == 0 {
						f.ix.Runs = slices.Delete(f.ix.Runs, i, i+1)
					}
					break
				}
			}
			f.seal()
		}, blockmap.ErrCorrupt, "blocks of metadata"},
		{"two runs of contents that have changed places", func(f *fakeImage) {
			i := f.dataRun()
			a, b := &f.ix.Runs[i], &f.ix.Runs[i+1]
			if a.Count < 1 || b.Count < 1 {
				f.t.Fatal("empty runs")
			}
			first, second := *a, *b
			*a = blockmap.Run{Device: first.Device, Stream: second.Stream, Block: second.Block, Count: second.Count}
			*b = blockmap.Run{Device: first.Device + second.Count, Stream: first.Stream, Block: first.Block, Count: first.Count}
			f.seal()
		}, blockmap.ErrCorrupt, "behind block"},
		{"a run of contents that is missing", func(f *fakeImage) {
			i := f.dataRun()
			f.ix.Runs = append(f.ix.Runs[:i+1], f.ix.Runs[i+2:]...)
			f.seal()
		}, nil, "the device lacks some of them"},
		{"a run of contents that has moved", func(f *fakeImage) {
			i := f.dataRun()
			r := f.ix.Runs[i]
			f.ix.Runs[i].Count--
			f.ix.Runs = slices.Insert(f.ix.Runs, i+1, blockmap.Run{Device: r.Device + r.Count, Stream: r.Stream, Block: r.Block + r.Count - 1, Count: 1})
			f.seal()
		}, blockmap.ErrCorrupt, "not as far apart"},
		{"two blocks of metadata that have changed places", func(f *fakeImage) {
			r := f.ix.Runs[0]
			f.ix.Runs = append([]blockmap.Run{{Device: r.Device, Block: r.Block + 1, Count: 1}, {Device: r.Device + 1, Block: r.Block, Count: 1},
				{Device: r.Device + 2, Block: r.Block + 2, Count: r.Count - 2}}, f.ix.Runs[1:]...)
			f.seal()
		}, blockmap.ErrCorrupt, "belongs"},
		{"contents in the place of metadata", func(f *fakeImage) {
			f.ix.Runs[0].Stream = 1
			f.seal()
		}, blockmap.ErrCorrupt, "of the metadata is at block"},
		{"a smaller device", func(f *fakeImage) {
			last := f.ix.Runs[len(f.ix.Runs)-1]
			f.ix.Blocks = last.Device + last.Count
			f.seal()
		}, nil, "the file system: ext4: "},

		{"a config that is not there", func(f *fakeImage) { f.m.Config = describe("", []byte("x")) }, os.ErrNotExist, "config"},
		{"a config with a flipped bit", func(f *fakeImage) { f.change(f.dst.path("blobs", f.m.Config.Digest.Hex), flip(0.5)) }, blockmap.ErrDigest, "config"},
		{"a config that is none", func(f *fakeImage) { f.config([]byte("no")) }, blockmap.ErrCorrupt, "config"},
		{"a config of gigabytes", func(f *fakeImage) { f.m.Config.Size = 1 << 32 }, blockmap.ErrCorrupt, "config"},
		{"the config of another image", func(f *fakeImage) {
			f.config(newSource(f.t, plain, tarball(f.t, reg("other", "x"))).Config)
		}, blockmap.ErrCorrupt, "does not list the layer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := &dirTarget{dir: t.TempDir()}
			if err := os.CopyFS(dst.dir, os.DirFS(whole.dir)); err != nil {
				t.Fatal(err)
			}
			f := &fakeImage{t: t, dst: dst}
			f.m, f.ix = readBack(t, res, dst)
			c.plant(f)
			temp := t.TempDir()
			err := Verify(t.Context(), f.m, f.ix, dst.open, FromLayers, temp)
			if c.says == "" {
				if err != nil {
					t.Fatal(err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.says) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("error %v, want one that says %q and is %v", err, c.says, c.is)
			}
			if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
				t.Errorf("left in the temporary directory: %v, %v", left, err)
			}
		})
	}
	if err := Verify(t.Context(), &Image{}, new(blockmap.Index), nil, FromLayers, ""); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("an index of nothing: %v", err)
	}
}

// TestReport looks at what an image shares, with itself and with one reported
// before.
func TestReport(t *testing.T) {
	dst := newTarget(t)
	first := build(t, newSource(t, gzipped, tarball(t, reg("base", noise(1, 1<<20)), reg("hidden", noise(2, 1<<18)))), dst, testOptions)
	second := build(t, newSource(t, gzipped, tarball(t, reg("base", noise(1, 1<<20)), reg("hidden", noise(2, 1<<18))),
		tarball(t, whiteout("hidden"), reg("copy", noise(1, 1<<20)))), dst, testOptions)
	var r Reporter
	m, ix := readBack(t, first, dst)
	got := r.Report(m, ix)
	if len(got) != 2 || got[1].Content != 1<<20+1<<18 || got[1].Live != got[1].Content || got[1].Shared != 0 {
		t.Errorf("%+v", got)
	}
	m, ix = readBack(t, second, dst)
	got = r.Report(m, ix)
	if len(got) != 3 || got[1].Live != 1<<20 || got[1].Shared != got[1].Content || got[2].Shared != 1<<20 {
		t.Errorf("%+v", got)
	}
	var c v1.ConfigFile
	if err := json.Unmarshal(newSource(t, plain, tarball(t, reg("base", noise(1, 1<<20)), reg("hidden", noise(2, 1<<18)))).Config, &c); err != nil {
		t.Fatal(err)
	}
	if got[0].DiffID != "" || got[1].DiffID != c.RootFS.DiffIDs[0].String() {
		t.Errorf("diff IDs %q and %q", got[0].DiffID, got[1].DiffID)
	}
}
