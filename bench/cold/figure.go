package main

import (
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// draw writes a bar figure for each link and a figure of timelines for each image,
// as SVG and PNG.
func (r *results) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, l := range r.links() {
		if err := r.barFigure(l).save(dir, "cold-"+l.name); err != nil {
			return err
		}
	}
	for _, image := range r.images() {
		if f := r.timeFigure(image); len(f.panels) > 0 {
			if err := f.save(dir, "timeline-"+image); err != nil {
				return err
			}
		}
	}
	return nil
}

// figure is a title, panels in rows, and a legend below them.
type figure struct {
	title  string
	panels [][]*plot.Plot // by row; nil leaves a place empty
	height vg.Length      // of one row of panels
	legend []entry
}

// entry is an entry of a legend: a sample, and its meaning.
type entry struct {
	text  string
	line  draw.LineStyle  // not drawn if its width is zero
	glyph draw.GlyphStyle // not drawn if its shape is nil
}

const (
	panelWidth  = 5 * vg.Inch
	titleHeight = 0.4 * vg.Inch
	legendLine  = 0.25 * vg.Inch
	dpi         = 144
)

func (f *figure) save(dir, name string) error {
	columns := 0
	for _, row := range f.panels {
		columns = max(columns, len(row))
	}
	w := vg.Length(columns) * panelWidth
	lines := f.layLegend(w)
	h := titleHeight + vg.Length(len(f.panels))*f.height + vg.Length(len(lines))*legendLine
	png := vgimg.PngCanvas{Canvas: vgimg.NewWith(vgimg.UseWH(w, h), vgimg.UseDPI(dpi))}
	svg := vgsvg.New(w, h)
	for _, c := range []struct {
		vg.CanvasWriterTo
		format string
	}{{png, ".png"}, {svg, ".svg"}} {
		f.draw(draw.New(c), columns, lines)
		if err := writeTo(filepath.Join(dir, name+c.format), c); err != nil {
			return err
		}
	}
	return nil
}

func (f *figure) draw(c draw.Canvas, columns int, lines [][]entry) {
	c.FillPolygon(color.White, []vg.Point{{X: c.Min.X, Y: c.Min.Y}, {X: c.Max.X, Y: c.Min.Y}, {X: c.Max.X, Y: c.Max.Y}, {X: c.Min.X, Y: c.Max.Y}})
	c.FillText(textStyle(14, draw.XCenter), vg.Point{X: c.Center().X, Y: c.Max.Y - titleHeight/2}, f.title)
	below := vg.Length(len(lines)) * legendLine
	tiles := draw.Tiles{Rows: len(f.panels), Cols: columns, PadX: 0.15 * vg.Inch, PadY: 0.1 * vg.Inch, PadLeft: 0.1 * vg.Inch, PadRight: 0.2 * vg.Inch}
	grid := make([][]*plot.Plot, len(f.panels))
	for i, row := range f.panels {
		grid[i] = append(append([]*plot.Plot(nil), row...), make([]*plot.Plot, columns-len(row))...)
	}
	canvases := plot.Align(grid, tiles, draw.Crop(c, 0, 0, below, -titleHeight))
	for i, row := range grid {
		for j, p := range row {
			if p != nil {
				p.Draw(canvases[i][j])
			}
		}
	}
	for i, line := range lines {
		drawLegend(c, line, below-legendLine*(vg.Length(i)+0.5))
	}
}

const sampleWidth = 0.35 * vg.Inch

func (e entry) width() vg.Length {
	return sampleWidth + textStyle(10, draw.XLeft).Width(e.text) + 0.22*vg.Inch
}

// layLegend divides the legend into lines of at most the width w.
func (f *figure) layLegend(w vg.Length) (lines [][]entry) {
	var used vg.Length
	for _, e := range f.legend {
		if len(lines) == 0 || used+e.width() > w-0.3*vg.Inch {
			lines, used = append(lines, nil), 0
		}
		lines[len(lines)-1] = append(lines[len(lines)-1], e)
		used += e.width()
	}
	return lines
}

func drawLegend(c draw.Canvas, line []entry, y vg.Length) {
	var w vg.Length
	for _, e := range line {
		w += e.width()
	}
	x := c.Center().X - w/2
	for _, e := range line {
		if e.line.Width > 0 {
			c.StrokeLine2(e.line, x, y, x+sampleWidth-0.08*vg.Inch, y)
		}
		if e.glyph.Shape != nil {
			c.DrawGlyph(e.glyph, vg.Point{X: x + sampleWidth/2 - 0.04*vg.Inch, Y: y})
		}
		c.FillText(textStyle(10, draw.XLeft), vg.Point{X: x + sampleWidth, Y: y}, e.text)
		x += e.width()
	}
}

// newPanel returns an empty plot in the style that all panels share.
func newPanel(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding = vg.Points(6)
	p.Title.TextStyle.Font = sans(12)
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font = sans(11)
		a.Tick.Label.Font = sans(10)
	}
	return p
}

func sans(size vg.Length) font.Font {
	return font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size)
}

func textStyle(size vg.Length, x draw.XAlignment) draw.TextStyle {
	return draw.TextStyle{Color: color.Black, Font: sans(size), XAlign: x, YAlign: draw.YCenter, Handler: plot.DefaultTextHandler}
}

func writeTo(path string, c vg.CanvasWriterTo) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := c.WriteTo(f); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// colours of the rows: grey for those that fetch nothing, warm colours for peers,
// blue to green for thaw.
var colours = map[string]color.Color{
	localWarm: rgb(0xc4c4c4), localCold: rgb(0x969696), resident: rgb(0x5f5f5f),
	fullPull: rgb(0xb5413a), stargzRow: rgb(0xe8a55c), stargzOptimized: rgb(0xd96f14), nbdkitCurl: rgb(0xc9a227),
	thawPlain: rgb(0x7fb3e6), thawTrace: rgb(0x1f63b5), thawBundle: rgb(0x118a5b),
}

// others are the colours of variants, in turn.
var others = []color.Color{rgb(0x8a4fb5), rgb(0xd65fa8), rgb(0x26a5a5), rgb(0x6b4a2b)}

func (r *results) colour(row string) color.Color {
	if c, ok := colours[row]; ok {
		return c
	}
	n := 0
	for _, other := range r.rows() {
		if other == row {
			break
		}
		if colours[other] == nil {
			n++
		}
	}
	return others[n%len(others)]
}

func rgb(x uint32) color.Color {
	return color.NRGBA{R: uint8(x >> 16), G: uint8(x >> 8), B: uint8(x), A: 0xff}
}
