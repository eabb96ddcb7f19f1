package fetcher_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// leaf is a leaf of a world's chunk.
type leaf struct {
	blockmap.Want
	i int
}

// want is what a reader of the leaf asks for.
func (x leaf) want() blockmap.Want {
	w := x.Want
	w.Leaves = blockmap.LeafRange(x.i, 1)
	return w
}

// leaves lists all leaves of chunks with at least this many, each content once, in random
// order.
func (w *world) leaves(t *testing.T, least int, seed uint64) (all []leaf) {
	t.Helper()
	seen := make(map[blockmap.Digest]bool)
	for _, x := range w.wants(t) {
		c := &x.Table.Chunks[x.Chunk]
		if c.Leaves() < least || seen[c.Digest] {
			continue
		}
		seen[c.Digest] = true
		for i := range c.Leaves() {
			all = append(all, leaf{x, i})
		}
	}
	rand.New(rand.NewPCG(seed, 8)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

func (w *world) content(t *testing.T, x blockmap.Want) []byte {
	t.Helper()
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	c := &x.Table.Chunks[x.Chunk]
	content, err := dec.Decode(c, w.Blobs[x.Table.Blob][c.Offset:c.Offset+int64(c.Stored)], nil)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// bundleLeaves makes a bundle of leaves, each a part, with a number of them in each frame.
// Its wants are all places that have their content.
func (w *world) bundleLeaves(t *testing.T, leaves []leaf, each int) *load {
	t.Helper()
	l := w.bundle(t, nil)
	places := make(map[blockmap.Digest][]blockmap.Want)
	for _, x := range w.wants(t) {
		d := x.Table.Chunks[x.Chunk].Digest
		places[d] = append(places[d], x)
	}
	lists := make(map[blockmap.Digest]*blockmap.LeafList)
	chunks := make(map[blockmap.Digest][]byte)
	var content []byte
	for n, x := range leaves {
		if n%each == 0 {
			l.Frames = append(l.Frames, fetcher.Frame{})
			content = nil
		}
		c := &x.Table.Chunks[x.Chunk]
		if lists[c.Digest] == nil {
			chunk := w.content(t, x.Want)
			chunks[c.Digest] = chunk
			list, err := blockmap.NewLeafList(c, blockmap.LeafDigests(nil, chunk))
			if err != nil {
				t.Fatal(err)
			}
			lists[c.Digest] = list
		}
		content = append(content, chunks[c.Digest][x.i*blockmap.LeafSize:][:c.LeafSize(x.i)]...)
		f := &l.Frames[len(l.Frames)-1]
		f.Parts = append(f.Parts, fetcher.Part{Leaf: x.i, Count: 1, Size: c.LeafSize(x.i), List: lists[c.Digest], Wants: places[c.Digest]})
		if n%each == each-1 || n == len(leaves)-1 {
			frame := frameOf(t, content)
			f.Stored = int64(len(frame))
			l.frames = append(l.frames, frame...)
			l.ends = append(l.ends, int64(len(l.frames)))
		}
	}
	return l
}

// read demands a leaf, and returns how long that took.
func (w *world) readLeaf(t *testing.T, x leaf) time.Duration {
	t.Helper()
	began := time.Now()
	if err := w.fetcher.From(w.origin).Fetch(t.Context(), []blockmap.Want{x.want()}); err != nil {
		t.Error(err)
	}
	if !x.want().Here() {
		t.Error("the leaf that was fetched is not resident")
	}
	return time.Since(began)
}

// A bundle makes its leaves resident, and no others.
func TestBundleOfLeaves(t *testing.T) {
	m := blocktest.NewImage(t, 180, 3000)
	for _, each := range []int{1, 3, 16} {
		w := newWorld(t, m, fetcher.Options{})
		all := w.leaves(t, 2, 1)
		some := all[:len(all)/2]
		l := w.bundleLeaves(t, some, each)
		r := w.replay(t, l, nil)
		checkDone(t, r)
		r.Stop()
		for n, x := range all {
			if here := x.want().Here(); here != (n < len(some)) {
				t.Errorf("leaf %d of %d: resident %v", n, len(some), here)
			}
			if n >= len(some) {
				continue
			}
			v := make([]byte, x.Table.Chunks[x.Chunk].LeafSize(x.i))
			if !viewLeaf(t, w, x, v) || !bytes.Equal(v, w.content(t, x.Want)[x.i*blockmap.LeafSize:][:len(v)]) {
				t.Errorf("leaf %d has wrong bytes", n)
			}
		}
		if st := w.fetcher.Stats(); st.Leaves < int64(len(some)) || st.Chunks != 0 || w.origin.Requests() != 0 || w.fetcher.Fetches() != 0 {
			t.Errorf("%+v, %d requests, %d fetches left", st, w.origin.Requests(), w.fetcher.Fetches())
		}
		w.checkAll(t) // the rest comes by chunks
		for n, asked := range w.origin.Asked() {
			if asked != 1 {
				t.Errorf("%v was asked for %d times", n, asked)
			}
		}
	}
}

// viewLeaf copies a leaf that is resident to p, if it is on the device.
func viewLeaf(t *testing.T, w *world, x leaf, p []byte) bool {
	t.Helper()
	for _, r := range w.Index.Runs {
		if &w.Index.Streams[r.Stream] != x.Table {
			continue
		}
		first := x.Table.Chunks[x.Chunk].Block + uint32(x.i)*blockmap.LeafBlocks
		if n := uint32(len(p) / blockmap.BlockSize); r.Block <= first && first+n <= r.Block+r.Count {
			e := blockmap.Range(int64(r.Device+first-r.Block)*blockmap.BlockSize, int64(len(p)))
			v, ok := w.device.View(e)
			if !ok {
				return false
			}
			defer v.Release()
			return v.CopyTo(p) == nil
		}
	}
	copy(p, w.content(t, x.Want)[x.i*blockmap.LeafSize:]) // it spans two runs
	return true
}

// A reader waits for the leaf that it needs, and not for others of its chunk, wherever in
// the bundle these are.
func TestReadersOfLeaves(t *testing.T) {
	m := blocktest.NewImage(t, 181, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: 30 * time.Millisecond})
		all := w.leaves(t, 3, 2)
		// The first leaf of the first chunk comes early and its second leaf last; the third
		// is not in the bundle.
		a := leaf{all[0].Want, 0}
		var order []leaf
		for _, x := range all {
			if x.Stream != a.Stream || x.Chunk != a.Chunk {
				order = append(order, x)
			}
		}
		early, last, never := 12, leaf{a.Want, 1}, leaf{a.Want, 2}
		order = append(order[:early:early], append([]leaf{a}, append(order[early:], last)...)...)
		l := w.bundleLeaves(t, order, 1)
		l.pace = 10 * time.Millisecond
		r := w.replay(t, l, nil)
		time.Sleep(105 * time.Millisecond)
		// Ten frames have arrived; the leaf is in the thirteenth.
		if d := w.readLeaf(t, a); d > 40*time.Millisecond || w.origin.Requests() != 0 {
			t.Errorf("a leaf that the bundle brings soon took %v and %d requests", d, w.origin.Requests())
		}
		if last.want().Here() || never.want().Here() {
			t.Error("more than the leaf has come")
		}
		// What is here costs nothing, though the chunk is still downloading.
		if d := w.readLeaf(t, a); d != 0 {
			t.Errorf("a leaf that is resident took %v", d)
		}
		// A leaf that the bundle does not have comes by a request at once.
		if d := w.readLeaf(t, never); d > 40*time.Millisecond || w.origin.Requests() != 1 {
			t.Errorf("a leaf that is not in the bundle took %v and %d requests", d, w.origin.Requests())
		}
		// The request has brought the chunk.
		if !last.want().Here() || w.readLeaf(t, last) != 0 {
			t.Error("the request has not brought the whole chunk")
		}
		// A leaf far behind comes by a request, too, and so does its chunk.
		far := order[len(order)-10]
		if d := w.readLeaf(t, far); d > 50*time.Millisecond || w.origin.Requests() != 2 {
			t.Errorf("a leaf far away took %v and %d requests", d, w.origin.Requests())
		}
		checkDone(t, r)
		if n := w.origin.Requests(); n != 2 || w.fetcher.Fetches() != 0 {
			t.Errorf("%d requests, %d fetches left", n, w.fetcher.Fetches())
		}
		w.checkAll(t)
	})
}

// Several readers of one chunk wait for different leaves: each is woken by its own.
func TestEachReaderIsWokenByItsLeaf(t *testing.T) {
	m := blocktest.NewImage(t, 182, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		all := w.leaves(t, 4, 3)
		x := all[0].Want
		order := []leaf{{x, 2}, {x, 0}, {x, 3}, {x, 1}}
		l := w.bundleLeaves(t, order, 1)
		l.let(0, nil)
		r := w.replay(t, l, nil)
		synctest.Wait()
		came := make(chan int, 4)
		for i := range 4 {
			go func() {
				w.readLeaf(t, leaf{x, i})
				came <- i
			}()
		}
		synctest.Wait()
		for n, want := range order {
			l.let(l.ends[n], nil)
			synctest.Wait()
			if len(came) != 1 {
				t.Fatalf("frame %d has come, and %d readers were woken", n, len(came))
			}
			if i := <-came; i != want.i {
				t.Errorf("leaf %d has come, and the reader of leaf %d was woken", want.i, i)
			}
		}
		checkDone(t, r)
		if n := w.origin.Requests(); n != 0 {
			t.Errorf("%d requests", n)
		}
	})
}

// A reader that needs a leaf soon and one that never comes waits for a request, and the
// other reader of the chunk for the bundle.
func TestReadersOfOneChunk(t *testing.T) {
	m := blocktest.NewImage(t, 183, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: 20 * time.Millisecond})
		x := w.leaves(t, 3, 4)[0].Want
		l := w.bundleLeaves(t, []leaf{{x, 0}, {x, 1}}, 1)
		l.let(0, nil)
		r := w.replay(t, l, nil)
		synctest.Wait()
		first, both := make(chan time.Duration, 1), make(chan time.Duration, 1)
		go func() { first <- w.readLeaf(t, leaf{x, 0}) }()
		synctest.Wait()
		if w.origin.Requests() != 0 {
			t.Fatal("the first reader does not wait for the bundle")
		}
		go func() {
			y := x
			y.Leaves = 0b101
			began := time.Now()
			if err := w.fetcher.From(w.origin).Fetch(t.Context(), []blockmap.Want{y}); err != nil || !y.Here() {
				t.Error("the second reader does not have its leaves", err)
			}
			both <- time.Since(began)
		}()
		synctest.Wait()
		if d := <-both; d > 30*time.Millisecond || w.origin.Requests() != 1 {
			t.Errorf("the second reader waited for %v, %d requests", d, w.origin.Requests())
		}
		<-first // the request has brought its leaf as well
		l.let(1<<40, nil)
		checkDone(t, r)
		if st := w.fetcher.Stats(); st.Leaves != 0 || st.Chunks != 1 {
			t.Errorf("what was there came again: %+v", st)
		}
	})
}

// The last leaf that a bundle brings of a chunk wakes its reader, also if a prefetch wants
// the rest of the chunk, which a request then brings.
func TestLastLeafWakesItsReader(t *testing.T) {
	m := blocktest.NewImage(t, 189, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		x := w.leaves(t, 3, 4)[0].Want
		l := w.bundleLeaves(t, []leaf{{x, 1}}, 1)
		l.let(0, nil)
		r := w.replay(t, l, nil)
		synctest.Wait()
		list := w.fetcher.From(w.origin).Replay(t.Context(), []blockmap.Want{x}, fetcher.ReplayOptions{})
		synctest.Wait()
		read := make(chan time.Duration, 1)
		go func() { read <- w.readLeaf(t, leaf{x, 1}) }()
		synctest.Wait()
		if len(read) > 0 || w.origin.Requests() > 0 {
			t.Fatal("the reader does not wait for the bundle")
		}
		l.let(1<<40, nil)
		synctest.Wait()
		if len(read) != 1 || <-read != 0 || x.Here() {
			t.Error("the reader waits for more than its leaf")
		}
		checkDone(t, list)
		checkDone(t, r)
		if n := w.origin.Requests(); n != 1 || !x.Here() {
			t.Errorf("%d requests for the rest of the chunk", n)
		}
	})
}

// A list behind a bundle is fetched only where it needs more than the bundle has brought.
func TestListBehindLeaves(t *testing.T) {
	m := blocktest.NewImage(t, 184, 3000)
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
	all := w.leaves(t, 3, 5)
	var order []leaf
	var list []blockmap.Want
	more := 0
	seen := make(map[blockmap.Digest]bool)
	for _, x := range all {
		d := x.Table.Chunks[x.Chunk].Digest
		if x.i < 2 {
			order = append(order, x)
		}
		if seen[d] {
			continue
		}
		seen[d] = true
		y := x.Want
		if y.Leaves = 0b011; len(seen)%3 == 0 {
			y.Leaves = 0b110
			more++
		}
		list = append(list, y)
	}
	l := w.bundleLeaves(t, order, 4)
	r := w.replay(t, l, list)
	checkDone(t, r)
	r.Stop()
	if n := w.origin.Requests(); n != more {
		t.Errorf("%d requests for %d chunks with leaves that the bundle lacks", n, more)
	}
	for _, y := range list {
		if !y.Here() {
			t.Error("a chunk of the list lacks what it needs")
		}
	}
	if n := w.fetcher.Fetches(); n != 0 {
		t.Errorf("%d fetches are left", n)
	}
}

// A wrong leaf ends the download. What it should have brought comes by requests to those
// who want it.
func TestWrongLeaf(t *testing.T) {
	m := blocktest.NewImage(t, 185, 2000)
	for name, lie := range map[string]func(l *load, bad int){
		"other content":    func(l *load, bad int) { l.replace(bad, frameOf(t, random(l.part(bad).Size))) },
		"less content":     func(l *load, bad int) { l.replace(bad, frameOf(t, random(l.part(bad).Size-4096))) },
		"another position": func(l *load, bad int) { l.part(bad).Leaf ^= 1 },
		"another list":     func(l *load, bad int) { l.part(bad).List = l.part(bad - 1).List },
	} {
		t.Run(name, func(t *testing.T) {
			var log warnings
			w := newWorld(t, m, fetcher.Options{Log: log.log()})
			var order []leaf
			seen := make(map[blockmap.Digest]bool)
			for _, x := range w.leaves(t, 4, 6) {
				if d := x.Table.Chunks[x.Chunk].Digest; !seen[d] {
					seen[d] = true
					order = append(order, x)
				}
			}
			l := w.bundleLeaves(t, order, 1)
			const bad = 5
			lie(l, bad)
			r := w.replay(t, l, nil)
			checkDone(t, r)
			r.Stop()
			if st := w.stats(t); st.Wrong != 1 || st.Failed != 0 || len(l.opens()) != 1 || len(log.lines()) != 1 {
				t.Errorf("%+v, opened at %v, it says %v", st, l.opens(), log.lines())
			}
			for n, x := range order {
				if !x.want().Here() {
					t.Errorf("leaf %d is not resident", n)
				}
			}
			w.checkAll(t)
		})
	}
}

// Leaves that another stream of the cache has are copied, also from a chunk that is there
// only in part, and the bundle is not downloaded for them.
func TestLeavesAreCopied(t *testing.T) {
	m := blocktest.NewImage(t, 186, 2000)
	w := newWorld(t, m, fetcher.Options{})
	// All leaves but the last of each chunk.
	var order []leaf
	for _, x := range w.leaves(t, 2, 7) {
		if x.i < x.Table.Chunks[x.Chunk].Leaves()-1 {
			order = append(order, x)
		}
	}
	l := w.bundleLeaves(t, order, 2)
	checkDone(t, w.replay(t, l, nil))
	// The same chunks in other streams, which have a chunk more.
	next := &blocktest.Image{Index: new(blockmap.Index), Blobs: m.Blobs}
	for i := range m.Index.Streams {
		chunks := [][]byte{random(blockmap.BlockSize * (i + 1))}
		for _, x := range w.wants(t) {
			if x.Table == &m.Index.Streams[i] {
				chunks = append(chunks, w.content(t, x))
			}
		}
		table, _ := blocktest.Stream(t, chunks)
		next.Index.Streams = append(next.Index.Streams, *table)
	}
	next.Index.Blocks, next.Index.Runs = 1, nil
	if err := next.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	v := &world{Image: next, origin: w.origin, cache: w.cache, fetcher: w.fetcher}
	places := make(map[blockmap.Digest][]blockmap.Want)
	for _, x := range v.wants(t) {
		d := x.Table.Chunks[x.Chunk].Digest
		places[d] = append(places[d], x)
	}
	again := w.bundleLeaves(t, order, 2)
	for i := range again.Frames {
		for j := range again.Frames[i].Parts {
			p := &again.Frames[i].Parts[j]
			p.Wants = places[p.Wants[0].Table.Chunks[p.Wants[0].Chunk].Digest]
		}
	}
	r := w.replay(t, again, nil)
	checkDone(t, r)
	r.Stop()
	if st := w.stats(t); len(again.opens()) != 0 || st.Local == 0 || w.origin.Requests() != 0 {
		t.Errorf("opened at %v, %d copies, %d requests", again.opens(), st.Local, w.origin.Requests())
	}
	for _, x := range order {
		for _, y := range places[x.Table.Chunks[x.Chunk].Digest] {
			if y.Leaves = blockmap.LeafRange(x.i, 1); !y.Here() {
				t.Error("a leaf was not copied")
			}
		}
	}
}

// A reader gets a leaf of a bundle that the disk has no room for.
func TestLeavesOnAFullDisk(t *testing.T) {
	m := blocktest.NewImage(t, 187, 2000)
	synctest.Test(t, func(t *testing.T) {
		var log warnings
		w, bound := roomless(t, m, unix.ENOSPC, &log)
		x := w.leaves(t, 4, 8)[0].Want
		l := w.bundleLeaves(t, []leaf{{x, 3}, {x, 1}, {x, 0}}, 1)
		l.let(0, nil)
		r := w.replay(t, l, nil)
		synctest.Wait()
		read := make(chan error)
		go func() { read <- bound.Fetch(t.Context(), []blockmap.Want{leaf{x, 1}.want()}) }()
		synctest.Wait()
		l.let(l.ends[1], nil)
		if err := <-read; err != nil || !(leaf{x, 1}).want().Here() || (leaf{x, 0}).want().Here() {
			t.Errorf("%v", err)
		}
		if n := w.origin.Requests(); n != 0 || w.cache.Held() == 0 {
			t.Errorf("%d requests, %d bytes in memory", n, w.cache.Held())
		}
		r.Stop()
	})
}

// The leaves that other versions of an image have lost are not looked at; those that are
// left come, unless they are too few.
func TestBundleOfAnotherVersion(t *testing.T) {
	m := blocktest.NewImage(t, 188, 3000)
	for _, lost := range []int{2, 8} { // of ten
		t.Run(fmt.Sprint(lost), func(t *testing.T) {
			w := newWorld(t, m, fetcher.Options{})
			order := w.leaves(t, 2, 9)
			l := w.bundleLeaves(t, order, 3)
			n := 0
			var kept []leaf
			for i := range l.Frames {
				for j := range l.Frames[i].Parts {
					if n%10 < lost {
						l.Frames[i].Parts[j].Wants = nil
					} else {
						kept = append(kept, order[n])
					}
					n++
				}
			}
			r := w.replay(t, l, nil)
			checkDone(t, r)
			r.Stop()
			for _, x := range kept {
				if !x.want().Here() {
					t.Error("a leaf that both versions have did not come")
				}
			}
			if opened := len(l.opens()) > 0; opened != (lost < 5) || (w.origin.Requests() > 0) == opened {
				t.Errorf("the bundle was opened: %v; %d requests", opened, w.origin.Requests())
			}
			if errors.Is(r.Progress().Err, blockmap.ErrDigest) {
				t.Error(r.Progress().Err)
			}
		})
	}
}
