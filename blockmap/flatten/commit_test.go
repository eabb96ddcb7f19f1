package flatten_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
)

// base is a block image in a repository, with an overlay over its device.
type base struct {
	*repo
	flatten.CommitBase
	device  *blockmap.Image
	overlay *blockmap.Overlay
}

// over opens the image under a tag, and makes an overlay over it.
func (r *repo) over(t testing.TB, tag string) *base {
	t.Helper()
	raw, err := r.Tagged(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	m, ix := r.image(t, tag)
	device := r.serve(t, ix)
	o, err := blockmap.OpenEphemeral(t.TempDir(), device, blockmap.OverlayOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	h, size, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	return &base{r, flatten.CommitBase{
		Image: m, Index: ix, Manifest: v1.Descriptor{MediaType: m.MediaType, Size: size, Digest: h}, Name: "registry.example/app@" + h.String(),
		Device: device, Place: r, Here: true,
	}, device, o}
}

func (b *base) write(t testing.TB, block uint32, p []byte) {
	t.Helper()
	if err := b.overlay.WriteAt(t.Context(), p, int64(block)*blockmap.BlockSize); err != nil {
		t.Fatal(err)
	}
}

// content reads a device.
func content(t testing.TB, d blockmap.Device) []byte {
	t.Helper()
	p, err := blocktest.Read(t.Context(), d, blockmap.Range(0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// blocksOf are blocks of a device.
func blocksOf(t testing.TB, d blockmap.Device, block, count uint32) []byte {
	t.Helper()
	p, err := blocktest.Read(t.Context(), d, blockmap.Range(int64(block)*blockmap.BlockSize, int64(count)*blockmap.BlockSize))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (b *base) commit(t testing.TB, dst flatten.Target, tag string) *flatten.Committed {
	t.Helper()
	c, err := flatten.Commit(t.Context(), b.overlay, b.CommitBase, dst, flatten.CommitOptions{ChunkSize: 64 << 10, TempDir: t.TempDir(), Tag: tag})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wholeChunks are the device blocks of chunks that lie on the device in one piece.
func wholeChunks(ix *blockmap.Index, stream uint32) (at [][2]uint32) {
	for _, r := range ix.Runs {
		if r.Stream != stream {
			continue
		}
		for _, c := range ix.Streams[stream].Chunks {
			if c.Block >= r.Block && c.Block+c.Count <= r.Block+r.Count {
				at = append(at, [2]uint32{r.Device + c.Block - r.Block, c.Count})
			}
		}
	}
	return at
}

const blockBytes = blockmap.BlockSize

// TestCommit commits an overlay with one of everything, reads the image back, and commits
// on top of it.
func TestCommit(t *testing.T) {
	r := newRepo(t)
	r.built(t)
	truth, ix := r.image(t, "base")
	before := content(t, r.serve(t, ix))
	b := r.over(t, "base")
	// Chunks of the second layer are absent, but for the first one.
	chunks := wholeChunks(ix, 2)
	if len(chunks) < 6 {
		t.Fatalf("%d chunks", len(chunks))
	}
	here, same, partly, other, cut := chunks[0], chunks[1], chunks[2], chunks[3], chunks[4]
	blocksOf(t, b.device, here[0], here[1])
	at := func(block, count uint32) []byte {
		return slices.Clone(before[int64(block)*blockBytes:][:int64(count)*blockBytes])
	}
	r.fetched = 0
	b.write(t, here[0], at(here[0], 3))                                         // equal, bytes compared
	b.write(t, here[0]+3, filled(1))                                            // not equal
	b.write(t, same[0], at(same[0], same[1]))                                   // equal, by its digest
	b.write(t, partly[0]+1, at(partly[0]+1, partly[1]-1))                       // equal, but nobody can tell
	b.write(t, other[0], append(at(other[0], other[1]-1), filled(2)...))        // a whole chunk, with another end
	b.write(t, cut[0], filled(0))                                               // data of zeros
	free := ix.Blocks - 40                                                      // where nothing was
	b.write(t, free, slices.Concat(filled(0), filled(3), filled(0), filled(4))) // zeros among data
	b.write(t, free+10, bytes.Repeat(filled(5), 20))                            // more than a chunk
	zero := func(block, count uint32) {
		if err := b.overlay.Zero(t.Context(), blockmap.Range(int64(block)*blockBytes, int64(count)*blockBytes), true); err != nil {
			t.Fatal(err)
		}
	}
	zero(cut[0]+2, 2)
	zero(free-10, 5) // where nothing was
	if r.fetched != 0 {
		t.Fatal("the writes have fetched something")
	}
	want := content(t, b.overlay)
	fresh := r.over(t, "base") // reading the truth has fetched everything
	blocksOf(t, fresh.device, here[0], here[1])
	for x := range b.overlay.Changes() {
		p := want[x.Start:x.End]
		if x.Zero {
			if err := fresh.overlay.Zero(t.Context(), x.Extent, true); err != nil {
				t.Fatal(err)
			}
			continue
		}
		fresh.write(t, uint32(x.Start/blockBytes), p)
	}
	r.fetched, r.uploads = 0, nil
	c := fresh.commit(t, r, "committed")
	if r.fetched != 0 {
		t.Errorf("the commit has fetched %d chunks", r.fetched)
	}
	equal := 3 + same[1] + 5 + 2
	zeros := uint32(1 + 2)
	stored := 1 + partly[1] - 1 + other[1] + 2 + 20
	if c.Equal != int64(equal)*blockBytes || c.Zeros != int64(zeros)*blockBytes || c.Content != int64(stored)*blockBytes || c.Changed != c.Equal+c.Zeros+c.Content {
		t.Errorf("of %d bytes %d equal, %d zeros, %d content; want %d, %d and %d blocks", c.Changed, c.Equal, c.Zeros, c.Content, equal, zeros, stored)
	}
	if n := len(r.uploads); n != 2 {
		t.Errorf("%d blobs were uploaded, and the overlay and the index were to be: %v", n, r.uploads)
	}
	if sum := c.Stored + c.IndexBytes + int64(len(c.Raw)); c.Uploaded != sum || c.Copied != 0 || c.Mounted != 0 {
		t.Errorf("%d bytes uploaded, want %d; %d copied, %d mounted", c.Uploaded, sum, c.Copied, c.Mounted)
	}

	m, cix := r.image(t, "committed")
	device := r.serve(t, cix)
	if got := content(t, device); !bytes.Equal(got, want) {
		t.Error("the committed device reads differently")
	}
	if p, err := m.Policy(); err != nil || p != flatten.WithOverlays {
		t.Errorf("the policy is %v, %v", p, err)
	}
	if err := r.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
	if m.Subject == nil || m.Subject.Digest != b.Manifest.Digest || m.Subject.Size != b.Manifest.Size {
		t.Errorf("its subject is %v", m.Subject)
	}
	if m.Annotations[flatten.AnnotationBaseName] != b.Name || m.Annotations[flatten.AnnotationBaseDigest] != b.Manifest.Digest.String() {
		t.Errorf("its annotations are %v", m.Annotations)
	}
	for i := range ix.Streams {
		if cix.Streams[i].Blob != ix.Streams[i].Blob || m.Role(i) != truth.Role(i) || m.DiffID(i) != truth.DiffID(i) {
			t.Errorf("stream %d is not that of the base", i)
		}
	}
	// The run of more than a chunk begins a chunk.
	run, _ := cix.Lookup(free + 10)
	over := &cix.Streams[len(cix.Streams)-1]
	if i := over.Find(run.Block); over.Chunks[i].Block != run.Block || run.Count != 20 {
		t.Errorf("run %+v is in chunk %+v", run, over.Chunks[i])
	}

	// Writing over all that the overlay has, and zeros alone: the earlier overlay goes.
	again := r.over(t, "committed")
	for _, x := range cix.Runs {
		if int(x.Stream) == len(cix.Streams)-1 {
			if err := again.overlay.Zero(t.Context(), blockmap.Range(int64(x.Device)*blockBytes, int64(x.Count)*blockBytes), true); err != nil {
				t.Fatal(err)
			}
		}
	}
	want = content(t, again.overlay)
	c2 := again.commit(t, r, "again")
	m, cix = r.image(t, "again")
	if got := content(t, r.serve(t, cix)); !bytes.Equal(got, want) {
		t.Error("the device that was committed again reads differently")
	}
	if c2.Dropped != 1 || len(cix.Streams) != len(ix.Streams)+1 || c2.Content != blockBytes {
		t.Errorf("%d overlays dropped, %d streams; %d bytes of content", c2.Dropped, len(cix.Streams), c2.Content)
	}
	if err := r.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}

	// Without any change it is an image like its base.
	r.uploads = nil
	idle := r.over(t, "again").commit(t, r, "idle")
	m, cix = r.image(t, "idle")
	if len(r.uploads) != 0 || idle.Uploaded != idle.IndexBytes+int64(len(idle.Raw)) || idle.Content != 0 {
		t.Errorf("%+v, uploads %v", idle, r.uploads)
	}
	if err := r.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
}

// The cache of an earlier process is compared with as well, without fetching, although its
// files are not open yet.
func TestCommitWithAnEarlierCache(t *testing.T) {
	r := newRepo(t)
	r.built(t)
	_, ix := r.image(t, "base")
	dir := t.TempDir()
	open := func() *blockmap.Image {
		cache, err := blockmap.OpenCache(dir, blockmap.CacheOptions{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := blockmap.NewImage(ix, cache, r)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close(); cache.Close() })
		return m
	}
	func() {
		cache, err := blockmap.OpenCache(dir, blockmap.CacheOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer cache.Close()
		m, err := blockmap.NewImage(ix, cache, r)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		content(t, m)
	}()
	want := content(t, r.serve(t, ix))
	b := r.over(t, "base")
	b.Device = open()
	run := ix.Runs[len(ix.Runs)-1]
	b.write(t, run.Device+1, want[int64(run.Device+1)*blockBytes:][:2*blockBytes])
	r.fetched = 0
	if c := b.commit(t, r, "equal"); c.Equal != 2*blockBytes || c.Content != 0 || r.fetched != 0 {
		t.Errorf("%d bytes are equal, %d were stored, %d chunks fetched", c.Equal, c.Content, r.fetched)
	}
}

// mounting is a Target of the registry of another one.
type mounting struct {
	*repo
	from    *repo
	mounted int
}

func (m *mounting) Mount(ctx context.Context, d v1.Descriptor, from flatten.Place) (bool, error) {
	if from.String() != m.from.String() {
		return false, nil
	}
	b, err := m.from.Blob(ctx, d)
	if err == nil {
		err = m.PushBytes(ctx, d, b)
	}
	m.mu.Lock()
	m.mounted++
	m.mu.Unlock()
	return true, err
}

// TestCommitElsewhere commits to another registry, which gets the streams that it lacks,
// once, and to another repository of the same registry, which mounts them.
func TestCommitElsewhere(t *testing.T) {
	r := newRepo(t)
	r.built(t)
	b := r.over(t, "base")
	b.Here = false
	b.write(t, b.Index.Blocks-1, filled(9))
	want := content(t, b.overlay)
	other := newRepo(t)
	// One of them is there.
	d := v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: b.Index.Streams[1].Blob.String()}, Size: b.Index.Streams[1].BlobSize}
	p, err := r.Blob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.PushBytes(t.Context(), d, p); err != nil {
		t.Fatal(err)
	}
	c := b.commit(t, other, "one")
	lacked := b.Index.Streams[0].BlobSize + b.Index.Streams[2].BlobSize
	if c.Copied != lacked || c.Uploaded != c.Stored+c.IndexBytes+int64(len(c.Raw))+lacked {
		t.Errorf("%d bytes copied of %d", c.Copied, lacked)
	}
	m, ix := other.image(t, "one")
	if got := content(t, other.serve(t, ix)); !bytes.Equal(got, want) {
		t.Error("the device reads differently in the other registry")
	}
	if err := other.verify(t, m, ix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
	b.write(t, b.Index.Blocks-2, filled(8))
	if c := b.commit(t, other, "two"); c.Copied != 0 {
		t.Errorf("%d bytes were copied again", c.Copied)
	}
	mounts := &mounting{repo: newRepo(t), from: r}
	if c := b.commit(t, mounts, "three"); c.Copied != 0 || c.Mounted != 3 || mounts.mounted != 3 {
		t.Errorf("%d bytes copied, %d streams mounted", c.Copied, c.Mounted)
	}
	m, ix = mounts.image(t, "three")
	if err := mounts.verify(t, m, ix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
	// What is not what it says ends the commit, and no manifest is pushed.
	b.Place = damaged{r}
	last := newRepo(t)
	if _, err := flatten.Commit(t.Context(), b.overlay, b.CommitBase, last, flatten.CommitOptions{TempDir: t.TempDir(), Tag: "bad"}); err == nil || !strings.Contains(err.Error(), "of the base image") {
		t.Errorf("a damaged stream: %v", err)
	}
	if raw, err := last.Tagged(t.Context(), "bad"); raw != nil || err != nil {
		t.Errorf("there is a manifest: %v", err)
	}
}

// damaged is a place whose blobs are cut off, which a reader says as Place has it.
type damaged struct{ *repo }

func (d damaged) OpenBlob(ctx context.Context, desc v1.Descriptor) (io.ReadCloser, error) {
	body, err := d.repo.OpenBlob(ctx, desc)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(body, 100), failingReader{}), body}, nil
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("the blob is damaged") }

// lying is a device whose changes are wrong.
type lying struct {
	blockmap.Device
	changes []blockmap.Change
}

func (l lying) Changes() iter.Seq[blockmap.Change] { return slices.Values(l.changes) }

// Changes that are not runs of blocks in order are an error.
func TestCommitOfWrongChanges(t *testing.T) {
	r := newRepo(t)
	r.built(t)
	b := r.over(t, "base")
	x := func(start, end int64) blockmap.Change {
		return blockmap.Change{Extent: blockmap.Extent{Start: start, End: end}}
	}
	for _, changes := range [][]blockmap.Change{
		{x(0, b.overlay.Size()+blockBytes)}, {x(-blockBytes, 0)}, {x(1, blockBytes)}, {x(0, 1)}, {x(blockBytes, 2*blockBytes), x(0, blockBytes)},
		{x(0, 2*blockBytes), x(blockBytes, 3*blockBytes)}, {x(2*blockBytes, blockBytes)},
	} {
		if _, err := flatten.Commit(t.Context(), lying{b.overlay, changes}, b.CommitBase, r, flatten.CommitOptions{TempDir: t.TempDir(), Tag: "x"}); err == nil {
			t.Errorf("%v: no error", changes)
		}
	}
	short := blocktest.NewMemory(1 << 20)
	if _, err := flatten.Commit(t.Context(), lying{short, nil}, b.CommitBase, r, flatten.CommitOptions{TempDir: t.TempDir(), Tag: "x"}); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("a device of another size: %v", err)
	}
}

// A commit that is cancelled ends at once and pushes no manifest.
func TestCommitCancelled(t *testing.T) {
	r := newRepo(t)
	r.built(t)
	b := r.over(t, "base")
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4<<20)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	b.write(t, b.Index.Blocks-1024, p)
	ctx, cancel := context.WithCancel(t.Context())
	dst := &cancelling{repo: r, cancel: cancel}
	if _, err := flatten.Commit(ctx, b.overlay, b.CommitBase, dst, flatten.CommitOptions{TempDir: t.TempDir(), Tag: "cancelled"}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if raw, err := r.Tagged(t.Context(), "cancelled"); raw != nil || err != nil {
		t.Errorf("there is a manifest: %v", err)
	}
}

// cancelling cancels at the first push of a file.
type cancelling struct {
	*repo
	cancel func()
}

func (c *cancelling) PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(int64)) error {
	c.cancel()
	return c.repo.PushFile(ctx, d, path, progress)
}

// The changed bytes of an overlay, half of them equal to the base, to a registry in this
// process.
func BenchmarkCommit(b *testing.B) {
	for _, kind := range []string{"text", "random"} {
		b.Run(kind, func(b *testing.B) {
			r := newRepo(b)
			r.built(b)
			base := r.over(b, "base")
			const size = 32 << 20
			p := make([]byte, size)
			rng := rand.New(rand.NewPCG(1, 1))
			for i := 0; i < len(p); {
				if kind == "random" {
					p[i] = byte(rng.Uint32())
					i++
					continue
				}
				i += copy(p[i:], fmt.Sprintf("line %d of a log, with %d in it\n", i, rng.Uint32N(1000)))
			}
			base.write(b, base.Index.Blocks-size/blockBytes, p)
			b.SetBytes(size)
			var uploaded, changed int64
			for i := 0; b.Loop(); i++ {
				c := base.commit(b, r, fmt.Sprint("bench", i))
				uploaded, changed = c.Uploaded, c.Changed
			}
			b.ReportMetric(float64(uploaded)/float64(changed), "uploaded/changed")
		})
	}
}
