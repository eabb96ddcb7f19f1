// Package plot draws a trace: where on the device a start reads, and how many bytes
// it has read at what time, coloured by the stream that they come from.
//
//	p, err := plot.New(t, plot.Options{Title: "team/app:v1", Index: ix, Names: names, Metadata: []int{0}})
//	err = p.WriteSVG(w) // or WritePNG
//
// The upper panel has a mark for each touch, at its time and its offset on the
// device, as high as the touch is long. The mark is broad and full for a miss, thin
// and pale for a hit. A strip at its right shows which stream lies where, read or not.
// The lower panel sums up the bytes, of each stream and of all.
//
// A picture stays legible and small whatever the trace is. A device is mostly
// free space, so long stretches that hold nothing are folded to narrow bands
// with their sizes on them.
// Marks that would cover each other become one, until at most [maxMarks] are left.
// Curves have a point for each step that can be told from the next one. Where an image
// has many layers, those that are read most have colours of their own.
package plot

import (
	"bytes"
	"cmp"
	"fmt"
	"image/color"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// Options are what else is known of a trace, and the size of its picture.
type Options struct {
	Title string // for instance the image's name
	// Index is that of the image. Without it the picture has one colour, and
	// does not tell free space from data that was not read.
	Index    *blockmap.Index
	Names    []string // of the streams of Index, by position; a stream without one is numbered
	Metadata []int    // the streams of Index that hold metadata of the filesystem: they are grey

	Width, Height int // pixels of a PNG, 1/96 inch of an SVG; 0 for DefaultWidth and DefaultHeight
}

// Sizes of pictures, in pixels.
const (
	DefaultWidth  = 1200
	DefaultHeight = 800
	MinSize       = 300
	MaxSize       = 8192
)

const (
	// maxMarks bounds what is drawn of the touches.
	maxMarks = 8000
	// maxCurve bounds the points of one curve.
	maxCurve = 1000
)

// Picture is a trace ready to be drawn. It does not change.
type Picture struct {
	title, about  string
	width, height int

	span   time.Duration // of the axis of time
	fold   *fold         // the axis of offsets
	series []series      // those with most bytes first, one of several streams last
	all    []tracefile.Sum
	missed []tracefile.Sum // nil where it is as all
	strip  []stretch
}

// series is what has one colour.
type series struct {
	name, about  string
	colour       color.NRGBA
	streams      []int
	hits, misses []mark
	curve        []tracefile.Sum
	bytes        int64
}

// stretch is a part of the device that mostly holds what one series is about.
type stretch struct {
	from, to float64 // on the folded axis, 0 to 1
	series   int
}

// Colours that colour-blind people can tell apart, by Okabe and Ito. Yellow is left
// out: it is hard to see on white.
var palette = []color.NRGBA{
	{0x00, 0x72, 0xb2, 0xff}, // blue
	{0xd5, 0x5e, 0x00, 0xff}, // vermilion
	{0x00, 0x9e, 0x73, 0xff}, // green
	{0xcc, 0x79, 0xa7, 0xff}, // purple
	{0x56, 0xb4, 0xe9, 0xff}, // sky
	{0xe6, 0x9f, 0x00, 0xff}, // orange
}

var (
	colourMetadata = color.NRGBA{0x60, 0x60, 0x60, 0xff}
	colourOthers   = color.NRGBA{0x9c, 0x8f, 0x7a, 0xff}
	colourHoles    = color.NRGBA{0xb5, 0xb5, 0xb5, 0xff}
)

// New makes the picture of a trace. It fails with tracefile.ErrOtherImage where
// the trace is not of the image with that index.
func New(t *tracefile.Trace, o Options) (*Picture, error) {
	o.Width, o.Height = cmp.Or(o.Width, DefaultWidth), cmp.Or(o.Height, DefaultHeight)
	if min(o.Width, o.Height) < MinSize || max(o.Width, o.Height) > MaxSize {
		return nil, fmt.Errorf("plot: the picture is to be %d x %d pixels: width and height are from %d to %d", o.Width, o.Height, MinSize, MaxSize)
	}
	points, err := t.Points(o.Index)
	if err != nil {
		return nil, fmt.Errorf("plot: %w", err)
	}
	sum, err := t.Summarize(nil)
	if err != nil {
		return nil, fmt.Errorf("plot: %w", err)
	}
	p := &Picture{
		title: cmp.Or(o.Title, "a trace of index sha256:"+sum.Index[:12]), about: about(sum),
		width: o.Width, height: o.Height,
		span: max(sum.Duration, time.Millisecond), fold: newFold(points, o.Index),
		all: thinCurve(t.Curve(), sum.Duration),
	}
	p.series = split(points, o)
	for i := range p.series {
		s := &p.series[i]
		s.curve = thinCurve(curve(points, s.streams), sum.Duration)
	}
	if sum.Misses != sum.Bytes {
		missed := slices.DeleteFunc(slices.Clone(points), func(x tracefile.Point) bool { return !x.Miss })
		p.missed = thinCurve(curve(missed, nil), sum.Duration)
	}
	p.mark(points)
	if o.Index != nil {
		p.strip = p.layout(o.Index)
	}
	return p, nil
}

func about(s *tracefile.Summary) string {
	starts := "one start"
	if s.Starts > 1 {
		starts = fmt.Sprintf("%d starts, median times", s.Starts)
	}
	ranges := "ranges"
	if s.Ranges == 1 {
		ranges = "range"
	}
	text := fmt.Sprintf("%s: %s of a device of %s read in %d %s within %s, %s of it misses",
		starts, bytesString(s.Bytes), bytesString(s.Device), s.Ranges, ranges, timeString(s.Duration), bytesString(s.Misses))
	if s.Dropped > 0 {
		text += fmt.Sprintf("; %s not recorded", bytesString(s.Dropped))
	}
	if s.Cut != "" {
		text += "; cut short"
	}
	return text
}

// split chooses the streams that have a colour of their own: of those that are read,
// the metadata, and as many others as there are colours, most bytes first.
func split(points []tracefile.Point, o Options) []series {
	read := make(map[int]int64)
	for _, x := range points {
		read[x.Stream] += x.Extent.Len()
	}
	var streams []int
	for i := range read {
		streams = append(streams, i)
	}
	slices.SortFunc(streams, func(a, b int) int { return cmp.Or(cmp.Compare(read[b], read[a]), cmp.Compare(a, b)) })
	var all []series
	var others *series
	used := 0
	for _, i := range streams {
		s := series{streams: []int{i}, bytes: read[i], about: bytesString(read[i]) + " read"}
		switch {
		case i == tracefile.Hole && o.Index == nil:
			s.name, s.colour = "what was read", palette[0]
		case i == tracefile.Hole:
			s.name, s.colour = "holes, all zeros", colourHoles
		case !slices.Contains(o.Metadata, i) && used == len(palette):
			if others == nil {
				others = &series{colour: colourOthers}
			}
			others.streams = append(others.streams, i)
			others.bytes += read[i]
			continue
		default:
			s.name = fmt.Sprintf("stream %d", i)
			if i < len(o.Names) {
				s.name = o.Names[i]
			}
			size := int64(o.Index.Streams[i].Blocks()) * blockmap.BlockSize
			s.about = fmt.Sprintf("%s of %s read", bytesString(read[i]), bytesString(size))
			s.colour = colourMetadata
			if !slices.Contains(o.Metadata, i) {
				s.colour = palette[used]
				used++
			}
		}
		all = append(all, s)
	}
	if others != nil {
		others.name = fmt.Sprintf("%d other streams", len(others.streams))
		others.about = bytesString(others.bytes) + " read"
		all = append(all, *others)
	}
	return all
}

// curve is the sum of the points in streams, or of all where there are none.
func curve(points []tracefile.Point, streams []int) []tracefile.Sum {
	if len(streams) == 1 {
		return tracefile.CurveOf(points, streams[0])
	}
	const one = 0
	some := make([]tracefile.Point, 0, len(points))
	for _, x := range points {
		if streams == nil || slices.Contains(streams, x.Stream) {
			x.Stream = one
			some = append(some, x)
		}
	}
	return tracefile.CurveOf(some, one)
}

// thinCurve leaves the last point of each of maxCurve steps of time: as the sum
// only grows, nothing that can be seen is lost.
func thinCurve(curve []tracefile.Sum, span time.Duration) []tracefile.Sum {
	if len(curve) <= maxCurve {
		return curve
	}
	step := func(x tracefile.Sum) int64 { return int64(float64(x.At) / float64(span+1) * (maxCurve - 1)) }
	thin := []tracefile.Sum{curve[0]}
	for i, x := range curve {
		if i == len(curve)-1 || step(x) != step(curve[i+1]) {
			thin = append(thin, x)
		}
	}
	return thin
}

// seriesOf says which series a stream is in.
func (p *Picture) seriesOf() map[int]int {
	of := make(map[int]int)
	for i := range p.series {
		for _, stream := range p.series[i].streams {
			of[stream] = i
		}
	}
	return of
}

// WriteSVG writes the picture as SVG. Its text stays text, in the viewer's sans-serif
// font.
func (p *Picture) WriteSVG(w io.Writer) error {
	b, err := p.svg()
	if err != nil {
		return err
	}
	_, err = io.Copy(w, bytes.NewReader(b))
	return err
}

// WritePNG writes the picture as PNG.
func (p *Picture) WritePNG(w io.Writer) error { return p.png(w) }
