package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"thaw/bench"
)

// Units of measures, besides those of package bench.
const (
	requests   = "requests"
	wireBytes  = "wire-B" // received over the link
	runTime    = "run-ns" // time of the program alone
	planUnit   = "plan-B" // compressed bytes that a start reads
	imageUnit  = "image-B"
	storedUnit = "stored-B"
	rttUnit    = "rtt-ns"
	rateUnit   = "bit/s"
)

// results are the rounds of this run, or of earlier ones.
type results struct {
	rec       *bench.Recorder
	w         io.Writer
	timelines map[string]*timeline // the last one, by name
	notes     []string             // why rows are missing
}

func newResults(w io.Writer) *results {
	return &results{rec: bench.NewRecorder(w), w: w, timelines: make(map[string]*timeline)}
}

func startName(image, link, row string) string {
	return "Cold/image=" + image + "/link=" + link + "/row=" + row
}

func planName(image string) string { return "Plan/image=" + image }

func linkName(l string) string { return "Link/link=" + l }

func (r *results) addLink(l link) error {
	if r.rec.Rounds(linkName(l.name), rateUnit) > 0 {
		return nil
	}
	return r.rec.Add(linkName(l.name), bench.Measure{Value: float64(l.rtt), Unit: rttUnit}, bench.Measure{Value: float64(l.rate), Unit: rateUnit})
}

func (r *results) addPlan(image string, planned, size, stored int64) error {
	return r.rec.Add(planName(image), bench.Measure{Value: float64(planned), Unit: planUnit},
		bench.Measure{Value: float64(size), Unit: imageUnit}, bench.Measure{Value: float64(stored), Unit: storedUnit})
}

func (r *results) addTimeline(t *timeline) error {
	r.timelines[t.name()] = t
	_, err := fmt.Fprintln(r.w, t)
	return err
}

const notePrefix = "Note "

// note records why a row is missing.
func (r *results) note(text string) error {
	if slices.Contains(r.notes, text) {
		return nil
	}
	r.notes = append(r.notes, text)
	_, err := fmt.Fprintln(r.w, notePrefix+text)
	return err
}

// readResults reads files that earlier runs have written.
func readResults(files []string) (*results, error) {
	r := newResults(io.Discard)
	for _, name := range files {
		if err := r.readFile(name); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if len(r.images()) == 0 {
		return nil, errors.New("the files have no round of any image")
	}
	return r, nil
}

func (r *results) readFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return r.rec.Read(f, func(line string) error {
		if text, ok := strings.CutPrefix(line, notePrefix); ok {
			return r.note(text)
		}
		if !strings.HasPrefix(line, timelinePrefix) {
			return nil
		}
		t, err := parseTimeline(line)
		if err != nil {
			return err
		}
		r.timelines[t.name()] = t
		return nil
	})
}

// part returns the value of a key in a name such as Cold/image=flask/link=slow.
func part(name, key string) string {
	for p := range strings.SplitSeq(name, "/") {
		if v, ok := strings.CutPrefix(p, key+"="); ok {
			return v
		}
	}
	return ""
}

// known returns the values of a key among all starts: first those in order, then
// the others by name.
func (r *results) known(key string, order []string) []string {
	var found []string
	for _, name := range r.rec.Names() {
		if v := part(name, key); strings.HasPrefix(name, "Cold/") && !slices.Contains(found, v) {
			found = append(found, v)
		}
	}
	slices.SortStableFunc(found, func(a, b string) int { return place(order, a) - place(order, b) })
	return found
}

func place(order []string, s string) int {
	if i := slices.Index(order, s); i >= 0 {
		return i
	}
	return len(order)
}

func (r *results) images() []string {
	var order []string
	for _, l := range loads {
		for _, image := range []string{"flask", "sklearn", "torch", "chromium"} {
			order = append(order, l.imageName(image))
		}
	}
	return r.known("image", order)
}

func (r *results) rows() []string {
	var order []string
	for _, row := range rows() {
		order = append(order, row.name)
	}
	return r.known("row", order)
}

func (r *results) links() []link {
	var links []link
	for _, name := range r.known("link", []string{slow.name, fast.name}) {
		links = append(links, link{name, time.Duration(r.rec.Median(linkName(name), rttUnit)), int64(r.rec.Median(linkName(name), rateUnit))})
	}
	return links
}

// times returns the rounds of a row, in nanoseconds.
func (r *results) times(image string, l link, row string) []float64 {
	return r.rec.Values(startName(image, l.name, row), bench.Wall)
}

func (r *results) seconds(image string, l link, row string) float64 {
	return bench.Median(r.times(image, l, row)) / 1e9
}

// limits returns, round by round, the time that no start by this transport over
// this link can beat: the longer of the time of resident, and the time that the
// line needs for what a start touches. It is empty if one of the two is unknown.
func (r *results) limits(image string, l link) []float64 {
	planned := r.rec.Median(planName(image), planUnit)
	if math.IsNaN(planned) {
		return nil
	}
	limits := r.times(image, l, resident)
	for i := range limits {
		limits[i] = max(limits[i], float64(l.carries(planned)))
	}
	return limits
}

func (r *results) limit(image string, l link) float64 { return bench.Median(r.limits(image, l)) / 1e9 }

// toLimit returns the median of the rounds' ratios to the limit.
func (r *results) toLimit(image string, l link, row string) float64 {
	return bench.MedianRatio(r.times(image, l, row), r.limits(image, l))
}

// ratio returns the median of the rounds' ratios of one row to another.
func (r *results) ratio(image string, l link, row, to string) float64 {
	return bench.MedianRatio(r.times(image, l, row), r.times(image, l, to))
}
