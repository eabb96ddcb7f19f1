package tracefile_test

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/tracefile"
)

func TestSummary(t *testing.T) {
	ix := lettered(t, []blockmap.Run{
		{Device: 0, Stream: 0, Block: 0, Count: 20},
		{Device: 100, Stream: 1, Block: 0, Count: 40},
	}, "MN", "ABCD", "unused")
	tr := traceOf(1000,
		tracefile.Touch{At: 0, Block: 0, Count: 1, Miss: true},
		tracefile.Touch{At: 10 * ms, Block: 105, Count: 10, Miss: true},
		tracefile.Touch{At: 40 * ms, Block: 1, Count: 4},
		tracefile.Touch{At: 20 * ms, Block: 138, Count: 10}, // two blocks, and a hole
	)
	tr.Index, tr.Cut = tracefile.IndexDigest(ix), tracefile.ErrCut
	tr.End = tracefile.End{Why: tracefile.WentQuiet, After: time.Second, Dropped: 2}
	s, err := tr.Summarize(ix)
	if err != nil {
		t.Fatal(err)
	}
	const k = 4096
	want := &tracefile.Summary{
		Index: tr.Index.String(), Starts: 1, Duration: 40 * ms, Recorded: time.Second, Ended: "went quiet", Cut: "the trace is cut short",
		Device: 1000 * k, Ranges: 4, Blocks: 25, Bytes: 25 * k, Hits: 14 * k, Misses: 11 * k, Dropped: 2 * k,
		Times: []tracefile.Percentile{
			{Percent: 10, At: 10 * ms}, {Percent: 25, At: 10 * ms}, {Percent: 50, At: 20 * ms}, {Percent: 75, At: 20 * ms},
			{Percent: 90, At: 40 * ms}, {Percent: 99, At: 40 * ms}, {Percent: 100, At: 40 * ms},
		},
		Streams: []tracefile.StreamSummary{
			{Stream: 0, Size: 20 * k, Bytes: 5 * k, Misses: k, Chunks: 1, Stored: 1000, First: 0, Last: 40 * ms},
			{Stream: 1, Size: 40 * k, Bytes: 12 * k, Misses: 10 * k, Chunks: 3, Stored: 3000, First: 10 * ms, Last: 20 * ms},
			{Stream: tracefile.Hole, Bytes: 8 * k, First: 20 * ms, Last: 20 * ms},
		},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("summed up to\n%+v, want\n%+v", s, want)
	}
	b, err := json.Marshal(s)
	if err != nil || !strings.Contains(string(b), `"duration_ns":40000000,`) {
		t.Errorf("as JSON: %s, %v", b, err)
	}
	none, err := traceOf(10).Summarize(nil)
	if err != nil || none.Times != nil || none.Streams != nil || none.Ended != "cut off" {
		t.Errorf("nothing is summed up to %+v, %v", none, err)
	}

	points, err := tr.Points(ix)
	if err != nil {
		t.Fatal(err)
	}
	blocks := func(first, n int64) blockmap.Extent { return blockmap.Range(first*k, n*k) }
	if want := []tracefile.Point{
		{At: 0, Extent: blocks(0, 1), Stream: 0, Miss: true, Starts: 1},
		{At: 10 * ms, Extent: blocks(105, 10), Stream: 1, Miss: true, Starts: 1},
		{At: 40 * ms, Extent: blocks(1, 4), Stream: 0, Starts: 1},
		{At: 20 * ms, Extent: blocks(138, 2), Stream: 1, Starts: 1},
		{At: 20 * ms, Extent: blocks(140, 8), Stream: tracefile.Hole, Starts: 1},
	}; !reflect.DeepEqual(points, want) {
		t.Errorf("the points are %+v", points)
	}
	if want := []tracefile.Sum{{At: 0, Bytes: k}, {At: 10 * ms, Bytes: 11 * k}, {At: 20 * ms, Bytes: 21 * k}, {At: 40 * ms, Bytes: 25 * k}}; !reflect.DeepEqual(tr.Curve(), want) {
		t.Errorf("the curve is %+v", tr.Curve())
	}
	if want := []tracefile.Sum{{At: 0, Bytes: k}, {At: 40 * ms, Bytes: 5 * k}}; !reflect.DeepEqual(tracefile.CurveOf(points, 0), want) {
		t.Errorf("the curve of stream 0 is %+v", tracefile.CurveOf(points, 0))
	}
	bare, err := tr.Points(nil)
	if err != nil || len(bare) != 4 || bare[0].Stream != tracefile.Hole {
		t.Errorf("points without an index: %+v, %v", bare, err)
	}
}

// However a trace is cut by its index, the parts are the whole.
func TestPointsAddUp(t *testing.T) {
	m := blocktest.NewImage(t, 9, 1500)
	tr := randomTrace(rand.New(rand.NewPCG(9, 9)), tracefile.IndexDigest(m.Index), m.Index.Blocks, 100, 1)
	points, err := tr.Points(m.Index)
	if err != nil {
		t.Fatal(err)
	}
	s, err := tr.Summarize(m.Index)
	if err != nil {
		t.Fatal(err)
	}
	var n, perStream int64
	for _, p := range points {
		n += p.Extent.Len()
	}
	for _, x := range s.Streams {
		perStream += x.Bytes
		if c := tracefile.CurveOf(points, x.Stream); c[len(c)-1].Bytes != x.Bytes {
			t.Errorf("the curve of stream %d ends at %d of %d bytes", x.Stream, c[len(c)-1].Bytes, x.Bytes)
		}
	}
	if n != tr.Bytes() || perStream != n || s.Bytes != n {
		t.Errorf("%d bytes have points of %d, and %d in streams", tr.Bytes(), n, perStream)
	}
}

func TestExport(t *testing.T) {
	tr := traceOf(1<<30,
		tracefile.Touch{At: 0, Block: 7, Count: 1, Miss: true},
		tracefile.Touch{At: 1500 * ms, Block: 1 << 20, Count: 33},
		tracefile.Touch{At: 250 * us, Block: 16, Count: 2, Miss: true},
	)
	var b strings.Builder
	if err := tr.WriteFio(&b, "/dev/nbd0"); err != nil {
		t.Fatal(err)
	}
	if want := `fio version 3 iolog
0 /dev/nbd0 add
0 /dev/nbd0 open
0 /dev/nbd0 read 28672 4096
250 /dev/nbd0 read 65536 8192
1500000 /dev/nbd0 read 4294967296 131072
1500000 /dev/nbd0 read 4295098368 4096
1500000 /dev/nbd0 close
`; b.String() != want {
		t.Errorf("the iolog is\n%s", b.String())
	}
	b.Reset()
	if err := tr.WriteBlkparse(&b); err != nil {
		t.Fatal(err)
	}
	if want := `  0,0    0        1     0.000000000     0  Q   R 56 + 8 [miss]
  0,0    0        2     0.000250000     0  Q   R 128 + 16 [miss]
  0,0    0        3     1.500000000     0  Q   R 8388608 + 256 [hit]
  0,0    0        4     1.500000000     0  Q   R 8388864 + 8 [hit]
`; b.String() != want {
		t.Errorf("the text is\n%s", b.String())
	}
	for _, name := range []string{"", "a b", "a:b", "a\nb", strings.Repeat("x", 256)} {
		if err := tr.WriteFio(&b, name); err == nil {
			t.Errorf("a log with the file name %q was written", name)
		}
	}
	full := &gate{fail: blocktest.ErrDiskFull}
	if err := tr.WriteFio(full, "x"); err == nil {
		t.Error("an iolog was written to a full disk")
	}
	if err := tr.WriteBlkparse(full); err == nil {
		t.Error("text was written to a full disk")
	}
}

// fio replays the iolog: all of its reads, none beyond the file, at their times,
// or without pauses if that is wanted.
func TestFioReplays(t *testing.T) {
	fio, err := exec.LookPath("fio")
	if err != nil {
		t.Skip("fio is not installed")
	}
	const blocks = 4096
	tr := randomTrace(rand.New(rand.NewPCG(8, 8)), blockmap.Digest{}, blocks, 60, 1)
	for i := range tr.Touches {
		tr.Touches[i].At = time.Duration(i) * 10 * ms // 590 ms in all
	}
	dir := t.TempDir()
	device := filepath.Join(dir, "device")
	if err := os.WriteFile(device, make([]byte, blocks*blockmap.BlockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	// Another name, which fio is told to redirect.
	if err := tr.WriteFio(&log, "/dev/none"); err != nil {
		t.Fatal(err)
	}
	iolog := filepath.Join(dir, "iolog")
	if err := os.WriteFile(iolog, []byte(log.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, noStall := range []string{"0", "1"} {
		cmd := exec.CommandContext(t.Context(), fio, "--name=replay", "--ioengine=psync", "--readonly", "--thread", "--output-format=json",
			"--read_iolog="+iolog, "--replay_redirect="+device, "--replay_no_stall="+noStall)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("fio: %v\n%s", err, out)
		}
		var report struct {
			Jobs []struct {
				Error int
				Read  struct {
					Bytes   int64 `json:"io_bytes"`
					Count   int64 `json:"total_ios"`
					Runtime int64 `json:"runtime"`
				}
			}
		}
		if err := json.Unmarshal(out, &report); err != nil || len(report.Jobs) != 1 {
			t.Fatalf("fio: %v\n%s", err, out)
		}
		j := report.Jobs[0]
		if n := int64(strings.Count(log.String(), " read ")); j.Error != 0 || j.Read.Bytes != tr.Bytes() || j.Read.Count != n {
			t.Errorf("fio read %d bytes in %d reads, the trace has %d in %d; error %d", j.Read.Bytes, j.Read.Count, tr.Bytes(), n, j.Error)
		}
		if noStall == "0" && (j.Read.Runtime < 500 || j.Read.Runtime > 5000) {
			t.Errorf("fio took %d ms for a trace of 590", j.Read.Runtime)
		}
		t.Logf("no stall %s: %d reads in %d ms", noStall, j.Read.Count, j.Read.Runtime)
	}
}
