package main

import (
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// barFigure has a panel for each image, with a bar for each row. Each panel has
// its own scale, because the times of different images are not comparable.
func (r *results) barFigure(l link) *figure {
	f := &figure{title: "Cold starts over " + l.String(), height: vg.Length(len(r.rows()))*0.25*vg.Inch + 1*vg.Inch}
	for _, image := range r.images() {
		b := r.bars(image, l)
		if len(b.rows) == 0 {
			continue
		}
		if n := len(f.panels); n == 0 || len(f.panels[n-1]) == 2 {
			f.panels = append(f.panels, nil)
		}
		last := &f.panels[len(f.panels)-1]
		*last = append(*last, b.panel(image))
	}
	f.legend = []entry{{text: "the limit", line: limitStyle}}
	return f
}

var limitStyle = draw.LineStyle{Color: color.Black, Width: vg.Points(1.5), Dashes: []vg.Length{vg.Points(4), vg.Points(3)}}

// bars are the rows of one image, the first at the top.
type bars struct {
	rows    []string
	seconds []float64
	colours []color.Color
	limit   float64 // NaN if unknown
}

func (r *results) bars(image string, l link) bars {
	b := bars{limit: r.limit(image, l)}
	for _, row := range slices.Backward(r.rows()) {
		if s := r.seconds(image, l, row); !math.IsNaN(s) {
			b.rows, b.seconds, b.colours = append(b.rows, row), append(b.seconds, s), append(b.colours, r.colour(row))
		}
	}
	return b
}

func (b bars) panel(image string) *plot.Plot {
	title := image
	if !math.IsNaN(b.limit) {
		title += fmt.Sprintf(" (limit %.2f s)", b.limit)
	}
	p := newPanel(title, "seconds to the answer, median", "")
	p.Add(b)
	p.NominalY(b.rows...)
	p.X.Min, p.Y.Min, p.Y.Max = 0, -0.6, float64(len(b.rows))-0.4
	p.X.Max *= 1.14 // room for the figures beside the bars
	p.X.Padding = 0
	return p
}

// DataRange returns the range of the axes.
func (b bars) DataRange() (xmin, xmax, ymin, ymax float64) {
	xmax = slices.Max(b.seconds)
	if !math.IsNaN(b.limit) {
		xmax = max(xmax, b.limit)
	}
	return 0, xmax, 0, float64(len(b.rows))
}

// Plot draws each bar with its figure, and the limit.
func (b bars) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	style := textStyle(9, draw.XLeft)
	for i, s := range b.seconds {
		low, high, end := y(float64(i)-0.36), y(float64(i)+0.36), x(s)
		c.FillPolygon(b.colours[i], []vg.Point{{X: x(0), Y: low}, {X: end, Y: low}, {X: end, Y: high}, {X: x(0), Y: high}})
	}
	if limit := x(b.limit); !math.IsNaN(b.limit) {
		c.StrokeLine2(limitStyle, limit, c.Min.Y, limit, c.Max.Y)
	}
	for i, s := range b.seconds {
		text := strconv.FormatFloat(s, 'f', 2, 64)
		at := vg.Point{X: x(s) + vg.Points(4), Y: y(float64(i))}
		// A white background, where the figure overlaps the line of the limit.
		c.FillPolygon(color.White, []vg.Point{
			{X: at.X - vg.Points(1), Y: at.Y - vg.Points(5)}, {X: at.X + style.Width(text) + vg.Points(1), Y: at.Y - vg.Points(5)},
			{X: at.X + style.Width(text) + vg.Points(1), Y: at.Y + vg.Points(5)}, {X: at.X - vg.Points(1), Y: at.Y + vg.Points(5)}})
		c.FillText(style, at, text)
	}
}
