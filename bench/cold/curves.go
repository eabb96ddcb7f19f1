package main

import (
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// timeFigure shows, for each link, the bytes that it has carried against time. The
// left panel has all rows that fetch, the right one those with a trace or a bundle.
func (r *results) timeFigure(image string) *figure {
	f := &figure{title: "What the link carried when: " + image, height: 3.4 * vg.Inch}
	drawn := make(map[string]bool)
	for _, l := range r.links() {
		var all, planned []*timeline
		for _, row := range r.rows() {
			t := r.timelines[startName(image, l.name, row)]
			if t == nil {
				continue
			}
			drawn[row] = true
			all = append(all, t)
			if row == thawTrace || row == thawBundle {
				planned = append(planned, t)
			}
		}
		if len(all) == 0 {
			continue
		}
		row := []*plot.Plot{r.curves(image, l, l.String(), all)}
		if len(planned) > 0 && len(planned) < len(all) {
			row = append(row, r.curves(image, l, l.String()+", with a trace or a bundle", planned))
		}
		f.panels = append(f.panels, row)
	}
	for _, row := range r.rows() {
		if drawn[row] {
			f.legend = append(f.legend, entry{text: row, line: r.curveStyle(row)})
		}
	}
	f.legend = append(f.legend, entry{text: "the plan at line rate", line: rateStyle}, entry{text: "the limit", line: limitStyle})
	for _, k := range markKinds {
		f.legend = append(f.legend, entry{text: k.name, glyph: glyph(k.name, color.Black)})
	}
	return f
}

var rateStyle = draw.LineStyle{Color: color.Gray{0x60}, Width: vg.Points(1), Dashes: []vg.Length{vg.Points(1.5), vg.Points(2)}}

func (r *results) curveStyle(row string) draw.LineStyle {
	return draw.LineStyle{Color: r.colour(row), Width: vg.Points(1.6)}
}

// answered is the mark at the end of each timeline.
const answered = "answer"

var markKinds = []struct {
	name  string
	shape draw.GlyphDrawer
}{{ready, draw.PyramidGlyph{}}, {mounted, draw.BoxGlyph{}}, {answered, draw.CircleGlyph{}}}

func glyph(name string, c color.Color) draw.GlyphStyle {
	for _, k := range markKinds {
		if k.name == name {
			return draw.GlyphStyle{Color: c, Radius: vg.Points(3.5), Shape: k.shape}
		}
	}
	return draw.GlyphStyle{}
}

const mib = 1 << 20

func (r *results) curves(image string, l link, title string, lines []*timeline) *plot.Plot {
	p := newPanel(title, "seconds since the launch", "MiB from the far side")
	p.Add(plotter.NewGrid())
	c := curves{limit: r.limit(image, l)}
	if planned := r.rec.Median(planName(image), planUnit); !math.IsNaN(planned) {
		c.rate = plotter.XYs{{X: 2 * l.rtt.Seconds(), Y: 0}, {X: l.carries(planned).Seconds(), Y: planned / mib}}
	}
	for _, t := range lines {
		c.lines = append(c.lines, t)
		c.styles = append(c.styles, r.curveStyle(t.row))
	}
	p.Add(c)
	p.X.Min, p.Y.Min = 0, 0
	p.X.Max *= 1.03
	p.Y.Max *= 1.06
	p.X.Padding, p.Y.Padding = 0, 0
	return p
}

// curves are timelines in one plot.
type curves struct {
	lines  []*timeline
	styles []draw.LineStyle
	rate   plotter.XYs
	limit  float64 // seconds; NaN if unknown
}

// DataRange returns the range of the axes.
func (v curves) DataRange() (xmin, xmax, ymin, ymax float64) {
	for _, t := range v.lines {
		xmax, ymax = max(xmax, t.answer.Seconds()), max(ymax, float64(t.bytes())/mib)
	}
	for _, xy := range v.rate {
		xmax, ymax = max(xmax, xy.X), max(ymax, xy.Y)
	}
	if !math.IsNaN(v.limit) {
		xmax = max(xmax, v.limit)
	}
	return 0, xmax, 0, ymax
}

// Plot draws the timelines, the limit, and the plan at line rate.
func (v curves) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	if !math.IsNaN(v.limit) {
		c.StrokeLine2(limitStyle, x(v.limit), c.Min.Y, x(v.limit), c.Max.Y)
	}
	if len(v.rate) == 2 {
		c.StrokeLine2(rateStyle, x(v.rate[0].X), y(v.rate[0].Y), x(v.rate[1].X), y(v.rate[1].Y))
	}
	for i, t := range v.lines {
		points := []vg.Point{{X: x(0), Y: y(0)}}
		for j, n := range t.down {
			at := min(float64(j+1)*t.step.Seconds(), t.answer.Seconds())
			points = append(points, vg.Point{X: x(at), Y: y(float64(n) / mib)})
		}
		c.StrokeLines(v.styles[i], points)
	}
	for i, t := range v.lines {
		for _, m := range append(t.marks[:len(t.marks):len(t.marks)], mark{answered, t.answer}) {
			if g := glyph(m.name, v.styles[i].Color); g.Shape != nil {
				n := t.at(m.at)
				if m.name == answered {
					n = t.bytes()
				}
				c.DrawGlyph(g, vg.Point{X: x(m.at.Seconds()), Y: y(float64(n) / mib)})
			}
		}
	}
}
