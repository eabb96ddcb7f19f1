package flatten

import (
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// AnnotationGuess, on the manifest of a block image, predicts which blocks of the
// device a start will read first. The prediction is made from the image alone: the
// program of its config, and the files that the kernel and the dynamic linker read to
// start it. A start that has no trace prefetches these blocks and need not fetch them
// one after the other. (The metadata of the filesystem is in a stream of its own, and
// needs no prediction.) It is a hint: ranges in the order in which they will be read,
// as at most 16 KiB of base64 (RFC 4648 section 4, without padding) of
//
//	0  1  version, 1
//	1     ranges, at most 4096, to the end; for each
//	          signed varint: first block, less the end of the range before
//	          varint: blocks, not 0; at most 24576 (96 MiB) in all ranges
//
// A manifest is read before anything else, so a guess costs no request.
const AnnotationGuess = "vnd.thaw.guess"

const (
	guessVersion   = 1
	maxGuessText   = 16 << 10
	maxGuessRanges = 4096
	maxGuessBlocks = 96 << 20 / blockSize
)

// Guess returns the guess of the image, as extents of a device of that many blocks, in
// the order in which a start will read them. It is nil if the image has none. Every
// extent lies on the device; the guess may still be wrong.
func (m *Image) Guess(blocks uint32) ([]blockmap.Extent, error) {
	text, ok := m.Annotations[AnnotationGuess]
	if !ok {
		return nil, nil
	}
	l, err := decodeGuess(text, blocks)
	if err != nil {
		return nil, fmt.Errorf("guess: %w", err)
	}
	return l, nil
}

func decodeGuess(text string, blocks uint32) ([]blockmap.Extent, error) {
	if len(text) > maxGuessText {
		return nil, fmt.Errorf("%w: %d bytes of text", blockmap.ErrCorrupt, len(text))
	}
	b, err := base64.RawStdEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockmap.ErrCorrupt, err)
	}
	d := blockmap.NewDecoder(b)
	if v := d.Uvarint(math.MaxInt8); d.Err() == nil && v != guessVersion {
		return nil, fmt.Errorf("%w: version %d, this program reads %d", blockmap.ErrCorrupt, v, guessVersion)
	}
	var l []blockmap.Extent
	var end int64 // block
	total := uint64(0)
	for d.Err() == nil && d.Len() > 0 {
		skip := d.Varint()
		n := d.Uvarint(maxGuessBlocks)
		// Clamped so that the sum cannot overflow: such a skip is wrong anyway.
		if start := end + min(max(skip, -1<<33), 1<<33); start < 0 || n == 0 || start+int64(n) > int64(blocks) {
			d.Fail("a range of %d blocks at block %d of %d", n, start, blocks)
		} else {
			end = start + int64(n)
			l = append(l, blockmap.Extent{Start: start * blockSize, End: end * blockSize})
		}
		if total += n; total > maxGuessBlocks || len(l) > maxGuessRanges {
			d.Fail("%d blocks in %d ranges", total, len(l))
		}
	}
	if d.Err() != nil {
		return nil, d.Err()
	}
	return l, nil
}

// guess collects blocks of the device in the order in which they will be read, each
// block once.
type guess struct {
	ranges []blockRange
	seen   map[uint32]bool
	length int // of the encoding, at most
	full   bool
}

type blockRange struct{ start, count uint32 }

func (g *guess) add(start, count uint32) {
	if g.seen == nil {
		g.seen = make(map[uint32]bool)
	}
	for b := start; b < start+count && !g.full; b++ {
		if g.seen[b] {
			continue
		}
		if k := len(g.ranges) - 1; k >= 0 && g.ranges[k].start+g.ranges[k].count == b {
			g.ranges[k].count++
		} else {
			const most = 5 + 3 + 3 // bytes of a range, and of the count of the one before
			if len(g.ranges) == maxGuessRanges || base64.RawStdEncoding.EncodedLen(1+g.length+most) > maxGuessText {
				g.full = true
				return
			}
			end := uint32(0)
			if k >= 0 {
				end = g.ranges[k].start + g.ranges[k].count
				g.length += len(binary.AppendUvarint(nil, uint64(g.ranges[k].count)))
			}
			g.length += len(binary.AppendVarint(nil, int64(b)-int64(end)))
			g.ranges = append(g.ranges, blockRange{b, 1})
		}
		g.seen[b] = true
	}
}

// guessOf is a guess of these extents.
func guessOf(extents []blockmap.Extent) *guess {
	g := new(guess)
	for _, e := range extents {
		g.add(uint32(e.Start/blockSize), uint32(e.Len()/blockSize))
	}
	return g
}

func (g *guess) extents() []blockmap.Extent {
	l := make([]blockmap.Extent, len(g.ranges))
	for i, r := range g.ranges {
		l[i] = blockmap.Range(int64(r.start)*blockSize, int64(r.count)*blockSize)
	}
	return l
}

func (g *guess) encode() string {
	b := []byte{guessVersion}
	var end uint32
	for _, r := range g.ranges {
		b = binary.AppendVarint(b, int64(r.start)-int64(end))
		b = binary.AppendUvarint(b, uint64(r.count))
		end = r.start + r.count
	}
	return base64.RawStdEncoding.EncodeToString(b)
}

// GuessReport sums up a guess.
type GuessReport struct {
	Files  int
	Bytes  int64 // of the device
	Chunks int   // that contain a part of it
	Stored int64 // bytes of these in their blobs
}

// locate turns parts of files into blocks of the device.
func locate(ix *blockmap.Index, wants []want) (*guess, GuessReport) {
	g := new(guess)
	var report GuessReport
	// By place in the streams, which no two runs share.
	runs := slices.Clone(ix.Runs)
	byPlace := func(a, b blockmap.Run) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Block, b.Block))
	}
	slices.SortFunc(runs, byPlace)
	left := uint32(maxGuessBlocks)
	files := make(map[*ext4.Inode]bool)
	for _, w := range wants {
		first, last := uint32(w.off/blockSize), uint32((w.off+w.n-1)/blockSize)
		for _, r := range runsFrom(w.inode, int64(first)) {
			if r.FileBlock > last || left == 0 || g.full {
				break
			}
			files[w.inode] = true
			from := max(first, r.FileBlock)
			block, count := r.Block+from-r.FileBlock, min(last, r.FileBlock+r.Count-1)-from+1
			for count = min(count, left); count > 0; {
				i, ok := slices.BinarySearchFunc(runs, blockmap.Run{Stream: r.Stream, Block: block}, byPlace)
				if !ok {
					i--
				}
				skip := block - runs[i].Block
				n := min(count, runs[i].Count-skip)
				g.add(runs[i].Device+skip, n)
				block, count, left = block+n, count-n, left-n
			}
		}
	}
	report.Files = len(files)
	chunks := make(map[[2]uint32]bool)
	for _, r := range g.ranges {
		report.Bytes += int64(r.count) * blockSize
		for b := r.start; b < r.start+r.count; b++ {
			run, ok := ix.Lookup(b)
			if !ok {
				continue
			}
			t := &ix.Streams[run.Stream]
			i := t.Find(run.Block + b - run.Device)
			if k := [2]uint32{run.Stream, uint32(i)}; !chunks[k] {
				chunks[k] = true
				report.Stored += int64(t.Chunks[i].Stored)
			}
		}
	}
	report.Chunks = len(chunks)
	return g, report
}
