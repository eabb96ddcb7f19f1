package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestLayerCounts(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, registry)
	b.rounds, b.counts, b.reuse = 1, "1,4", true
	if err := b.layerCounts(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"BenchmarkLayers/layers=1/first 1 ", "BenchmarkLayers/layers=4/elsewhere 1 ", "\n| 4      |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	if got := b.rec.Median(layerName(4, "ready"), "again-ns"); got <= 0 {
		t.Errorf("ready again after %v ns", got)
	}
	leftNothing(t, b)
	b.counts = "3,x"
	if err := b.layerCounts(t.Context()); err == nil || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("error %v", err)
	}
	leftNothing(t, b)
}
