package tracefile

import (
	"cmp"
	"slices"
	"time"

	"thaw/blockmap"
)

// Summary is a trace in a few numbers. Durations are in nanoseconds in JSON.
type Summary struct {
	Index    string        `json:"index"` // its digest
	Starts   int           `json:"starts"`
	Duration time.Duration `json:"duration_ns"` // from the first read to the last touch
	Recorded time.Duration `json:"recorded_ns"` // from the first read to the end of the recording
	Ended    string        `json:"ended"`
	Cut      string        `json:"cut,omitempty"` // why the file ends early

	Device  int64 `json:"device_bytes"`
	Ranges  int   `json:"ranges"`
	Blocks  int64 `json:"blocks"`
	Bytes   int64 `json:"bytes"`
	Hits    int64 `json:"hit_bytes"`
	Misses  int64 `json:"miss_bytes"`
	Dropped int64 `json:"dropped_bytes"`

	// Times is when 10, 25, 50, 75, 90, 99 and 100 percent of the bytes had
	// been touched.
	Times []Percentile `json:"times"`
	// Streams is what lies in each stream of the image, where an index was
	// given: those of which something was touched, holes last.
	Streams []StreamSummary `json:"streams,omitempty"`
}

// Percentile is when a share of a trace had been touched.
type Percentile struct {
	Percent int           `json:"percent"`
	At      time.Duration `json:"at_ns"`
}

// StreamSummary is the part of a trace that lies in one stream.
type StreamSummary struct {
	Stream int           `json:"stream"` // position in the index; Hole is none
	Size   int64         `json:"stream_bytes"`
	Bytes  int64         `json:"bytes"`
	Misses int64         `json:"miss_bytes"`
	Chunks int           `json:"chunks"`
	Stored int64         `json:"stored_bytes"` // the chunks, compressed
	First  time.Duration `json:"first_ns"`
	Last   time.Duration `json:"last_ns"`
}

// Hole stands for a stream where a device reads as zeros, or where no index
// says what is there.
const Hole = -1

// Summarize sums the trace up. ix may be nil; else it fails with ErrOtherImage
// where the trace is not of that image.
func (t *Trace) Summarize(ix *blockmap.Index) (*Summary, error) {
	s := &Summary{
		Index: t.Index.String(), Starts: int(t.Starts), Recorded: t.After, Ended: t.Why.String(),
		Device: int64(t.Blocks) * blockmap.BlockSize, Ranges: len(t.Touches),
		Dropped: int64(t.Dropped) * blockmap.BlockSize,
	}
	if t.Cut != nil {
		s.Cut = t.Cut.Error()
	}
	for _, x := range t.Touches {
		s.Blocks += int64(x.Count)
		s.Bytes += x.Bytes()
		if x.Miss {
			s.Misses += x.Bytes()
		} else {
			s.Hits += x.Bytes()
		}
		s.Duration = max(s.Duration, x.At)
	}
	curve := t.Curve()
	for _, percent := range []int{10, 25, 50, 75, 90, 99, 100} {
		i := slices.IndexFunc(curve, func(x Sum) bool { return x.Bytes*100 >= s.Bytes*int64(percent) })
		if i >= 0 {
			s.Times = append(s.Times, Percentile{percent, curve[i].At})
		}
	}
	if ix == nil {
		return s, nil
	}
	p, err := NewPlan(t, ix)
	if err != nil {
		return nil, err
	}
	streams := make([]StreamSummary, len(ix.Streams)+1) // the last one for holes
	hole := &streams[len(ix.Streams)]
	for x, run := range pieces(ix, t.Touches) {
		part := hole
		if run.Count > 0 {
			part = &streams[run.Stream]
		}
		if part.Bytes == 0 {
			part.First = x.At
		}
		part.First, part.Last = min(part.First, x.At), max(part.Last, x.At)
		part.Bytes += x.Bytes()
		if x.Miss {
			part.Misses += x.Bytes()
		}
	}
	for _, step := range p.Steps {
		if step.New {
			streams[step.Stream].Chunks++
			streams[step.Stream].Stored += int64(p.Chunk(step).Stored)
		}
	}
	for i := range streams {
		if streams[i].Bytes == 0 {
			continue
		}
		streams[i].Stream = Hole
		if i < len(ix.Streams) {
			streams[i].Stream = i
			streams[i].Size = int64(ix.Streams[i].Blocks()) * blockmap.BlockSize
		}
		s.Streams = append(s.Streams, streams[i])
	}
	return s, nil
}

// Point is one mark of a picture of a trace: offset on the device against time,
// coloured by stream.
type Point struct {
	At     time.Duration
	Extent blockmap.Extent // of the device
	Stream int             // position in Index.Streams, or Hole
	Miss   bool
	Starts int
}

// Points are the touches of the trace, each in one stream, in the trace's order.
// Where ix is nil the stream is Hole everywhere. It fails with ErrOtherImage
// where the trace is not of that image.
func (t *Trace) Points(ix *blockmap.Index) ([]Point, error) {
	if ix == nil {
		points := make([]Point, 0, len(t.Touches))
		for _, x := range t.Touches {
			points = append(points, point(x, Hole))
		}
		return points, nil
	}
	if err := t.is(ix); err != nil {
		return nil, err
	}
	if err := t.check(); err != nil {
		return nil, err
	}
	points := make([]Point, 0, len(t.Touches))
	for x, run := range pieces(ix, t.Touches) {
		stream := Hole
		if run.Count > 0 {
			stream = int(run.Stream)
		}
		points = append(points, point(x, stream))
	}
	return points, nil
}

func point(x Touch, stream int) Point {
	return Point{At: x.At, Extent: x.Extent(), Stream: stream, Miss: x.Miss, Starts: int(max(x.Starts, 1))}
}

// Sum is a point of the curve of bytes against time.
type Sum struct {
	At    time.Duration
	Bytes int64 // touched until then, this one included
}

// Curve is how many bytes had been touched at which time: one point for each
// touch, in order of time.
func (t *Trace) Curve() []Sum {
	points := make([]Sum, 0, len(t.Touches))
	for _, x := range t.Touches {
		points = append(points, Sum{x.At, x.Bytes()})
	}
	slices.SortStableFunc(points, func(a, b Sum) int { return cmp.Compare(a.At, b.At) })
	var n int64
	for i := range points {
		n += points[i].Bytes
		points[i].Bytes = n
	}
	return points
}

// CurveOf is the Curve of the points that lie in one stream. The curves of all streams
// show which layer a start waits for at what time.
func CurveOf(points []Point, stream int) []Sum {
	var t Trace
	for _, p := range points {
		if p.Stream == stream {
			t.Touches = append(t.Touches, Touch{At: p.At, Count: uint32(p.Extent.Len() / blockmap.BlockSize)})
		}
	}
	return t.Curve()
}
