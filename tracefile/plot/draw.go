package plot

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"io"
	"slices"

	gonum "gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"

	"thaw/tracefile"
)

const (
	dpi = 96

	margin      = 14 // points
	legendWidth = 168
	lowerPart   = 0.38 // of the height

	missWidth, hitWidth = 2.4, 1.2 // of marks
	minHeight           = 2.0      // of marks
)

var (
	ink   = color.NRGBA{0x22, 0x22, 0x22, 0xff}
	faint = color.NRGBA{0x6a, 0x6a, 0x6a, 0xff}
	lines = color.NRGBA{0xe2, 0xe2, 0xe2, 0xff}
	band  = color.NRGBA{0xf2, 0xf2, 0xf2, 0xff}
)

func (p *Picture) png(w io.Writer) error {
	c := vgimg.NewWith(vgimg.UseImage(image.NewRGBA(image.Rect(0, 0, p.width, p.height))), vgimg.UseDPI(dpi))
	p.draw(draw.New(c))
	_, err := vgimg.PngCanvas{Canvas: c}.WriteTo(w)
	return err
}

func (p *Picture) svg() ([]byte, error) {
	c := vgsvg.New(vg.Length(p.width)*vg.Inch/dpi, vg.Length(p.height)*vg.Inch/dpi)
	p.draw(draw.New(c))
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return nil, err
	}
	// Few machines know this font by the name that gonum gives it.
	return bytes.ReplaceAll(b.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;")), nil
}

func style(size vg.Length, c color.Color) text.Style {
	return text.Style{
		Color: c, Font: font.Font{Typeface: "Liberation", Variant: "Sans", Size: size},
		XAlign: draw.XLeft, YAlign: draw.YTop, Handler: gonum.DefaultTextHandler,
	}
}

func (p *Picture) draw(c draw.Canvas) {
	c.SetColor(color.White)
	c.Fill(c.Rectangle.Path())
	c = draw.Crop(c, margin, -margin, margin, -margin)

	big, small := style(14, ink), style(9.5, faint)
	wide := c.Max.X - c.Min.X
	c.FillText(big, vg.Point{X: c.Min.X, Y: c.Max.Y}, fit(big, p.title, wide))
	c.FillText(small, vg.Point{X: c.Min.X, Y: c.Max.Y - 19}, fit(small, p.about, wide))
	c.Max.Y -= 42

	panels := draw.Crop(c, 0, -legendWidth, 0, 0)
	edge := panels.Min.Y + (panels.Max.Y-panels.Min.Y)*lowerPart
	upper, lower := draw.Crop(panels, 0, 0, edge-panels.Min.Y+8, 0), draw.Crop(panels, 0, 0, 0, edge-panels.Max.Y-8)
	above, below := p.offsets(upper), p.sums(lower)
	align(above, below, &upper, &lower)
	above.Draw(upper)
	below.Draw(lower)
	p.legend(draw.Crop(c, panels.Max.X-c.Min.X+18, 0, 0, 0))
}

// align gives both panels the same place for the same time.
func align(a, b *gonum.Plot, upper, lower *draw.Canvas) {
	x, y := a.DataCanvas(*upper), b.DataCanvas(*lower)
	left, right := max(x.Min.X, y.Min.X), min(x.Max.X, y.Max.X)
	*upper = draw.Crop(*upper, left-x.Min.X, right-x.Max.X, 0, 0)
	*lower = draw.Crop(*lower, left-y.Min.X, right-y.Max.X, 0, 0)
}

// panel is an empty one, with its axis of time.
func (p *Picture) panel(c draw.Canvas) *gonum.Plot {
	a := gonum.New()
	a.BackgroundColor = nil
	for _, axis := range []*gonum.Axis{&a.X, &a.Y} {
		axis.Color = faint
		axis.Width = 0.6
		axis.Padding = 0
		axis.Tick.Color = faint
		axis.Tick.Width = 0.6
		axis.Tick.Length = 4
		axis.Label.Padding = 4
		align := axis.Tick.Label
		axis.Tick.Label = style(9.5, ink)
		axis.Tick.Label.XAlign, axis.Tick.Label.YAlign = align.XAlign, align.YAlign
		align = axis.Label.TextStyle
		axis.Label.TextStyle = style(10, ink)
		axis.Label.TextStyle.XAlign, axis.Label.TextStyle.YAlign = align.XAlign, align.YAlign
	}
	span := p.span.Seconds()
	a.X.Min, a.X.Max = -span/100, span*1.01
	a.X.Label.Text = fmt.Sprintf("time since the first read (%s)", timeUnit(p.span))
	a.X.Tick.Marker = marker(timeTicks(p.span, max(2, int((c.Max.X-c.Min.X)/60))))
	grid := plotter.NewGrid()
	grid.Vertical = draw.LineStyle{Color: lines, Width: 0.5}
	grid.Horizontal = grid.Vertical
	a.Add(grid)
	return a
}

func marker(ticks []tick) gonum.ConstantTicks {
	var all gonum.ConstantTicks
	for _, t := range ticks {
		all = append(all, gonum.Tick{Value: t.at, Label: t.label})
	}
	return all
}

// offsets is the upper panel.
func (p *Picture) offsets(c draw.Canvas) *gonum.Plot {
	a := p.panel(c)
	a.X.Label.Text = "" // the lower panel's is for both
	a.Y.Min, a.Y.Max = -0.01, 1.01
	a.Y.Label.Text = "offset on the device"
	a.Y.Tick.Marker = marker(p.fold.ticks(max(2, int((c.Max.Y-c.Min.Y)/32))))
	a.Add(plotFunc(func(c draw.Canvas, a *gonum.Plot) {
		x, y := a.Transforms(&c)
		p.drawGaps(c, y)
		p.drawStrip(c, y)
		for i := range p.series {
			s := &p.series[i]
			drawMarks(c, s.hits, x, y, pale(s.colour), hitWidth)
		}
		for i := range p.series {
			s := &p.series[i]
			drawMarks(c, s.misses, x, y, s.colour, missWidth)
		}
	}))
	return a
}

// plotFunc is a gonum.Plotter.
type plotFunc func(draw.Canvas, *gonum.Plot)

func (f plotFunc) Plot(c draw.Canvas, a *gonum.Plot) { f(c, a) }

func drawMarks(c draw.Canvas, marks []mark, x, y func(float64) vg.Length, col color.Color, width vg.Length) {
	if len(marks) == 0 {
		return
	}
	var path vg.Path
	for _, m := range marks {
		from, to := y(m.from), y(m.to)
		if short := minHeight - (to - from); short > 0 {
			from, to = from-short/2, to+short/2
		}
		path.Move(vg.Point{X: x(m.at), Y: from})
		path.Line(vg.Point{X: x(m.at), Y: to})
	}
	c.SetLineStyle(draw.LineStyle{Color: col, Width: width})
	c.Stroke(path)
}

// drawGaps labels the folded stretches.
func (p *Picture) drawGaps(c draw.Canvas, y func(float64) vg.Length) {
	what := "not read"
	if p.strip != nil {
		what = "without content"
	}
	small := style(8.5, faint)
	small.XAlign, small.YAlign = draw.XCenter, draw.YCenter
	for _, g := range p.fold.gaps {
		from, to := y(p.fold.at(g.Start)), y(p.fold.at(g.End))
		c.FillPolygon(band, box(c.Min.X, from, c.Max.X, to))
		for _, at := range []vg.Length{from, to} {
			c.StrokeLine2(draw.LineStyle{Color: faint, Width: 0.5, Dashes: []vg.Length{2, 2}}, c.Min.X, at, c.Max.X, at)
		}
		if to-from < 9 {
			continue // no room for text
		}
		c.FillText(small, vg.Point{X: (c.Min.X + c.Max.X) / 2, Y: (from + to) / 2}, bytesString(g.Len())+" "+what)
	}
}

// drawStrip draws what lies where, beside the panel.
func (p *Picture) drawStrip(c draw.Canvas, y func(float64) vg.Length) {
	for _, s := range p.strip {
		// The panel's canvas is not clipped to.
		c.SetColor(p.series[s.series].colour)
		c.Fill(path(box(c.Max.X+3, y(s.from), c.Max.X+9, y(s.to))))
	}
}

func box(x0, y0, x1, y1 vg.Length) []vg.Point {
	return []vg.Point{{X: x0, Y: y0}, {X: x1, Y: y0}, {X: x1, Y: y1}, {X: x0, Y: y1}}
}

func path(points []vg.Point) (p vg.Path) {
	p.Move(points[0])
	for _, x := range points[1:] {
		p.Line(x)
	}
	p.Close()
	return p
}

// sums is the lower panel.
func (p *Picture) sums(c draw.Canvas) *gonum.Plot {
	a := p.panel(c)
	top := 4096.0
	if n := len(p.all); n > 0 {
		top = float64(p.all[n-1].Bytes)
	}
	a.Y.Min, a.Y.Max = 0, top*1.04
	a.Y.Label.Text = "bytes read until then"
	a.Y.Tick.Marker = marker(byteTicks(top, max(2, int((c.Max.Y-c.Min.Y)/30))))
	a.Add(p.line(p.all, styleAll))
	if p.missed != nil {
		a.Add(p.line(p.missed, styleMissed))
	}
	if len(p.series) == 1 {
		return a // the curve of the only series is that of all
	}
	// Small ones above large ones, so that none hides another for good.
	for i := range p.series {
		s := &p.series[i]
		a.Add(p.line(s.curve, draw.LineStyle{Color: s.colour, Width: 1.6}))
	}
	return a
}

var (
	styleAll    = draw.LineStyle{Color: ink, Width: 2.4}
	styleMissed = draw.LineStyle{Color: ink, Width: 1.2, Dashes: []vg.Length{4, 2}}
)

// line is a curve in steps, from zero at its first touch to the end of the
// picture.
func (p *Picture) line(curve []tracefile.Sum, style draw.LineStyle) *plotter.Line {
	var xys plotter.XYs
	if len(curve) > 0 {
		xys = append(xys, plotter.XY{X: curve[0].At.Seconds()})
		for _, s := range curve {
			xys = append(xys, plotter.XY{X: s.At.Seconds(), Y: float64(s.Bytes)})
		}
		xys = append(xys, plotter.XY{X: p.span.Seconds(), Y: float64(curve[len(curve)-1].Bytes)})
	}
	return &plotter.Line{XYs: xys, StepStyle: plotter.PostStep, LineStyle: style}
}

// pale is the colour of hits.
func pale(c color.NRGBA) color.NRGBA {
	mix := func(v uint8) uint8 { return uint8((int(v)*55 + 255*45) / 100) }
	return color.NRGBA{mix(c.R), mix(c.G), mix(c.B), 0xff}
}

// legend is beside the panels, never on them.
func (p *Picture) legend(c draw.Canvas) {
	name, about := style(10, ink), style(8.5, faint)
	wide := c.Max.X - c.Min.X - 20
	y := c.Max.Y
	entry := func(sample func(left, right, middle vg.Length), texts ...string) {
		sample(c.Min.X, c.Min.X+13, y-6)
		for i, t := range texts {
			s := name
			if i > 0 {
				s = about
			}
			c.FillText(s, vg.Point{X: c.Min.X + 20, Y: y}, fit(s, t, wide))
			y -= 12.5
		}
		y -= 5
	}
	for i := range p.series {
		s := &p.series[i]
		entry(func(left, right, middle vg.Length) {
			c.FillPolygon(s.colour, box(left, middle-5, right, middle+5))
		}, s.name, s.about)
	}
	if len(p.series) == 0 {
		c.FillText(name, vg.Point{X: c.Min.X, Y: y}, "nothing was read")
		y -= 18
	}
	y -= 8
	sample := color.NRGBA{0x60, 0x60, 0x60, 0xff}
	if len(p.series) == 1 {
		sample = p.series[0].colour
	}
	if slices.ContainsFunc(p.series, func(s series) bool { return s.misses != nil }) {
		entry(bars(c, sample, missWidth), "miss", "was not there, was waited for")
	}
	if slices.ContainsFunc(p.series, func(s series) bool { return s.hits != nil }) {
		entry(bars(c, pale(sample), hitWidth), "hit", "was there already")
	}
	if p.strip != nil {
		entry(func(left, _, middle vg.Length) {
			c.FillPolygon(sample, box(left+3, middle-5, left+9, middle+5))
		}, "right edge", "what lies where, read or not")
	}
	y = min(y-8, c.Min.Y+(c.Max.Y-c.Min.Y)*lowerPart-8)
	line := func(st draw.LineStyle) func(left, right, middle vg.Length) {
		return func(left, right, middle vg.Length) { c.StrokeLine2(st, left, middle, right, middle) }
	}
	if len(p.all) > 0 {
		entry(line(styleAll), "all", bytesString(p.all[len(p.all)-1].Bytes))
	}
	if n := len(p.missed); n > 0 {
		entry(line(styleMissed), "misses", bytesString(p.missed[n-1].Bytes))
	}
}

func bars(c draw.Canvas, col color.Color, width vg.Length) func(left, right, middle vg.Length) {
	return func(left, _, middle vg.Length) {
		for i, high := range []vg.Length{3, 5, 2} {
			x := left + 2 + vg.Length(i)*4.5
			c.StrokeLine2(draw.LineStyle{Color: col, Width: width}, x, middle-high, x, middle+high)
		}
	}
}

// fit shortens a text to what fits.
func fit(s text.Style, t string, width vg.Length) string {
	if s.Width(t) <= width {
		return t
	}
	r := []rune(t)
	for len(r) > 0 && s.Width(string(r)+"…") > width {
		r = r[:len(r)-1]
	}
	return string(r) + "…"
}
