package main

import (
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// colours of the systems: blue for thaw, warm colours for the others.
var colours = map[string]color.Color{
	"zone": color.NRGBA{R: 0x1f, G: 0x63, B: 0xb5, A: 0xff}, "registry": color.NRGBA{R: 0xb5, G: 0x41, B: 0x3a, A: 0xff},
	"pull-through": color.NRGBA{R: 0xe8, G: 0xa5, B: 0x5c, A: 0xff}, "tree": color.NRGBA{R: 0xc9, G: 0xa2, B: 0x27, A: 0xff},
}

// draw draws the distribution of the start times of each scenario, as SVG and PNG.
func (b *benchmark) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i := 0; i < len(b.simulated); {
		n := i
		for n < len(b.simulated) && b.simulated[n].scenario == b.simulated[i].scenario {
			n++
		}
		p := distribution(b.simulated[i:n])
		for _, format := range []string{".svg", ".png"} {
			if err := p.Save(6*vg.Inch, 3.6*vg.Inch, filepath.Join(dir, "fanout-"+b.simulated[i].scenario+format)); err != nil {
				return errors.Join(err, fmt.Errorf("draw %s", b.simulated[i].scenario))
			}
		}
		i = n
	}
	return nil
}

// distribution shows how many starts have ended at which time.
func distribution(results []simulated) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = results[0].scenario, "seconds since the start, logarithmic", "starts that have ended, %"
	p.Title.TextStyle.Font = sans(12)
	for _, a := range []*plot.Axis{&p.X, &p.Y} {
		a.Label.TextStyle.Font, a.Tick.Label.Font = sans(11), sans(10)
	}
	p.Legend.TextStyle.Font, p.Legend.Top, p.Legend.Left = sans(10), false, false
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Add(plotter.NewGrid())
	line := func(name string, xy plotter.XYs, c color.Color, dashes []vg.Length) {
		l := &plotter.Line{XYs: xy, LineStyle: plotter.DefaultLineStyle}
		l.Color, l.Width, l.Dashes = c, vg.Points(1.6), dashes
		p.Add(l)
		p.Legend.Add(name, l)
	}
	for _, r := range results {
		var xy plotter.XYs
		for percent := range 101 {
			at := r.Percentile(float64(percent) / 100)
			xy = append(xy, plotter.XY{X: max(at, time.Millisecond).Seconds(), Y: float64(percent)})
		}
		line(r.system, xy, colours[r.system], nil)
	}
	lone := results[0].lone.Seconds()
	for i, name := range []string{"a lone host", "twice that"} {
		x := lone * float64(i+1)
		line(name, plotter.XYs{{X: x, Y: 0}, {X: x, Y: 100}}, color.Gray{0x60}, []vg.Length{vg.Points(4), vg.Points(float64(2*i + 2))})
	}
	p.Y.Min, p.Y.Max = 0, 100
	return p
}

func sans(size vg.Length) font.Font {
	return font.From(font.Font{Typeface: "Liberation", Variant: "Sans"}, size)
}
