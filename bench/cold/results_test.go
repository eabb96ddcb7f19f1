package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// lines are from a real run, shortened, with an invented second round.
const lines = `goos: linux
pkg: thaw/bench/cold
command: go run ./bench/cold -images /images -only flask

BenchmarkPlan/image=flask 1 15995619 plan-B 81173307 image-B 74151398 stored-B
BenchmarkLink/link=slow 1 20000000 rtt-ns 200000000 bit/s
BenchmarkCold/image=flask/link=slow/row=local-cold 1 374822463 ns/op 11128827 mounted-ns 0 requests 0 wire-B
BenchmarkCold/image=flask/link=slow/row=resident 1 693589483 ns/op 13852244 ready-ns 34659786 mounted-ns 0 requests 0 wire-B
BenchmarkCold/image=flask/link=slow/row=resident 1 493589483 ns/op 13852244 ready-ns 34659786 mounted-ns 0 requests 0 wire-B
BenchmarkCold/image=flask/link=slow/row=full-pull 1 9019261140 ns/op 3646114149 pulled-ns 8848600926 unpacked-ns 6 requests 81175648 wire-B 170488817 run-ns
BenchmarkCold/image=flask/link=slow/row=thaw 1 3742184636 ns/op 88784234 ready-ns 183292621 mounted-ns 64 requests 16038832 wire-B 3558891249 run-ns
BenchmarkCold/image=flask/link=slow/row=thaw-trace 1 1000000000 ns/op 191802031 ready-ns 539200012 mounted-ns 49 requests 16034295 wire-B
BenchmarkCold/image=flask/link=slow/row=thaw-trace 1 1300000000 ns/op 191802031 ready-ns 539200012 mounted-ns 49 requests 16034295 wire-B
Timeline/image=flask/link=slow/row=thaw-trace ready-ns 15000000 mounted-ns 20000000 answer-ns 32000000 step-ns 5000000 down-B 0 0 1000 2000 990 10 0
Note stargz: containerd is not installed
BenchmarkLink/link=fast 1 2000000 rtt-ns 2000000000 bit/s
BenchmarkCold/image=flask/link=fast/row=local-cold 1 700000000 ns/op 0 wire-B
BenchmarkCold/image=flask/link=fast/row=thaw-trace 1 798000000 ns/op 49 requests 16034295 wire-B
BenchmarkCold/image=flask-everything/link=fast/row=full-pull 1 2000000000 ns/op 0 wire-B
BenchmarkCold/image=flask-everything/link=fast/row=thaw 1 1900000000 ns/op 0 wire-B
`

func testResults(t *testing.T) *results {
	t.Helper()
	file := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := readResults([]string{file})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-6*math.Abs(want) {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

func TestResults(t *testing.T) {
	r := testResults(t)
	if got := r.images(); !slices.Equal(got, []string{"flask", "flask-everything"}) {
		t.Errorf("images %v", got)
	}
	if got := r.links(); !slices.Equal(got, []link{slow, fast}) {
		t.Errorf("links %+v", got)
	}
	if got, want := r.rows(), []string{localCold, resident, fullPull, thawPlain, thawTrace}; !slices.Equal(got, want) {
		t.Errorf("rows %v, want %v", got, want)
	}
	near(t, "the time of thaw-trace", r.seconds("flask", slow, thawTrace), 1.15)
}

// 15,995,619 bytes need 0.6398 s at 200 Mbit/s, and 0.04 s of round trips. That is
// more than the second round's time of resident, and less than the first one's.
func TestLimit(t *testing.T) {
	r := testResults(t)
	limits := r.limits("flask", slow)
	if len(limits) != 2 {
		t.Fatalf("limits %v", limits)
	}
	near(t, "the limit of the first round", limits[0], 693589483)
	near(t, "the limit of the second round", limits[1], 679824760)
	near(t, "thaw-trace to the limit", r.toLimit("flask", slow, thawTrace), (1e9/693589483+1.3e9/679824760)/2)
	if got := r.limits("flask", fast); len(got) != 0 {
		t.Errorf("limits %v without a round of resident", got)
	}
}

func TestAims(t *testing.T) {
	var got []string
	for _, a := range testResults(t).aims() {
		got = append(got, a.String())
	}
	want := []string{
		"aim missed: thaw-trace to the limit over 20 ms, 200 Mbit/s of flask 1.68, at most 1.50",
		"aim met: full-pull to thaw over 20 ms, 200 Mbit/s of flask 2.41, at least 2.00",
		"aim met: thaw-trace to local-cold over 2 ms, 2 Gbit/s of flask 1.14, at most 1.15",
		"aim missed: thaw to full-pull over 2 ms, 2 Gbit/s of flask-everything 0.95, at most 0.90",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestReport(t *testing.T) {
	r := testResults(t)
	dir := t.TempDir()
	var out strings.Builder
	if err := r.report(&out, dir); err != nil {
		t.Fatal(err)
	}
	said := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{
		"slow link: 20 ms, 200 Mbit/s", "fast link: 2 ms, 2 Gbit/s",
		"| flask | full-pull | 1 | 9.02 s | 13.00 | 24.06 | 6 | 77.4 MiB | 100.0 % |",
		"| flask | the limit | | 0.69 s | 1.00 | | | 15.3 MiB | 19.7 % |",
		"| slow | flask | full-pull | 3.65 s | 8.85 s | | | 9.02 s | 0.17 s |",
		"stargz: containerd is not installed",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
	for _, name := range []string{"cold-slow", "cold-fast", "timeline-flask"} {
		for ext, magic := range map[string]string{".png": "\x89PNG", ".svg": "<?xml"} {
			b, err := os.ReadFile(filepath.Join(dir, name+ext))
			if err != nil || !strings.HasPrefix(string(b), magic) || len(b) < 1000 {
				t.Errorf("%s%s: %d bytes, %v", name, ext, len(b), err)
			}
		}
	}
}

func TestReadResultsFails(t *testing.T) {
	for bad, want := range map[string]string{
		"":                           "the files have no round of any image",
		"BenchmarkCold/image=x 1 2":  "line 1: a value without a unit",
		"BenchmarkCold/x 1 a ns/op":  "line 1: value of ns/op",
		"\nTimeline/image=x step-ns": "line 2: timeline of Timeline/image=x: it ends early",
	} {
		file := filepath.Join(t.TempDir(), "lines")
		if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readResults([]string{file}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %q", bad, err, want)
		}
	}
	if _, err := readResults([]string{filepath.Join(t.TempDir(), "none")}); err == nil {
		t.Error("a file that does not exist is read")
	}
}

func TestTimeline(t *testing.T) {
	line := testResults(t).timelines[startName("flask", "slow", thawTrace)]
	if line == nil {
		t.Fatal("no timeline")
	}
	if got := line.bytes(); got != 4000 {
		t.Errorf("%d bytes", got)
	}
	if got := line.by(0.99); got != 25*time.Millisecond {
		t.Errorf("99 %% by %v", got)
	}
	if got := line.at(22 * time.Millisecond); got != 3000 {
		t.Errorf("%d bytes after 22 ms", got)
	}
	near(t, "the use of a line of 2 Mbit/s", line.busy(2e6, 20*time.Millisecond), 3000*8/(2e6*0.02))
	again, err := parseTimeline(line.String())
	if err != nil || again.String() != line.String() || len(again.marks) != 2 {
		t.Errorf("%v, %v", again, err)
	}
	for _, bad := range []string{"Timeline/x", "Timeline/x step-ns", "Timeline/x answer-ns 1 down-B 1", "Timeline/x answer-ns 1 step-ns 5 down-B 1 -1", "Timeline/x answer-ns y step-ns 5 down-B"} {
		if _, err := parseTimeline(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestParseLinks(t *testing.T) {
	got, err := parseLinks("fast,lan=1ms:1000")
	if err != nil || !slices.Equal(got, []link{fast, {"lan", time.Millisecond, 1e9}}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "quick", "lan=1ms", "lan=1:1000", "lan=1ms:0", "=1ms:1", "a/b=1ms:1", "lan=-1ms:1"} {
		if _, err := parseLinks(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestRows(t *testing.T) {
	v, err := parseVariant("limited=thaw-trace --prefetch-rate 10M")
	if err != nil || v.name != "limited" || v.base != thawTrace || !slices.Equal(v.args, []string{"--prefetch-rate", "10M"}) {
		t.Fatalf("%+v, %v", v, err)
	}
	for _, bad := range []string{"", "x", "x=thaw", "x=nbdkit-curl --a", "=thaw --a", "a/b=thaw --a"} {
		if _, err := parseVariant(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	chosen, err := chooseRows(options{rows: "thaw", variants: []variant{v}})
	if err != nil || len(chosen) != 2 || chosen[0].name != thawPlain || chosen[1].name != "limited" {
		t.Errorf("%+v, %v", chosen, err)
	}
	if _, err := chooseRows(options{rows: "thow"}); err == nil || !strings.Contains(err.Error(), `"thow"`) {
		t.Error(err)
	}
}

func TestLeafBytes(t *testing.T) {
	n, err := leafBytes([]byte(`{"type":"packed","chunks":62,"leaves":460,"head_bytes":27516,"bytes":9856846}`))
	if err != nil || n != 9856846-27516 {
		t.Errorf("%d, %v", n, err)
	}
	for _, bad := range []string{`{}`, `not JSON`} {
		if _, err := leafBytes([]byte(bad)); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}
