package bench

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want float64
	}{
		{[]float64{3}, 3},
		{[]float64{9, 1, 5}, 5},
		{[]float64{4, 1, 100, 2}, 3},
		{nil, math.NaN()},
	} {
		if got := Median(c.v); got != c.want && !(math.IsNaN(got) && math.IsNaN(c.want)) {
			t.Errorf("Median(%v) = %v, want %v", c.v, got, c.want)
		}
	}
	v := []float64{3, 1, 2}
	Median(v)
	if v[0] != 3 || v[1] != 1 {
		t.Errorf("Median changed its argument to %v", v)
	}
}

// The machine slows down between rounds, for both sides. Round by round the
// ratio is 2; the ratio of the medians is not.
func TestMedianRatio(t *testing.T) {
	a, b := []float64{2, 20, 200, 9}, []float64{1, 10, 100}
	if got := MedianRatio(a, b); got != 2 {
		t.Errorf("MedianRatio = %v, want 2", got)
	}
	if got := MedianRatio(a, nil); !math.IsNaN(got) {
		t.Errorf("MedianRatio of nothing = %v", got)
	}
}

func TestRecorder(t *testing.T) {
	var out bytes.Buffer
	r := NewRecorder(&out)
	m := Machine{CPU: "Some\nCPU", Cores: 2, Memory: 3 << 30, Kernel: "Linux 6.1", Load: "0.25", Date: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	if err := r.Header("thaw/bench/x", m, Fact{"command", "go run ./bench/x"}); err != nil {
		t.Fatal(err)
	}
	u := Usage{Wall: 2339541144, User: 2 * time.Second, Sys: time.Second, PeakRSS: 44896 << 10}
	if err := r.Add("Build/image=a b/tool=thaw", u.Measures()...); err != nil {
		t.Fatal(err)
	}
	if err := r.Add("Build/image=a b/tool=thaw", Measure{1e9, Wall}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"cpu: Some CPU\n", "cores: 2\n", "memory: 3.00 GiB\n", "kernel: Linux 6.1\n", "date: 2026-01-02\n", "command: go run ./bench/x\n\n",
		"BenchmarkBuild/image=a_b/tool=thaw 1 2339541144 ns/op 2000000000 user-ns 1000000000 sys-ns 3000000000 cpu-ns 45973504 peak-RSS-B 0 others-cpu-ns\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	if got := r.Median("Build/image=a b/tool=thaw", Wall); got != (2339541144+1e9)/2 {
		t.Errorf("median %v", got)
	}
	if got := r.Max("Build/image=a b/tool=thaw", Wall); got != 2339541144 {
		t.Errorf("max %v", got)
	}
	if got := r.Ratio("Build/image=a b/tool=thaw", "Build/image=a b/tool=thaw", Wall); got != 1 {
		t.Errorf("ratio %v", got)
	}
}

func TestRead(t *testing.T) {
	var out bytes.Buffer
	r := NewRecorder(&out)
	if err := r.Header("thaw/bench/x", Machine{CPU: "Some CPU"}); err != nil {
		t.Fatal(err)
	}
	for _, v := range []float64{2339541144, 1e9} {
		if err := r.Add("Build/image=a/tool=thaw", Measure{v, Wall}, Measure{v / 8, "x-B"}); err != nil {
			t.Fatal(err)
		}
	}
	again := NewRecorder(&bytes.Buffer{})
	var more []string
	err := again.Read(strings.NewReader(out.String()+"Other line\nBenchmarkAlone\n"), func(line string) error { more = append(more, line); return nil })
	if err != nil || !slices.Contains(more, "Other line") || !slices.Contains(more, "cpu: Some CPU") {
		t.Fatalf("%q, %v", more, err)
	}
	if got := again.Names(); !slices.Equal(got, []string{"Build/image=a/tool=thaw"}) {
		t.Errorf("names %q", got)
	}
	for _, unit := range []string{Wall, "x-B"} {
		if got, want := again.Values(again.Names()[0], unit), r.Values(again.Names()[0], unit); len(got) != 2 || !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", unit, got, want)
		}
	}
	for _, bad := range []string{"BenchmarkX 1 2", "BenchmarkX 1 two ns/op"} {
		if err := again.Read(strings.NewReader("\n"+bad), nil); err == nil || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%q: error %v", bad, err)
		}
	}
}

func TestTable(t *testing.T) {
	tab := Table{Columns: []string{"image", "time"}}
	tab.Row("flask", "2.34 s")
	tab.Row("a|b")
	var out bytes.Buffer
	if _, err := tab.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"| image |   time |\n" +
		"|:------|-------:|\n" +
		"| flask | 2.34 s |\n" +
		"| a\\|b  |        |\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestForReading(t *testing.T) {
	for _, c := range [][2]string{
		{Seconds(2.344e9), "2.34 s"}, {Seconds(12.34e9), "12.3 s"}, {Seconds(math.NaN()), "-"},
		{Bytes(int64(512)), "512 B"}, {Bytes(int64(1536)), "1.5 KiB"}, {Bytes(int64(45 << 20)), "45.0 MiB"}, {Bytes(1.25 * (1 << 30)), "1.25 GiB"},
	} {
		if c[0] != c[1] {
			t.Errorf("got %q, want %q", c[0], c[1])
		}
	}
}

func TestAlternate(t *testing.T) {
	var order []string
	side := func(name string) func(context.Context, int) error {
		return func(context.Context, int) error { order = append(order, name); return nil }
	}
	if err := Alternate(t.Context(), 2, side("a"), side("b")); err != nil || strings.Join(order, "") != "abab" {
		t.Errorf("%v, %v", order, err)
	}
	broken := errors.New("broken")
	err := Alternate(t.Context(), 2, func(context.Context, int) error { return broken }, func(context.Context, int) error {
		t.Error("the next side ran after an error")
		return nil
	})
	if err != broken {
		t.Errorf("error %v", err)
	}
}
