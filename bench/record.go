package bench

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Measure is a value in a unit of the Go benchmark format: "ns/op", "peak-RSS-B".
type Measure struct {
	Value float64
	Unit  string
}

// Recorder writes each round as a line of the Go benchmark format at once, and
// keeps it for a summary:
//
//	goos: linux
//	cpu: Some Processor
//	BenchmarkBuild/image=flask/tool=thaw 1 2339541144 ns/op 47054848 peak-RSS-B
//
// See https://go.dev/design/14313-benchmark-format.
type Recorder struct {
	w      io.Writer
	series map[string]map[string][]float64 // name, unit: rounds in order
}

// NewRecorder returns a Recorder that writes to w.
func NewRecorder(w io.Writer) *Recorder {
	return &Recorder{w: w, series: make(map[string]map[string][]float64)}
}

// Header writes what the figures depend on. Call it before Add.
func (r *Recorder) Header(pkg string, m Machine, more ...Fact) error {
	facts := []Fact{
		{"goos", runtime.GOOS}, {"goarch", runtime.GOARCH}, {"pkg", pkg}, {"cpu", m.CPU},
		{"cores", strconv.Itoa(m.Cores)}, {"memory", Bytes(m.Memory)}, {"kernel", m.Kernel},
		{"go", runtime.Version()}, {"load", m.Load}, {"date", m.Date.UTC().Format(time.DateOnly)},
	}
	for _, f := range append(facts, more...) {
		if _, err := fmt.Fprintf(r.w, "%s: %s\n", f.Key, oneLine(f.Value)); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(r.w)
	return err
}

// Fact is a line of a header. Its key has no capitals and no spaces.
type Fact struct{ Key, Value string }

// Add records a round. The name does not contain the word Benchmark, as in
// "Build/image=flask/tool=thaw".
func (r *Recorder) Add(name string, ms ...Measure) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Benchmark%s 1", strings.ReplaceAll(oneLine(name), " ", "_"))
	for _, m := range ms {
		fmt.Fprintf(&b, " %s %s", strconv.FormatFloat(m.Value, 'f', -1, 64), m.Unit)
	}
	r.keep(name, ms)
	_, err := fmt.Fprintln(r.w, b.String())
	return err
}

func (r *Recorder) keep(name string, ms []Measure) {
	if r.series[name] == nil {
		r.series[name] = make(map[string][]float64)
	}
	for _, m := range ms {
		r.series[name][m.Unit] = append(r.series[name][m.Unit], m.Value)
	}
}

// Read adds the rounds that a Recorder has written, and passes every other line
// to more, which may be nil.
func (r *Recorder) Read(from io.Reader, more func(line string) error) error {
	in := bufio.NewScanner(from)
	in.Buffer(nil, maxLine)
	for n := 1; in.Scan(); n++ {
		name, ms, ok, err := parseRound(in.Text())
		switch {
		case err != nil:
		case ok:
			r.keep(name, ms)
		case more != nil:
			err = more(in.Text())
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return in.Err()
}

const maxLine = 16 << 20

// parseRound reads a line that Add has written; ok is false for other lines.
func parseRound(line string) (name string, ms []Measure, ok bool, err error) {
	name, ok = strings.CutPrefix(line, "Benchmark")
	fields := strings.Fields(name)
	if !ok || len(fields) < 2 {
		return "", nil, false, nil
	}
	if len(fields)%2 != 0 {
		return "", nil, false, fmt.Errorf("a value without a unit in %q", line)
	}
	for i := 2; i < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return "", nil, false, fmt.Errorf("value of %s in %q: %w", fields[i+1], line, err)
		}
		ms = append(ms, Measure{v, fields[i+1]})
	}
	return fields[0], ms, true, nil
}

// Names returns the names of all series, sorted.
func (r *Recorder) Names() []string { return slices.Sorted(maps.Keys(r.series)) }

// Values returns the rounds of a series, in order.
func (r *Recorder) Values(name, unit string) []float64 { return slices.Clone(r.series[name][unit]) }

// Rounds returns how many rounds a series has.
func (r *Recorder) Rounds(name, unit string) int { return len(r.series[name][unit]) }

// Median returns the median of the rounds of a series; NaN if it has none.
func (r *Recorder) Median(name, unit string) float64 { return Median(r.series[name][unit]) }

// Max returns the largest value of the rounds of a series; NaN if it has none.
func (r *Recorder) Max(name, unit string) float64 {
	if len(r.series[name][unit]) == 0 {
		return math.NaN()
	}
	return slices.Max(r.series[name][unit])
}

// Ratio returns the median of a/b, round by round.
func (r *Recorder) Ratio(a, b, unit string) float64 {
	return MedianRatio(r.series[a][unit], r.series[b][unit])
}

// Median returns the middle value, or the mean of the two in the middle; NaN if v
// is empty.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// MedianRatio returns the median of a[i]/b[i], up to the shorter length. What
// slowed down one round has likely slowed down its neighbour, too.
func MedianRatio(a, b []float64) float64 {
	n := min(len(a), len(b))
	ratios := make([]float64, n)
	for i := range n {
		ratios[i] = a[i] / b[i]
	}
	return Median(ratios)
}

// Table is a table in Markdown.
type Table struct {
	Columns []string
	rows    [][]string
}

// Row adds a row. Missing cells stay empty.
func (t *Table) Row(cells ...string) { t.rows = append(t.rows, cells) }

// WriteTo writes the table with aligned columns: the first one to the left, the
// others to the right.
func (t *Table) WriteTo(w io.Writer) (int64, error) {
	width := make([]int, len(t.Columns))
	for _, row := range append([][]string{t.Columns}, t.rows...) {
		for i := range width {
			width[i] = max(width[i], len([]rune(cell(row, i))), 3)
		}
	}
	var b strings.Builder
	line := func(row []string) {
		for i, n := range width {
			c := cell(row, i)
			pad := strings.Repeat(" ", n-len([]rune(c)))
			if i == 0 {
				c += pad
			} else {
				c = pad + c
			}
			b.WriteString("| " + c + " ")
		}
		b.WriteString("|\n")
	}
	line(t.Columns)
	for i, n := range width {
		if i == 0 {
			b.WriteString("|:" + strings.Repeat("-", n+1))
		} else {
			b.WriteString("|" + strings.Repeat("-", n+1) + ":")
		}
	}
	b.WriteString("|\n")
	for _, row := range t.rows {
		line(row)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

func cell(row []string, i int) string {
	if i >= len(row) {
		return ""
	}
	return strings.ReplaceAll(oneLine(row[i]), "|", `\|`)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// Seconds formats a time in nanoseconds: 2.34 s.
func Seconds(ns float64) string {
	s := ns / 1e9
	switch {
	case math.IsNaN(s):
		return "-"
	case math.Abs(s) < 10:
		return fmt.Sprintf("%.2f s", s)
	}
	return fmt.Sprintf("%.1f s", s)
}

// Bytes formats a number of bytes: 1.23 GiB.
func Bytes[N int64 | float64](n N) string {
	b := float64(n)
	switch {
	case math.IsNaN(b):
		return "-"
	case math.Abs(b) >= 1<<30:
		return fmt.Sprintf("%.2f GiB", b/(1<<30))
	case math.Abs(b) >= 1<<20:
		return fmt.Sprintf("%.1f MiB", b/(1<<20))
	case math.Abs(b) >= 1<<10:
		return fmt.Sprintf("%.1f KiB", b/(1<<10))
	}
	return fmt.Sprintf("%.0f B", b)
}
