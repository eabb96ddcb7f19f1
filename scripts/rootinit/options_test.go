package main

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestOptions(t *testing.T) {
	for _, c := range []struct {
		line string
		want options
		bad  []string
	}{
		{line: "console=ttyS0 root=/dev/vda rw quiet\n", want: options{console: consoleShell}},
		{line: `thaw.exec="ls -l /" ro`, want: options{console: consoleOff, exec: "ls -l /", readOnly: true}},
		{line: `ro rw "thaw.exec=a b"`, want: options{console: consoleOff, exec: "a b"}},
		{line: `thaw.exec="a=b c" thaw.after=restart`, want: options{console: consoleOff, exec: "a=b c", after: afterRestart}},
		{line: `thaw.exec=a\ b`, want: options{console: consoleOff, exec: `a\`}},
		{line: `thaw.exec="unfinished`, want: options{console: consoleOff, exec: "unfinished"}},
		{line: "thaw.service=off thaw.console=login thaw.hostname=vm-7.lan", want: options{console: consoleLogin, noServe: true, hostname: "vm-7.lan"}},
		{line: "thaw.console=shell thaw.exec=a", want: options{console: consoleShell, exec: "a"}},
		{line: "thaw.console=of", want: options{console: consoleOff}, bad: []string{"thaw.console=of"}},
		{line: "thaw.service thaw.after=never thaw.hostname=a_b thaw.exce=x", want: options{console: consoleShell},
			bad: []string{"thaw.service", "thaw.after=never", "thaw.hostname=a_b", "thaw.exce=x"}},
		{line: "thaw.exec=a -- thaw.exec=b ro", want: options{console: consoleOff, exec: "a"}},
		{line: "thaw.ip=10.0.0.2/24,10.0.0.1,1.1.1.1", want: options{console: consoleShell, address: address{
			prefix: netip.MustParsePrefix("10.0.0.2/24"), gateway: netip.MustParseAddr("10.0.0.1"), dns: netip.MustParseAddr("1.1.1.1")}}},
		{line: "thaw.ip=10.0.0.2/24,,fe80::1", want: options{console: consoleShell, address: address{
			prefix: netip.MustParsePrefix("10.0.0.2/24"), dns: netip.MustParseAddr("fe80::1")}}},
		{line: "thaw.ip=off", want: options{console: consoleShell, address: address{off: true}}},
		{line: "thaw.ip=10.0.0.2,10.0.0.1", want: options{console: consoleShell}, bad: []string{"thaw.ip="}},
		{line: "thaw.ip=10.0.0.2/24,fe80::1", want: options{console: consoleShell}, bad: []string{"thaw.ip="}},
	} {
		got, bad := parseOptions(c.line)
		if got != c.want {
			t.Errorf("%q: %+v, want %+v", c.line, got, c.want)
		}
		if !slices.EqualFunc(bad, c.bad, strings.HasPrefix) {
			t.Errorf("%q: complaints %q, want %q", c.line, bad, c.bad)
		}
	}
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{`a="b c" d`, `"a b" thaw.exec="x`, "thaw.ip=1.2.3.4/5,6.7.8.9", `"`, `="`, "-- x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		o, _ := parseOptions(line)
		if o.hostname != "" && !validHostname(o.hostname) {
			t.Errorf("hostname %q", o.hostname)
		}
		if len(o.exec) > len(line) {
			t.Errorf("%q became %q", line, o.exec)
		}
	})
}
