package main

import (
	"encoding/json"
	"net/http"
	"reflect"
	"runtime/debug"
	"strings"
	"testing"
)

func TestVersion(t *testing.T) {
	released := &debug.BuildInfo{GoVersion: "go1.26.8", Main: debug.Module{Version: "v0.0.0-20261126120000-0123456789ab+dirty"},
		Settings: []debug.BuildSetting{
			{Key: "vcs.revision", Value: "0123456789abcdef0123456789abcdef01234567"}, {Key: "vcs.time", Value: "2026-11-26T12:00:00Z"},
			{Key: "vcs.modified", Value: "true"},
		}}
	v := versionOf(released, "")
	v.Platform = "linux/arm64"
	for _, c := range []struct{ got, want string }{
		{v.line(), "thaw v0.0.0-20261126120000-0123456789ab+dirty, commit 0123456789ab (modified), go1.26.8, linux/arm64"},
		{v.userAgent(), "thaw/v0.0.0-20261126120000-0123456789ab+dirty (linux/arm64)"},
		{printed(v), `thaw      v0.0.0-20261126120000-0123456789ab+dirty
commit    0123456789abcdef0123456789abcdef01234567 of 2026-11-26T12:00:00Z, modified
go        go1.26.8
platform  linux/arm64
features  nbd
`},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
	if v := versionOf(released, "v1.2.3"); v.Version != "v1.2.3" || v.Commit == "" {
		t.Errorf("the linker's version does not count: %+v", v)
	}
	// What `go run` and `go test` know.
	v = versionOf(&debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "")
	v.Go, v.Platform = "go1.26.8", "linux/arm64"
	if got := v.line(); got != "thaw (devel), go1.26.8, linux/arm64" {
		t.Errorf("%q", got)
	}
	if got := v.userAgent(); got != "thaw/devel (linux/arm64)" {
		t.Errorf("%q", got)
	}
	if got := (versionInfo{Version: "\r\n()"}).userAgent(); got != "thaw/unknown ()" {
		t.Errorf("%q", got)
	}

	if got := must(t, "--version"); got != thisVersion().line()+"\n" {
		t.Errorf("--version: %q", got)
	}
	if got := must(t, "version"); got != printed(thisVersion()) {
		t.Errorf("version: %q", got)
	}
	var decoded versionInfo
	if err := json.Unmarshal([]byte(must(t, "version", "--json")), &decoded); err != nil || !reflect.DeepEqual(decoded, thisVersion()) {
		t.Errorf("version --json: %+v, %v", decoded, err)
	}
}

func printed(v versionInfo) string {
	var b strings.Builder
	v.print(&b)
	return b.String()
}

// Registries are told which thaw asks.
func TestUserAgent(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 3)...)))
	others := make(chan string, 1)
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if agent := r.UserAgent(); agent != thisVersion().userAgent() {
			select {
			case others <- agent:
			default:
			}
		}
		return true
	})
	p.take()
	must(t, "build", "--size", "64M", ref)
	must(t, "verify", ref)
	seen := len(p.take())
	select {
	case agent := <-others:
		t.Errorf("a request is of %q, not of %q", agent, thisVersion().userAgent())
	default:
	}
	if seen == 0 {
		t.Error("no request was seen")
	}
}
