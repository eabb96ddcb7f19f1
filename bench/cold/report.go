package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"thaw/bench"
)

// report writes the tables, says which aims are met, and draws the plots.
func (r *results) report(w io.Writer, plots string) error {
	for _, l := range r.links() {
		if _, err := fmt.Fprintf(w, "\n%s link: %v\n\n", l.name, l); err != nil {
			return err
		}
		if _, err := r.table(l).WriteTo(w); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprint(w, "\nWhere the time went, by the last timeline of each row\n\n"); err != nil {
		return err
	}
	if _, err := r.phases().WriteTo(w); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, n := range r.notes {
		fmt.Fprintln(w, n)
	}
	for _, a := range r.aims() {
		if _, err := fmt.Fprintln(w, a); err != nil {
			return err
		}
	}
	if plots == "" {
		return nil
	}
	return r.draw(plots)
}

// table returns what each row took over a link.
func (r *results) table(l link) *bench.Table {
	t := &bench.Table{Columns: []string{"image", "row", "rounds", "time", "of the limit", "times local-cold", "requests", "from the far side", "share of the image"}}
	for _, image := range r.images() {
		for _, row := range r.rows() {
			name := startName(image, l.name, row)
			n := r.rec.Rounds(name, bench.Wall)
			if n == 0 {
				continue
			}
			came := r.rec.Median(name, wireBytes)
			t.Row(image, row, fmt.Sprint(n), bench.Seconds(r.seconds(image, l, row)*1e9), ratio(r.toLimit(image, l, row)), ratio(r.ratio(image, l, row, localCold)),
				fmt.Sprintf("%.0f", r.rec.Median(name, requests)), bench.Bytes(came), percent(came/r.rec.Median(planName(image), imageUnit)))
		}
		if limit := r.limit(image, l); !math.IsNaN(limit) {
			planned := r.rec.Median(planName(image), planUnit)
			t.Row(image, "the limit", "", bench.Seconds(limit*1e9), "1.00", "", "", bench.Bytes(planned), percent(planned/r.rec.Median(planName(image), imageUnit)))
		}
	}
	return t
}

// phases divides the times of the rows that fetch.
func (r *results) phases() *bench.Table {
	t := &bench.Table{Columns: []string{"link", "image", "row", "ready or pulled", "mounted or unpacked", "99 % of bytes", "line busy until then", "answer", "the program alone"}}
	for _, l := range r.links() {
		for _, image := range r.images() {
			for _, row := range r.rows() {
				name := startName(image, l.name, row)
				first := or(r.rec.Median(name, ready+"-ns"), r.rec.Median(name, pulled+"-ns"))
				second := or(r.rec.Median(name, mounted+"-ns"), r.rec.Median(name, unpacked+"-ns"))
				if math.IsNaN(first) && math.IsNaN(second) {
					continue
				}
				cells := []string{l.name, image, row, bench.Seconds(first), bench.Seconds(second), "", "", bench.Seconds(r.seconds(image, l, row) * 1e9), bench.Seconds(r.rec.Median(name, runTime))}
				if line := r.timelines[name]; line != nil && line.bytes() > 0 {
					done := line.by(0.99)
					cells[5], cells[6] = bench.Seconds(float64(done)), percent(line.busy(l.rate, done))
				}
				t.Row(cells...)
			}
		}
	}
	return t
}

func or(a, b float64) float64 {
	if math.IsNaN(a) {
		return b
	}
	return a
}

func ratio(x float64) string { return number("%.2f", x) }

func percent(x float64) string { return number("%.1f %%", 100*x) }

func number(format string, x float64) string {
	if math.IsNaN(x) {
		return ""
	}
	return fmt.Sprintf(format, x)
}

// aim is a bound for a ratio.
type aim struct {
	what, image string
	got, bound  float64
	atLeast     bool // bound is the minimum, not the maximum
}

func (a aim) met() bool {
	if a.atLeast {
		return a.got >= a.bound
	}
	return a.got <= a.bound
}

func (a aim) String() string {
	kind, word := "at most", "missed"
	if a.atLeast {
		kind = "at least"
	}
	if a.met() {
		word = "met"
	}
	return fmt.Sprintf("aim %s: %s of %s %.2f, %s %.2f", word, a.what, a.image, a.got, kind, a.bound)
}

// aims returns the aims for which there are figures. They apply to links with the
// properties of slow and fast.
func (r *results) aims() []aim {
	var aims []aim
	add := func(a aim) {
		if !math.IsNaN(a.got) {
			aims = append(aims, a)
		}
	}
	for _, l := range r.links() {
		for _, image := range r.images() {
			if strings.HasSuffix(image, "-"+everything.name) {
				add(aim{"thaw to full-pull over " + l.String(), image, r.ratio(image, l, thawPlain, fullPull), 0.9, false})
				continue
			}
			switch l {
			case slow:
				add(aim{"thaw-bundle to the limit over " + l.String(), image, r.toLimit(image, l, thawBundle), 1.15, false})
				add(aim{"thaw-trace to the limit over " + l.String(), image, r.toLimit(image, l, thawTrace), 1.5, false})
				if slices.Contains([]string{"flask", "sklearn"}, image) { // those with the smaller working sets
					add(aim{"full-pull to thaw over " + l.String(), image, r.ratio(image, l, fullPull, thawPlain), 2, true})
				}
			case fast:
				add(aim{"thaw-bundle to local-cold over " + l.String(), image, r.ratio(image, l, thawBundle, localCold), 1.1, false})
				add(aim{"thaw-trace to local-cold over " + l.String(), image, r.ratio(image, l, thawTrace, localCold), 1.15, false})
			}
		}
	}
	return aims
}
