package main

import (
	"bytes"
	"strings"
	"testing"
)

const sample = `a line of the compiler
{"Action":"start","Package":"thaw/a"}
{"Action":"output","Package":"thaw/a","Test":"TestSkipped","Output":"    a_test.go:12: no /dev/fuse\n"}
{"Action":"skip","Package":"thaw/a","Test":"TestSkipped","Elapsed":0}
{"Action":"pass","Package":"thaw/a","Test":"TestShort","Elapsed":0.2}
{"Action":"pass","Package":"thaw/a","Test":"TestLong/case","Elapsed":9}
{"Action":"pass","Package":"thaw/a","Test":"TestLong","Elapsed":9.4}
{"Action":"output","Package":"thaw/a","Test":"TestBroken","Output":"what went wrong\n"}
{"Action":"fail","Package":"thaw/a","Test":"TestBroken","Elapsed":2}
{"Action":"fail","Package":"thaw/a","Elapsed":12}
{"Action":"pass","Package":"thaw/b","Test":"TestB","Elapsed":30}
{"Action":"pass","Package":"thaw/b","Elapsed":31}
{"Action":"pass","Package":"thaw/b","Test":"TestC","Elapsed":2}
{"Action":"pass","Package":"thaw/b","Elapsed":3}
{"Action":"skip","Package":"thaw/none","Elapsed":0}
`

func TestLog(t *testing.T) {
	var lines, cost bytes.Buffer
	l := &log{output: make(map[string][]string), longest: make(map[string][]event), w: &lines}
	if err := l.read(strings.NewReader(sample)); err != nil {
		t.Fatal(err)
	}
	if l.passed != 5 || l.failed != 1 || len(l.skipped) != 1 || l.skipped[0] != "thaw/a TestSkipped: no /dev/fuse" {
		t.Errorf("%d passed, %d failed, skipped %q", l.passed, l.failed, l.skipped)
	}
	for _, want := range []string{"a line of the compiler\n", "FAIL      2.0s  thaw/a TestBroken\nwhat went wrong\n", "ok       31.0s  thaw/b\n"} {
		if !strings.Contains(lines.String(), want) {
			t.Errorf("the lines lack %q:\n%s", want, &lines)
		}
	}
	l.writeCost(&cost)
	const want = "   34.0s  thaw/b                        TestB 30s  TestC 2s\n" +
		"   12.0s  thaw/a                        TestLong 9s  TestBroken 2s\n"
	if cost.String() != want {
		t.Errorf("got\n%swant\n%s", &cost, want)
	}
}
