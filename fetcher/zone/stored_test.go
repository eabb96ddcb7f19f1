package zone

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

func chunkOf(n int) chunkKey { return chunkKey{stream: blockmap.Digest{1}, chunk: n} }

// held is how many bytes a cache says that it has, and has.
func (s *storedChunks) counted(t testing.TB) int64 {
	t.Helper()
	var n int64
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.mu.here {
		n += sizeOf(x.bytes)
	}
	if len(s.mu.here) != s.mu.recent.Len() || s.mu.bytes > s.most {
		t.Errorf("%d chunks, %d in order, %d bytes", len(s.mu.here), s.mu.recent.Len(), s.mu.bytes)
	}
	return n
}

// The chunks in memory are bounded, with those that are being sent.
func TestStoredChunksAreBounded(t *testing.T) {
	const unit = 1000
	s := newStoredChunks(10*unit + storedOverhead)
	s.put(chunkOf(0), make([]byte, 11*unit))
	s.put(chunkOf(0), nil)
	if s.size() != 0 || s.take(chunkOf(0), 11*unit) != nil {
		t.Error("what has no room is kept")
	}
	for i := range 4 {
		s.put(chunkOf(i), make([]byte, 3*unit))
	}
	// 0 is gone. 1 is used, so 2 goes next.
	x := s.take(chunkOf(1), 3*unit)
	if x == nil || s.take(chunkOf(0), 3*unit) != nil || s.take(chunkOf(1), 2*unit) != nil {
		t.Fatalf("%+v", x)
	}
	s.put(chunkOf(4), make([]byte, 3*unit))
	if s.take(chunkOf(2), 3*unit) != nil || s.size() != 3*(3*unit+storedOverhead) || s.counted(t) != s.size() {
		t.Errorf("%d bytes", s.size())
	}
	// The room counts what is in use, also when the chunk has come in another form since.
	s.put(chunkOf(1), make([]byte, 4*unit))
	if s.size() > s.most || s.counted(t) != s.size()-3*unit-storedOverhead {
		t.Errorf("%d bytes", s.size())
	}
	s.put(chunkOf(5), make([]byte, 8*unit)) // there is no room while x is in use
	if s.take(chunkOf(5), 8*unit) != nil {
		t.Error("more is kept than there is room for")
	}
	x.release()
	s.put(chunkOf(5), make([]byte, 8*unit))
	y := s.take(chunkOf(5), 8*unit)
	if y == nil || s.size() != 8*unit+storedOverhead || s.counted(t) != s.size() {
		t.Fatalf("%d bytes", s.size())
	}
	// A slice counts with its capacity.
	s.put(chunkOf(6), make([]byte, unit, 100*unit))
	if s.take(chunkOf(6), 1*unit) != nil {
		t.Error("a large array is kept")
	}
	s.expire(time.Now().Add(-time.Minute))
	if s.counted(t) != 8*unit+storedOverhead {
		t.Error("what was just used has expired")
	}
	s.expire(time.Now().Add(time.Minute))
	if s.size() != 8*unit+storedOverhead || s.counted(t) != 0 {
		t.Errorf("%d bytes are in use", s.size())
	}
	y.release()
	if s.size() != 0 {
		t.Errorf("%d bytes", s.size())
	}
	s.put(chunkOf(7), make([]byte, 3*unit))
	s.close()
	s.put(chunkOf(8), make([]byte, 3*unit))
	if s.size() != 0 || s.counted(t) != 0 {
		t.Error("memory is kept after the end")
	}
	(*storedChunk)(nil).release()
}

// Small things take more memory than they have bytes: peers can have a host make the digests
// of any number of small chunks.
func TestSmallThingsInMemoryAreBounded(t *testing.T) {
	s := newStoredChunks(1 << 20)
	for i := range 100_000 {
		s.put(chunkKey{chunk: i, digests: true}, make([]byte, 32))
	}
	if n := len(s.mu.here); n == 0 || n > 1<<20/storedOverhead {
		t.Errorf("%d are kept", n)
	}
}

// How much is kept is a setting.
func TestMemoryForStoredChunks(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	for memory, want := range map[int64]int64{0: StoredMemory, -1: 0, 1 << 20: 1 << 20} {
		if z := open(t, Options{Store: s, Memory: memory}); z.stored.most != want {
			t.Errorf("%d: %d bytes may be kept", memory, z.stored.most)
		}
	}
}

// frame is chunk i as the registry has it.
func (s *testStore) frame(i int) []byte {
	c := &s.table.Chunks[i]
	return s.image.Blobs[s.table.Blob][c.Offset : c.Offset+int64(c.Stored)]
}

// large returns a chunk with at least this many leaves, the last of which is short.
func (s *testStore) large(leaves int) int {
	for i := range s.table.Chunks {
		if s.table.Chunks[i].Leaves() >= leaves && s.table.Chunks[i].Count%blockmap.LeafBlocks != 0 {
			return i
		}
	}
	s.t.Fatal("no chunk has so many leaves")
	return 0
}

// A member sends a chunk as the registry has it if it has it so, if the peer takes it, and
// if that is the form that the peer's index knows.
func TestServerSendsStored(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	frame := s.frame(0)
	n := len(frame)
	ask := func(what, more, form, source string, want []byte) {
		t.Helper()
		code, body, header := get(t, z.chunksURL(s, 0, 0, more))
		if code != 200 || !bytes.Equal(body, want) || header.Get(formHeader) != form || header.Get("Thaw-Source") != source {
			t.Errorf("%s: %d, %d bytes instead of %d, form %q, from %s", what, code, len(body), len(want), header.Get(formHeader), header.Get("Thaw-Source"))
		}
	}
	ask("it is not in memory", fmt.Sprintf("&stored=%d", n), "", "origin", s.part(0, 0))
	z.stored.put(chunkKey{stream: s.stream.ID(), chunk: 0}, frame)
	ask("it is", fmt.Sprintf("&stored=%d", n), "stored", "memory", frame)
	ask("the peer does not take it", "", "", "memory", s.part(0, 0))
	ask("the peer knows it in another form", fmt.Sprintf("&stored=%d", n+1), "", "memory", s.part(0, 0))
	st := z.status(t)
	if st.Hits != 1 || st.Misses != 2 || st.Kept != sizeOf(frame) || st.SentStored != int64(n) || st.Sent <= st.SentStored {
		t.Errorf("%+v", st)
	}
	// A member that is not the owner, and has it in memory alone.
	z.disown()
	z.stored.put(chunkKey{stream: s.stream.ID(), chunk: 1}, s.frame(1))
	if code, body, _ := get(t, z.chunksURL(s, 1, 1, fmt.Sprintf("&stored=%d", len(s.frame(1))))); code != 200 || !bytes.Equal(body, s.frame(1)) {
		t.Errorf("of memory alone: %d, %d bytes", code, len(body))
	}
	if code, _, _ := get(t, z.chunksURL(s, 1, 1, "")); code != 404 {
		t.Errorf("what is not here in plain form: %d", code)
	}
	z.status(t)
	z.Close()
	if z.stored.size() != 0 {
		t.Errorf("a closed zone keeps %d bytes", z.stored.size())
	}
}

// Leaves come first, behind what verifies them, in either form. The digests are made once.
func TestLeavesFirst(t *testing.T) {
	for what, o := range map[string]blockmap.CacheOptions{"buffered": {}, "direct": {Mode: blockmap.Direct}} {
		s := newTestStore(t, o)
		z := open(t, Options{Store: s})
		i := s.large(3)
		c := &s.table.Chunks[i]
		whole := s.part(i, i)
		var digests []byte
		for _, d := range blockmap.LeafDigests(nil, whole) {
			digests = append(digests, d[:]...)
		}
		for _, stored := range []bool{false, true} {
			more := ""
			if stored {
				z.stored.put(chunkKey{stream: s.stream.ID(), chunk: i}, s.frame(i))
				more = fmt.Sprintf("&stored=%d", c.Stored)
			}
			for _, l := range [][2]int{{0, 0}, {1, 1}, {0, 1}, {1, c.Leaves() - 1}, {c.Leaves() - 1, c.Leaves() - 1}, {0, c.Leaves() - 1}} {
				first := whole[l[0]*blockmap.LeafSize : min((l[1]+1)*blockmap.LeafSize, len(whole))]
				want := append(bytes.Clone(digests), first...)
				form := "leaves"
				if stored {
					want, form = append(want, s.frame(i)...), "leaves, stored"
				} else {
					want = append(append(want, whole[:l[0]*blockmap.LeafSize]...), whole[min((l[1]+1)*blockmap.LeafSize, len(whole)):]...)
				}
				code, body, header := get(t, z.chunksURL(s, i, i, fmt.Sprintf("&leaves=%d-%d%s", l[0], l[1], more)))
				if code != 200 || !bytes.Equal(body, want) || header.Get(formHeader) != form {
					t.Errorf("%s, leaves %v: %d, %d bytes instead of %d, form %q", what, l, code, len(body), len(want), header.Get(formHeader))
				}
			}
		}
		if code, _, _ := get(t, z.chunksURL(s, i, i, fmt.Sprintf("&leaves=0-%d", c.Leaves()))); code != 404 {
			t.Errorf("%s: a leaf that the chunk does not have: %d", what, code)
		}
		if x := z.stored.take(chunkKey{stream: s.stream.ID(), chunk: i, digests: true}, int64(len(digests))); x == nil || !bytes.Equal(x.bytes, digests) {
			t.Errorf("%s: the digests are not kept", what)
		} else {
			x.release()
		}
		if n := s.fetched.Load(); n != 1 {
			t.Errorf("%s: %d chunks come from the registry", what, n)
		}
		z.Close()
	}
}

// Leaves do not wait until it is their turn; the rest does.
func TestLeavesDoNotWait(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	i := s.large(2)
	s.fill(i)
	var done []func()
	for range writers { // whose turns do not end by themselves
		z.server.turns <- struct{}{}
		done = append(done, func() { <-z.server.turns })
	}
	resp, err := http.Get(z.chunksURL(s, i, i, "&leaves=0-0"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	first := make([]byte, digestsOf(int64(s.table.Chunks[i].Size()))+blockmap.LeafSize)
	if _, err := io.ReadFull(resp.Body, first); err != nil || !bytes.Equal(first[len(first)-blockmap.LeafSize:], s.part(i, i)[:blockmap.LeafSize]) {
		t.Errorf("the first leaf: %v", err)
	}
	for _, f := range done {
		f()
	}
	if rest, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(rest, s.part(i, i)[blockmap.LeafSize:]) {
		t.Errorf("the rest: %d bytes, %v", len(rest), err)
	}
}

// The length of an answer must be that of the form that it says it has, and of a form that
// was asked for.
func TestForms(t *testing.T) {
	const size, stored = 3*blockmap.LeafSize + 5*blockmap.BlockSize, 1000
	leaves := blockmap.LeafRange(1, 2)
	const digests, first = 4 * 32, 2 * blockmap.LeafSize
	for _, c := range []struct {
		fields         []string
		length         int
		stored, leaves bool // asked for
		right          bool
	}{
		{nil, size, false, false, true}, {nil, size, true, true, true}, {[]string{"stored"}, stored, true, false, true}, {[]string{"stored"}, stored, true, true, true},
		{[]string{"leaves"}, digests + size, false, true, true}, {[]string{"leaves, stored"}, digests + first + stored, true, true, true},
		// Not what was asked for.
		{[]string{"stored"}, stored, false, true, false}, {[]string{"leaves"}, digests + size, true, false, false}, {[]string{"leaves, stored"}, digests + first + stored, false, true, false},
		{[]string{"leaves, stored"}, digests + first + stored, true, false, false},
		// The length of another form.
		{nil, stored, true, true, false}, {[]string{"stored"}, size, true, true, false}, {[]string{"leaves"}, size, true, true, false}, {[]string{"leaves, stored"}, digests + size, true, true, false},
		{[]string{"stored"}, stored + 1, true, true, false}, {[]string{"stored"}, 0, true, true, false},
		// No form.
		{[]string{"zipped"}, stored, true, true, false}, {[]string{"stored", "leaves"}, stored, true, true, false}, {[]string{""}, size, true, true, false}, {[]string{"Stored"}, stored, true, true, false},
	} {
		t.Run(fmt.Sprintf("%q, %d", c.fields, c.length), func(t *testing.T) {
			peer := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
				if q := r.URL.Query(); (q.Get("stored") == "1000") != c.stored || (q.Get("leaves") == "1-2") != c.leaves {
					t.Errorf("%s", r.URL)
				}
				w.Header()[formHeader] = c.fields
				w.Header().Set("Content-Length", fmt.Sprint(c.length))
				io.WriteString(w, strings.Repeat("x", c.length))
			})
			a := ChunksAsk{Size: size}
			if c.stored {
				a.Stored = stored
			}
			if c.leaves {
				a.Leaves = leaves
			}
			b, err := peer.Chunks(t.Context(), "peer", testImage, a, false)
			if !c.right {
				if outcome(t, err).Result != Broken {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			got, err := io.ReadAll(b)
			isStored, l := b.Form()
			if err != nil || len(got) != c.length || isStored != strings.Contains(strings.Join(c.fields, ""), "stored") || (l == leaves) != strings.Contains(strings.Join(c.fields, ""), "leaves") {
				t.Errorf("%d bytes, %v, %v, %v", len(got), isStored, l, err)
			}
			if n := peer.stored.Load(); (n > 0) != isStored {
				t.Errorf("%d bytes came as the registry has them", n)
			}
		})
	}
}

// processorTime is what this process has used.
func processorTime(t testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPeerChunk gets a chunk of 1 MiB from one zone by the client of another over TLS,
// and verifies it: all of it in each form, and its first leaf.
func BenchmarkPeerChunk(b *testing.B) {
	s := newTestStore(b, blockmap.CacheOptions{})
	rng := rand.New(rand.NewPCG(1, 1))
	content := make([]byte, 1<<20)
	for i := range content { // compresses to about a third, as files of an image do
		if content[i] = byte(rng.Uint32()); i%4 != 0 {
			content[i] &= 1
		}
	}
	table, blob := blocktest.Stream(b, [][]byte{content})
	ix := &blockmap.Index{Blocks: table.Blocks(), Streams: []blockmap.Table{*table}, Runs: []blockmap.Run{{Count: table.Blocks()}}}
	err := ix.Seal()
	table = &ix.Streams[0]
	s.table = table
	if err == nil {
		s.stream, err = s.cache.Stream(table)
	}
	if err == nil {
		err = s.stream.Fill(0, content)
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.stream.Release)
	ca := newAuthority(b)
	x := open(b, secure(ca.credentials("host-1.example"), Options{Store: s, Grants: GrantOptions{Slots: 1 << 20}}))
	y := open(b, secure(ca.credentials("host-2.example"), Options{Store: s, Join: []Seed{x.seed(b)}}))
	awaitMembers(b, 2, x, y)
	x.Keep(s.stream.ID(), 0, bytes.Clone(blob))
	b.Run("round-trip", func(b *testing.B) { // a request and an answer of a few bytes
		for b.Loop() {
			if _, err := y.client.Health(b.Context(), x.Name()); err != nil {
				b.Fatal(err)
			}
		}
	})
	decoder := blockmap.NewChunkDecoder(1)
	defer decoder.Close()
	c := &table.Chunks[0]
	p, plain := make([]byte, 4<<20), make([]byte, 1<<20)
	for _, k := range []struct {
		name   string
		stored int64
		leaves blockmap.LeafSet
		upTo   int64 // bytes after which the reader goes on
	}{
		{"plain", 0, 0, 0}, {"stored", int64(c.Stored), 0, 0},
		{"leaf", 0, blockmap.LeafRange(5, 1), 16*32 + blockmap.LeafSize}, {"leaf-stored", int64(c.Stored), blockmap.LeafRange(5, 1), 16*32 + blockmap.LeafSize},
	} {
		b.Run(k.name, func(b *testing.B) {
			var waited time.Duration
			var sent int64
			cpu := processorTime(b)
			for b.Loop() {
				began := time.Now()
				body, err := y.client.Chunks(context.Background(), x.Name(), imageRef, ChunksAsk{Stream: s.stream.ID(), Size: 1 << 20, Stored: k.stored, Leaves: k.leaves}, true)
				if err != nil {
					b.Fatal(err)
				}
				if stored, leaves := body.Form(); stored != (k.stored > 0) || leaves != k.leaves {
					b.Fatal(body.Form())
				}
				got := p[:body.n]
				if k.upTo > 0 {
					if _, err = io.ReadFull(body, got[:k.upTo]); err == nil {
						digest := make([]blockmap.Digest, 16)
						for i := range digest {
							copy(digest[i][:], got[32*i:])
						}
						var list *blockmap.LeafList
						if list, err = blockmap.NewLeafList(c, digest); err == nil {
							err = c.VerifyLeaf(list, 5, got[512:k.upTo])
						}
					}
					waited += time.Since(began)
				}
				arriving := blockmap.NewArriving(c, plain)
				switch {
				case err != nil:
				case k.stored > 0:
					if err = decoder.DecompressArriving(io.LimitReader(body, k.stored), arriving); err == nil {
						err = arriving.Verify(c)
					}
				case k.upTo > 0:
					_, err = io.ReadFull(body, got[k.upTo:])
				default:
					for n := 0; n < len(plain) && err == nil; {
						var m int
						m, err = body.Read(plain[n:])
						n += m
						arriving.Came(n)
					}
					if err == nil {
						err = arriving.Verify(c)
					}
				}
				if err != nil {
					b.Fatal(err)
				}
				if k.upTo == 0 {
					waited += time.Since(began)
				}
				sent += body.n
				body.Close()
			}
			b.ReportMetric(float64((processorTime(b)-cpu).Microseconds())/float64(b.N), "cpu-us/op")
			b.ReportMetric(float64(waited.Microseconds())/float64(b.N), "wait-us/op")
			b.ReportMetric(float64(sent)/float64(b.N), "sent-B/op")
		})
	}
}
