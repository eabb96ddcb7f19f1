package fetcher_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// formed is peers that send chunks in the form in which they are asked for them, and go
// wrong as a test says.
type formed struct {
	t     testing.TB
	w     *world
	wants []blockmap.Want
	plain [][]byte // of the chunks
	peers []string // in the order in which they are asked

	// spoil, if not nil, changes what the first peer sends.
	spoil func(b *formedBody)
	// hold, if not nil, is closed when bytes from holdAt on may arrive.
	hold   chan struct{}
	holdAt func(b *formedBody) int

	mu         sync.Mutex
	asked      []blockmap.LeafSet // leaves first
	distrusted map[string]int
	kept       map[int][]byte
}

// formedBody is an answer of such a peer.
type formedBody struct {
	z      *formed
	peer   string
	stored bool
	leaves blockmap.LeafSet

	digests, first, rest []byte
	all                  []byte
	at                   int
	done                 <-chan struct{}
}

// newFormed makes an image of chunks of 1 MiB, of which each leaf differs.
func newFormed(t *testing.T, chunks int, peers ...string) (*formed, *fetcher.Bound) {
	t.Helper()
	z := &formed{t: t, peers: peers, distrusted: make(map[string]int), kept: make(map[int][]byte)}
	rng := rand.New(rand.NewPCG(1, 1))
	for range chunks {
		p := make([]byte, 1<<20)
		for i := 0; i < len(p); i += 7 {
			p[i] = byte(rng.Uint32())
		}
		z.plain = append(z.plain, p)
	}
	table, blob := blocktest.Stream(t, z.plain)
	m := &blocktest.Image{
		Index: &blockmap.Index{Blocks: table.Blocks(), Streams: []blockmap.Table{*table}, Runs: []blockmap.Run{{Count: table.Blocks()}}},
		Blobs: map[blockmap.Digest][]byte{table.Blob: blob}, Content: bytes.Join(z.plain, nil),
	}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	z.w = newWorld(t, m, fetcher.Options{})
	z.wants = z.w.wants(t)
	return z, z.w.fetcher.FromNear(z.w.origin, fetcher.Nearby{
		RunChunks: 1, PieceBytes: 1 << 20, Keep: z.keep,
		Route: func(blockmap.Digest, uint32) fetcher.Route { return &formedRoute{z: z} },
	})
}

func (z *formed) keep(_ blockmap.Digest, chunk int, stored []byte) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if cap(stored) > len(stored)+len(stored)/8 {
		z.t.Errorf("%d bytes take %d", len(stored), cap(stored))
	}
	z.kept[chunk] = stored
}

// frame is a chunk as the registry has it.
func (z *formed) frame(chunk int) []byte {
	table := z.wants[chunk].Table
	c := &table.Chunks[chunk]
	return z.w.Blobs[table.Blob][c.Offset:][:c.Stored]
}

// leaf is a want of one leaf.
func (z *formed) leaf(chunk, leaf int) []blockmap.Want {
	w := z.wants[chunk]
	w.Leaves = blockmap.LeafRange(leaf, 1)
	return []blockmap.Want{w}
}

// check fails the test if a chunk is not resident, or not right.
func (z *formed) check(chunk int) {
	z.t.Helper()
	got := make([]byte, 1<<20)
	if !z.wants[chunk].Stream.ReadChunk(chunk, got) || !bytes.Equal(got, z.plain[chunk]) {
		z.t.Errorf("chunk %d is not what it should be", chunk)
	}
}

type formedRoute struct {
	z    *formed
	next int
}

func (r *formedRoute) Next() (peer string, owner, ok bool) {
	if r.next == len(r.z.peers) {
		return "", false, false
	}
	r.next++
	return r.z.peers[r.next-1], false, true
}
func (r *formedRoute) Usable(string) bool                                              { return true }
func (r *formedRoute) RegistryFailed()                                                 {}
func (r *formedRoute) Late(string, time.Time, time.Time, time.Time, int64, int64) bool { return false }
func (r *formedRoute) Hedge() (peer string, owner, ok bool)                            { return "", false, false }
func (r *formedRoute) Sign(string) time.Time                                           { return time.Time{} }
func (r *formedRoute) MayHedge(string) bool                                            { return false }
func (r *formedRoute) Overtaken(string)                                                {}
func (r *formedRoute) Doubt(string)                                                    {}
func (r *formedRoute) OpenPiece(context.Context, string, bool, int64, int64) (io.ReadCloser, error) {
	return nil, errors.New("no pieces here")
}

func (r *formedRoute) OpenChunks(ctx context.Context, peer string, _ bool, chunk, _ int, n, stored int64, leaves blockmap.LeafSet) (io.ReadCloser, error) {
	z := r.z
	b := &formedBody{z: z, peer: peer, stored: stored > 0, leaves: leaves, done: ctx.Done()}
	p := z.plain[chunk]
	if stored > 0 && stored != int64(len(z.frame(chunk))) || n != int64(len(p)) {
		return nil, errors.New("the lengths are not those of the table")
	}
	b.rest = bytes.Clone(p)
	if b.stored {
		b.rest = bytes.Clone(z.frame(chunk))
	}
	if leaves != 0 {
		for _, d := range blockmap.LeafDigests(nil, p) {
			b.digests = append(b.digests, d[:]...)
		}
		for l := range leaves.Each {
			b.first = append(b.first, p[l*blockmap.LeafSize:][:blockmap.LeafSize]...)
			if !b.stored {
				b.rest = append(p[:l*blockmap.LeafSize:l*blockmap.LeafSize], p[(l+1)*blockmap.LeafSize:]...)
			}
		}
	}
	z.mu.Lock()
	z.asked = append(z.asked, leaves)
	spoil := z.spoil
	z.mu.Unlock()
	if spoil != nil && peer == z.peers[0] {
		spoil(b)
	}
	b.all = bytes.Join([][]byte{b.digests, b.first, b.rest}, nil)
	return b, nil
}

func (b *formedBody) Form() (bool, blockmap.LeafSet) { return b.stored, b.leaves }
func (b *formedBody) Source() string                 { return b.peer }
func (b *formedBody) Close() error                   { return nil }

func (b *formedBody) Distrust() {
	b.z.mu.Lock()
	defer b.z.mu.Unlock()
	b.z.distrusted[b.peer]++
}

func (b *formedBody) Read(p []byte) (int, error) {
	if b.at == len(b.all) {
		return 0, io.EOF
	}
	most := len(b.all)
	if b.z.hold != nil {
		if hold := b.z.holdAt(b); b.at < hold {
			most = hold
		} else {
			select {
			case <-b.z.hold:
			case <-b.done:
				return 0, context.Canceled
			}
		}
	}
	n := copy(p, b.all[b.at:most])
	b.at += n
	return n, nil
}

// A chunk that a peer sends as the registry has it is verified, stored, and kept for others.
// So is one that the origin sends.
func TestPeerSendsStored(t *testing.T) {
	z, b := newFormed(t, 3, "a")
	if err := b.Fetch(t.Context(), z.wants[:2]); err != nil {
		t.Fatal(err)
	}
	if err := b.FetchOwned(t.Context(), z.wants[2:]); err != nil {
		t.Fatal(err)
	}
	st := z.w.stats(t)
	for i := range z.wants {
		z.check(i)
		if !bytes.Equal(z.kept[i], z.frame(i)) {
			t.Errorf("chunk %d: %d bytes are kept", i, len(z.kept[i]))
		}
	}
	if sum := int64(len(z.frame(0)) + len(z.frame(1))); st.ZoneStored != sum || st.ZoneBytes != sum || st.ZoneChunks != 2 || st.Chunks != 1 || st.Bytes != int64(len(z.frame(2))) {
		t.Errorf("%+v", st)
	}
}

// What a Bound of no zone fetches is kept if it is told so, and only what is right.
func TestKeep(t *testing.T) {
	z, _ := newFormed(t, 2)
	b := z.w.fetcher.From(z.w.origin)
	b.Keep(z.keep)
	z.w.origin.Set(blocktest.Faults{Flip: true})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() { failed <- b.Fetch(ctx, z.wants[:1]) }()
	settled(t, "wrong bytes have come", func() bool { return z.w.fetcher.Stats().Wrong > 0 })
	cancel()
	<-failed
	z.w.stats(t)
	if len(z.kept) != 0 {
		t.Error("wrong bytes are kept")
	}
	z.w.origin.Set(blocktest.Faults{})
	if err := b.Fetch(t.Context(), z.wants); err != nil {
		t.Fatal(err)
	}
	z.w.stats(t)
	for i := range z.wants {
		if !bytes.Equal(z.kept[i], z.frame(i)) {
			t.Errorf("chunk %d: %d bytes are kept", i, len(z.kept[i]))
		}
	}
}

// A reader of a few leaves gets them before the rest of their chunk. The rest comes too,
// although nobody waits for it.
func TestReaderOfALeaf(t *testing.T) {
	for _, stored := range []bool{false, true} {
		z, b := newFormed(t, 2, "a")
		z.spoil = func(b *formedBody) {
			if !stored { // the peer does not have it so
				b.stored = false
				p := z.plain[0]
				b.rest = append(p[:5*blockmap.LeafSize:5*blockmap.LeafSize], p[6*blockmap.LeafSize:]...)
			}
		}
		z.hold = make(chan struct{})
		z.holdAt = func(b *formedBody) int { return len(b.digests) + len(b.first) }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := b.Fetch(ctx, z.leaf(0, 5)); err != nil {
			t.Fatalf("stored %v: %v", stored, err)
		}
		s := z.wants[0].Stream
		if !s.HasLeaves(0, blockmap.LeafRange(5, 1)) || s.Has(0) {
			t.Errorf("stored %v: the leaves %b are resident", stored, s.Leaves(0))
		}
		// Another reader of the chunk waits for the same request.
		other := make(chan error, 1)
		go func() { other <- b.Fetch(ctx, z.leaf(0, 7)) }()
		select {
		case err := <-other:
			t.Errorf("stored %v: a leaf that has not come: %v", stored, err)
		case <-time.After(10 * time.Millisecond):
		}
		close(z.hold)
		if err := <-other; err != nil {
			t.Errorf("stored %v: %v", stored, err)
		}
		settled(t, fmt.Sprintf("stored %v: the rest comes", stored), func() bool { return s.Has(0) && z.w.fetcher.Fetches() == 0 })
		z.check(0)
		if len(z.asked) != 1 || z.asked[0] != blockmap.LeafRange(5, 1) || z.w.origin.Requests() != 0 {
			t.Errorf("stored %v: asked for leaves %b", stored, z.asked)
		}
		if (len(z.kept[0]) > 0) != stored {
			t.Errorf("stored %v: %d bytes are kept", stored, len(z.kept[0]))
		}
		// Nobody waits: no leaves come first. Nor do they for readers of much of a chunk.
		if err := b.Fetch(ctx, z.wants[1:]); err != nil || z.asked[1] != 0 {
			t.Errorf("leaves %b first: %v", z.asked[1], err)
		}
		b.Close()
	}
}

// While a list is replayed, readers do not ask for leaves first.
func TestNoLeavesFirstInAReplay(t *testing.T) {
	z, b := newFormed(t, 3, "a")
	z.hold = make(chan struct{})
	z.holdAt = func(b *formedBody) int { return 0 }
	r := b.Replay(t.Context(), z.wants[:1], fetcher.ReplayOptions{})
	read := make(chan error, 1)
	go func() { read <- b.Fetch(t.Context(), z.leaf(1, 3)) }()
	settled(t, "both are asked for", func() bool {
		z.mu.Lock()
		defer z.mu.Unlock()
		return len(z.asked) == 2
	})
	close(z.hold)
	if err := <-read; err != nil {
		t.Error(err)
	}
	checkDone(t, r)
	if err := b.Fetch(t.Context(), z.leaf(2, 3)); err != nil {
		t.Error(err)
	}
	if z.asked[0] != 0 || z.asked[1] != 0 || z.asked[2] != blockmap.LeafRange(3, 1) {
		t.Errorf("leaves first: %b", z.asked)
	}
	b.Close()
}

// A Bound that is closed does not fetch what its readers have left.
func TestRestIsCancelled(t *testing.T) {
	z, b := newFormed(t, 1, "a")
	z.hold = make(chan struct{})
	z.holdAt = func(b *formedBody) int { return len(b.digests) + len(b.first) }
	if err := b.Fetch(t.Context(), z.leaf(0, 0)); err != nil {
		t.Fatal(err)
	}
	b.Close()
	settled(t, "it is not fetched any more", func() bool { return z.w.fetcher.Fetches() == 0 })
	if z.wants[0].Stream.Has(0) {
		t.Error("the rest has come")
	}
}

// bomb is a frame of n bytes that decompresses to far more than a chunk.
func bomb(t testing.TB, n int) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	p := enc.EncodeAll(make([]byte, 256<<20), nil)
	if len(p) > n {
		t.Fatalf("a bomb has %d bytes", len(p))
	}
	return append(p, make([]byte, n-len(p))...)
}

// A peer that sends wrong bytes in any form is distrusted and passed over. Nothing of them
// is resident, or kept.
func TestWrongForms(t *testing.T) {
	other := make([]byte, 1<<20)
	for i := range other {
		other[i] = byte(i >> 3)
	}
	for name, spoil := range map[string]func(z *formed, b *formedBody){
		"digests":                 func(_ *formed, b *formedBody) { b.digests[3]++ },
		"leaf":                    func(_ *formed, b *formedBody) { b.first[100]++ },
		"leaves of another place": func(z *formed, b *formedBody) { b.first = z.plain[0][:blockmap.LeafSize] },
		"frame":                   func(_ *formed, b *formedBody) { b.rest[len(b.rest)/2]++ },
		"no frame":                func(_ *formed, b *formedBody) { clear(b.rest) },
		"frame of another chunk": func(z *formed, b *formedBody) {
			b.rest = append(bytes.Clone(z.frame(1)), make([]byte, 100)...)[:len(b.rest)]
		},
		"bomb":                    func(z *formed, b *formedBody) { b.rest = bomb(z.t, len(b.rest)) },
		"plain, and wrong":        func(z *formed, b *formedBody) { b.stored, b.rest = false, other[:15*blockmap.LeafSize] },
		"plain, in another order": func(z *formed, b *formedBody) { b.stored, b.rest = false, z.plain[0][:15*blockmap.LeafSize] },
		"plain, and nothing first": func(z *formed, b *formedBody) {
			b.stored, b.leaves, b.digests, b.first, b.rest = false, 0, nil, nil, other
		},
	} {
		t.Run(name, func(t *testing.T) {
			z, b := newFormed(t, 2, "liar", "b")
			z.spoil = func(b *formedBody) { spoil(z, b) }
			if err := b.Fetch(t.Context(), z.leaf(0, 5)); err != nil {
				t.Fatal(err)
			}
			if err := b.Fetch(t.Context(), z.wants[:1]); err != nil {
				t.Fatal(err)
			}
			z.check(0)
			if n := z.w.stats(t).Wrong; n != 1 || z.distrusted["liar"] != 1 || z.distrusted["b"] != 0 || z.w.origin.Requests() != 0 {
				t.Errorf("%d wrong, distrusted %v", n, z.distrusted)
			}
			if kept := z.kept[0]; kept != nil && !bytes.Equal(kept, z.frame(0)) {
				t.Error("wrong bytes are kept")
			}
		})
	}
	for name, cut := range map[string]func(b *formedBody){
		"digests": func(b *formedBody) { b.digests, b.first, b.rest = b.digests[:10], nil, nil },
		"leaf":    func(b *formedBody) { b.first, b.rest = b.first[:10], nil },
		"rest":    func(b *formedBody) { b.rest = b.rest[:10] },
		"all":     func(b *formedBody) { b.digests, b.first, b.rest = nil, nil, nil },
	} {
		t.Run("cut in "+name, func(t *testing.T) {
			z, b := newFormed(t, 1, "a", "b")
			z.spoil = cut
			if err := b.Fetch(t.Context(), z.leaf(0, 5)); err != nil {
				t.Fatal(err)
			}
			if err := b.Fetch(t.Context(), z.wants); err != nil {
				t.Fatal(err)
			}
			z.check(0)
			if len(z.distrusted) != 0 {
				t.Errorf("distrusted %v", z.distrusted)
			}
		})
	}
}

// FuzzForms has a peer send any other bytes in each form.
func FuzzForms(f *testing.F) {
	for _, stored := range []bool{false, true} {
		for _, at := range []uint32{0, 511, 512, 512 + blockmap.LeafSize, 1 << 20, 1<<20 + 511} {
			f.Add(stored, at, []byte{1})
		}
		f.Add(stored, uint32(512+blockmap.LeafSize), []byte{0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff})
	}
	f.Fuzz(func(t *testing.T, stored bool, at uint32, change []byte) {
		z, b := newFormed(t, 1, "a", "b")
		z.spoil = func(b *formedBody) {
			if !stored {
				b.stored = false
				b.rest = append(z.plain[0][:5*blockmap.LeafSize:5*blockmap.LeafSize], z.plain[0][6*blockmap.LeafSize:]...)
			}
			for i := range change {
				at := int(at) + i
				for _, p := range [][]byte{b.digests, b.first, b.rest} {
					if at < len(p) {
						p[at] ^= change[i]
						break
					}
					at -= len(p)
				}
			}
		}
		for _, wants := range [][]blockmap.Want{z.leaf(0, 5), z.wants} {
			if err := b.Fetch(t.Context(), wants); err != nil {
				t.Fatal(err)
			}
		}
		z.check(0)
		if z.w.origin.Requests() != 0 || z.distrusted["b"] != 0 {
			t.Errorf("%d requests to the origin, distrusted %v", z.w.origin.Requests(), z.distrusted)
		}
	})
}
