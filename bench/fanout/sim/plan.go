package sim

import (
	"bufio"
	_ "embed"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Plan is what a start reads.
type Plan struct {
	Chunks []Chunk
	Reads  []Read
	// Manifest is how many bytes each host reads from the registry before its first read,
	// beside the index: the manifest. Index is the bytes of the index, which a host of a
	// zone reads through the zone.
	Manifest, Index int64
}

// Chunk is a chunk of the plan, or a piece of a bundle.
type Chunk struct {
	Stream, Number int   // its place in the image
	Stored, Size   int64 // bytes from the registry, and from a peer
}

// Read is a read of the program. The program waits until the chunk is resident.
type Read struct {
	Chunk int           // position in Plan.Chunks
	After time.Duration // time that the program works before this read
}

// Stored returns how many bytes the plan's chunks have in the registry.
func (p *Plan) Stored() (n int64) {
	for _, c := range p.Chunks {
		n += c.Stored
	}
	return n
}

// Size returns how many bytes the plan's chunks have uncompressed.
func (p *Plan) Size() (n int64) {
	for _, c := range p.Chunks {
		n += c.Size
	}
	return n
}

// Work returns the time that a start takes if all of its chunks are resident.
func (p *Plan) Work() (d time.Duration) {
	for _, r := range p.Reads {
		d += r.After
	}
	return d
}

// Bundle returns the plan of a start that downloads a bundle of this many bytes in pieces. The
// reads are those of p. A read waits for the piece at the same part of the way.
func (p *Plan) Bundle(bytes, piece int64) *Plan {
	b := &Plan{Manifest: p.Manifest, Index: p.Index}
	for off := int64(0); off < bytes; off += piece {
		n := min(piece, bytes-off)
		b.Chunks = append(b.Chunks, Chunk{Number: len(b.Chunks), Stored: n, Size: n})
	}
	for i, r := range p.Reads {
		b.Reads = append(b.Reads, Read{Chunk: i * len(b.Chunks) / len(p.Reads), After: r.After})
	}
	return b
}

// withIndex returns the plan with the index as its last chunk, which no read is of.
func (p *Plan) withIndex() *Plan {
	q := *p
	q.Chunks = append(slices.Clone(p.Chunks), Chunk{Stream: -1, Stored: p.Index, Size: p.Index})
	q.Index = 0
	return &q
}

// Uniform returns a plan of n chunks of one size, read with one time between them.
func Uniform(n int, stored, size int64, after time.Duration) *Plan {
	p := &Plan{Manifest: 2 << 10, Index: 16 << 10}
	for i := range n {
		p.Chunks = append(p.Chunks, Chunk{Number: i, Stored: stored, Size: size})
		p.Reads = append(p.Reads, Read{i, after})
	}
	return p
}

// Shuffled returns p with its chunks at random places of the image, so that no two are
// neighbours.
func (p *Plan) Shuffled(seed uint64) *Plan {
	q := *p
	q.Chunks = append([]Chunk(nil), p.Chunks...)
	for i, n := range rand.New(rand.NewPCG(seed, 1)).Perm(len(q.Chunks)) {
		q.Chunks[i].Number = 1000 * n
	}
	return &q
}

// Write writes a plan as text, a line for each chunk and read:
//
//	open MANIFEST INDEX
//	chunk STREAM NUMBER STORED SIZE
//	read CHUNK MICROSECONDS
func (p *Plan) Write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "open %d %d\n", p.Manifest, p.Index)
	for _, c := range p.Chunks {
		fmt.Fprintf(&b, "chunk %d %d %d %d\n", c.Stream, c.Number, c.Stored, c.Size)
	}
	for _, r := range p.Reads {
		fmt.Fprintf(&b, "read %d %d\n", r.Chunk, r.After.Microseconds())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// ReadPlan reads what Write wrote.
func ReadPlan(from io.Reader) (*Plan, error) {
	p := new(Plan)
	in := bufio.NewScanner(from)
	for n := 1; in.Scan(); n++ {
		var c Chunk
		var i int
		var us int64
		line := in.Text()
		word, rest, _ := strings.Cut(line, " ")
		var err error
		switch word {
		case "open":
			_, err = fmt.Sscanf(rest, "%d %d", &p.Manifest, &p.Index)
		case "chunk":
			_, err = fmt.Sscanf(rest, "%d %d %d %d", &c.Stream, &c.Number, &c.Stored, &c.Size)
			if err == nil && (c.Stream < 0 || c.Number < 0 || c.Stored <= 0 || c.Size <= 0 || c.Stored > maxChunk || c.Size > maxChunk) {
				err = fmt.Errorf("a chunk of %d bytes, stored as %d", c.Size, c.Stored)
			}
			p.Chunks = append(p.Chunks, c)
		case "read":
			_, err = fmt.Sscanf(rest, "%d %d", &i, &us)
			if err == nil && (i < 0 || i >= len(p.Chunks) || us < 0 || us > maxWork) {
				err = fmt.Errorf("a read of chunk %d of %d after %d us", i, len(p.Chunks), us)
			}
			p.Reads = append(p.Reads, Read{i, time.Duration(us) * time.Microsecond})
		default:
			err = fmt.Errorf("unknown word %q", word)
		}
		if err == nil && (p.Manifest < 0 || p.Index < 0 || p.Manifest > maxChunk || p.Index > maxChunk || len(p.Chunks) > maxChunks) {
			err = fmt.Errorf("%d chunks, a manifest of %d bytes, an index of %d", len(p.Chunks), p.Manifest, p.Index)
		}
		if err != nil {
			return nil, fmt.Errorf("plan, line %d: %w", n, err)
		}
	}
	return p, in.Err()
}

// Bounds of what a plan may have.
const (
	maxChunk  = 64 << 20 // bytes
	maxChunks = 1 << 16
	maxWork   = 3600e6 // microseconds
)

//go:embed plans/flask
var flask string

// Flask returns the plan of a start of flask on Debian, recorded by bench/fanout -plan with
// everything resident.
func Flask() *Plan {
	p, err := ReadPlan(strings.NewReader(flask))
	if err != nil {
		panic(err) // a test reads it
	}
	return p
}

// FlaskBundle is how many bytes the bundle of that start has.
const FlaskBundle = 9828390
