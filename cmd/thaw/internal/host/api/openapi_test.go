package api

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
	"thaw/cmd/thaw/internal/host"
	"thaw/nbd"
)

// openapi.yaml is what the handlers do, from both sides: each route is in it and the
// reverse; each answer that it lists is given here, and none that it does not list.
func TestOpenAPI(t *testing.T) {
	b := newBed(t, host.Options{NBD: new(nbd.Server), Trace: host.TraceOptions{Use: []string{host.Auto}}, Overlay: host.OverlayOptions{Ephemeral: true},
		Zone: host.ZoneOptions{Name: "test", Listen: "127.0.0.1:0"}})
	if err := b.doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	routes := make(map[string]bool)
	for _, r := range b.server.routes() {
		routes[r.method+" "+r.path] = true
		if item := b.doc.Paths.Value(r.path); item == nil || item.GetOperation(r.method) == nil {
			t.Errorf("%s %s is not in openapi.yaml", r.method, r.path)
		}
	}
	listed := make(map[string]bool)
	for path, item := range b.doc.Paths.Map() {
		for method, op := range item.Operations() {
			if !routes[method+" "+path] {
				t.Errorf("openapi.yaml has %s %s, which has no handler", method, path)
			}
			for code := range op.Responses.Map() {
				listed[method+" "+path+" "+code] = true
			}
		}
	}
	if t.Failed() {
		return
	}

	do := func(code int, method, path, body string) string {
		t.Helper()
		got, answer, _ := b.do(method, path, body)
		if got != code {
			t.Errorf("%s %s %.100q: %d instead of %d: %s", method, path, body, got, code, answer)
		}
		return answer
	}
	m := blocktest.NewImage(t, 1, 300)
	image := b.push("team/app:v1", m)
	do(200, "GET", "/v1/devices", "")
	do(200, "GET", "/v1/status", "")
	spec := fmt.Sprintf(`{"name": "root", "image": %q}`, image)
	do(201, "POST", "/v1/devices", spec)
	do(409, "POST", "/v1/devices", spec)
	b.host.SetServing()
	d := b.host.Devices()[0]
	_, release, err := b.host.Acquire(t.Context(), "root", nil)
	if err != nil {
		t.Fatal(err)
	}
	await(t, "nothing to prefetch is found", func() bool { return d.Info().Prefetch.State == "none" })
	do(200, "GET", "/v1/devices", "")
	do(200, "GET", "/v1/devices/"+d.ID(), "")
	do(200, "GET", "/v1/status", "")
	if doc := do(200, "GET", "/v1/openapi.yaml", ""); doc != string(openAPI) {
		t.Error("it is another document")
	}
	if n := do(200, "POST", "/v1/traces/stop", fmt.Sprintf(`{"device": %q}`, d.ID())); strings.TrimSpace(n) != `{"stopped":1}` {
		t.Errorf("recordings: %s", n)
	}
	do(200, "POST", "/v1/traces/stop", "")
	do(200, "POST", "/v1/traces/stop", "{}")
	do(404, "POST", "/v1/traces/stop", `{"device": "99"}`)
	commit := "/v1/devices/" + d.ID() + "/commit"
	to := func(target, more string) string { return fmt.Sprintf(`{"target": %q%s}`, target, more) }
	if c := do(200, "POST", commit, to(b.registry+"/team/app:commit", "")); !strings.Contains(c, `"filesystem":"none"`) {
		t.Errorf("a commit: %s", c)
	}
	do(404, "POST", "/v1/devices/99/commit", to(b.registry+"/team/app:commit", ""))
	for _, bad := range []string{
		"", "{}", "[]", to("", ""), to("not a name", ""), to("oci:/somewhere", ""), to("oci-archive:x.tar:v1", ""), to(b.registry+"/a@sha256:"+strings.Repeat("a", 64), ""),
		to(b.registry+"/a:b", `, "dirty": "wash"`), to(b.registry+"/a:b", `, "level": 23`), to(b.registry+"/a:b", `, "level": -1`), to(b.registry+"/a:b", `, "colour": 1`),
		to(strings.Repeat("a", maxName+1), ""),
	} {
		do(400, "POST", commit, bad)
	}
	do(422, "POST", commit, to("oci:/proc/none:v1", ""))
	super := make([]byte, 1024)
	super[0x38], super[0x39] = 0x53, 0xEF // an ext4 that was not unmounted
	if err := d.Overlay().WriteAt(t.Context(), super, 1024); err != nil {
		t.Fatal(err)
	}
	if c := do(409, "POST", commit, to(b.registry+"/team/app:commit", "")); !strings.Contains(c, "--replay") {
		t.Errorf("a dirty filesystem: %s", c)
	}
	do(200, "POST", commit, to(b.registry+"/team/app:commit", `, "dirty": "crash-consistent", "level": 1`))
	do(413, "POST", commit, strings.Repeat("x", maxBody+1))
	do(404, "GET", "/v1/devices/99", "")
	do(404, "DELETE", "/v1/devices/99", "")
	do(400, "DELETE", "/v1/devices/"+d.ID()+"?drain=perhaps", "")
	do(409, "DELETE", "/v1/devices/"+d.ID(), "")
	do(202, "DELETE", "/v1/devices/"+d.ID()+"?drain=true", "")
	release()
	await(t, "the device is closed", func() bool { return len(b.host.Devices()) == 0 })
	do(201, "POST", "/v1/devices", spec)
	do(204, "DELETE", "/v1/devices/"+b.host.Devices()[0].ID(), "")
	do(422, "POST", "/v1/devices", fmt.Sprintf(`{"image": "%s/team/none:v1"}`, b.registry))

	do(200, "GET", "/v1/zone", "")
	do(200, "GET", "/v1/zone?ask=true", "")
	do(400, "GET", "/v1/zone?ask=perhaps", "")
	if z, err := b.client.Zone(t.Context(), true); err != nil || z.Zone != "test" || !z.Alone || z.Members != 1 {
		t.Errorf("%+v, %v", z, err)
	}
	without := newBed(t, host.Options{})
	if code, _, _ := without.do("GET", "/v1/zone", ""); code != 404 {
		t.Errorf("a server without a zone: %d", code)
	}
	maps.Copy(b.answers, without.answers)

	do(200, "GET", "/v1/nodes", "")
	node := fmt.Sprintf(`{"image": %q, "driver": "fuse", "overlay": %q}`, image, b.dir+"/overlay")
	if os.Geteuid() != 0 {
		do(422, "POST", "/v1/nodes", node)
		for what := range listed { // which require a node
			if strings.Contains(what, "/v1/nodes") && (strings.HasSuffix(what, " 20"+what[len(what)-1:]) || strings.HasSuffix(what, " 409")) {
				delete(listed, what)
			}
		}
	} else {
		do(201, "POST", "/v1/nodes", node)
		do(409, "POST", "/v1/nodes", node)
		n := b.host.Nodes()[0]
		do(200, "GET", "/v1/nodes", "")
		do(200, "GET", "/v1/nodes/"+n.ID, "")
		do(400, "DELETE", "/v1/nodes/"+n.ID+"?later=perhaps", "")
		fd, err := unix.Open(n.Node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		do(409, "DELETE", "/v1/nodes/"+n.ID, "")
		do(202, "DELETE", "/v1/nodes/"+n.ID+"?later=true", "")
		unix.Close(fd)
		await(t, "the node is detached", func() bool { return len(b.host.Nodes()) == 0 })
		do(201, "POST", "/v1/nodes", node)
		do(204, "DELETE", "/v1/nodes/"+b.host.Nodes()[0].ID, "")
	}
	do(404, "GET", "/v1/nodes/99", "")
	do(404, "DELETE", "/v1/nodes/99", "")
	do(422, "POST", "/v1/nodes", fmt.Sprintf(`{"image": "%s/team/none:v1"}`, b.registry))
	for _, bad := range []string{
		"", "null", "[]", "{}", `{"image": ""}`, `{"image": 7}`, `{"image": "not a name"}`, `{"image": "a", "node": "/dev/sda"}`, `{"image": "a", "driver": "floppy"}`,
		`{"image": "a", "queues": 1000}`, `{"image": "a", "queues": -1}`, `{"image": "a", "queues": 1.5}`, `{"image": "a", "queues": 99999999999999999999}`,
		`{"image": "a", "overlay": "x"}`, `{"image": "a", "overlay": "/x/../y"}`, `{"image": "a", "overlay": "/x//y"}`, `{"image": "a", "overlay": "/x/"}`, `{"image": "a", "overlay": "/x\u0000"}`,
		`{"image": "a", "overlay": "/x\n"}`, `{"image": "a", "mount": "mnt"}`, `{"image": "a", "mount": "/."}`, `{"image": "a", "mount": "/\u001b[2J"}`,
		`{"image": "a", "overlay": "/x", "ephemeral": true}`, `{"image": "a", "overlay_limit_bytes": 1}`, `{"image": "a", "ephemeral": true, "overlay_limit_bytes": -1}`,
		fmt.Sprintf(`{"image": "a", "overlay": "/%s"}`, strings.Repeat("a", maxName)), fmt.Sprintf(`{"image": %q}`, strings.Repeat("a", maxName+1)),
	} {
		do(400, "POST", "/v1/nodes", bad)
	}

	large := strings.Repeat("x", maxBody+1)
	do(413, "POST", "/v1/nodes", large)
	do(413, "POST", "/v1/devices", large)
	do(413, "POST", "/v1/traces/stop", large)
	for _, bad := range []string{
		"", "null", "[]", "7", `"x"`, "{", "{}", `{"image": ""}`, `{"image": 7}`, `{"image": "not a name"}`, `{"image": "a", "colour": 1}`,
		`{"image": "a"}{}`, `{"image": "a"} x`, `{"image": "a\u0000"}`, `{"image": "a\u001b[2J"}`, `{"name": "a\nb", "image": "a"}`,
		fmt.Sprintf(`{"image": %q}`, strings.Repeat("a", maxName+1)), fmt.Sprintf(`{"name": %q, "image": "a"}`, strings.Repeat("a", maxName+1)),
		strings.Repeat("[", 20000),
	} {
		do(400, "POST", "/v1/devices", bad)
	}
	for _, bad := range []string{"null x", "[]", "7", "{", `{"device": 7}`, `{"devices": "1"}`, "\xff"} {
		do(400, "POST", "/v1/traces/stop", bad)
	}
	for path, methods := range map[string]string{
		"/v1/status": "POST PUT DELETE PATCH OPTIONS x", "/v1/devices": "PUT DELETE", "/v1/devices/1": "POST PUT", "/v1/devices/1/commit": "GET DELETE", "/v1/traces/stop": "GET DELETE",
		"/v1/nodes": "PUT DELETE", "/v1/nodes/1": "POST PUT",
	} {
		for method := range strings.FieldsSeq(methods) {
			code, _, header := b.do(method, path, "{}")
			if allow := header.Get("Allow"); code != 405 || allow == "" {
				t.Errorf("%s %s: %d, allowed: %q", method, path, code, allow)
			}
		}
	}
	for _, path := range []string{
		"", "/", "/v1", "/v1/", "/v2/status", "/stats", "/trace/stop", "/v1/status/", "//v1/status", "/v1/../v1/status", "/v1/devices/", "/v1/devices/1/2",
		"/v1/devices/..", "/v1/devices/%2e%2e", "/v1/devices/%2e%2e/status", "/v1/./status", "/V1/STATUS",
	} {
		do(404, "GET", path, "")
	}
	for _, id := range []string{"0", "-1", "01", "1.0", "%00", "%0a", "a%2Fb", "99999999999999999999", "💥", "%ff", "*", strings.Repeat("1", 4000), "1%20", "root"} {
		do(404, "GET", "/v1/devices/"+id, "")
		do(404, "DELETE", "/v1/devices/"+id, "")
		do(404, "GET", "/v1/nodes/"+id, "")
		do(404, "DELETE", "/v1/nodes/"+id, "")
	}

	// A registry that fails, and one that does not answer.
	again := b.add("again", image)
	b.set(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return false
	})
	other := fmt.Sprintf(`{"image": "%s/team/other:v1"}`, b.registry)
	do(502, "POST", "/v1/devices", other)
	do(502, "POST", "/v1/nodes", other)
	do(502, "POST", "/v1/devices/"+again.ID+"/commit", to(b.registry+"/team/app:commit", ""))
	b.silent()
	b.server.bounds.add = 50 * time.Millisecond
	do(504, "POST", "/v1/devices", other)
	do(504, "POST", "/v1/nodes", other)

	// There are as many requests as one process may have.
	hog := b.dial()
	b.server.conns.mu.Lock()
	for i := range maxBusyProcess {
		c, _ := net.Pipe()
		b.server.conns.open[c] = &conn{nc: c, pid: process(hog), order: uint64(i), busy: true}
	}
	b.server.conns.mu.Unlock()
	for route := range routes {
		method, path, _ := strings.Cut(route, " ")
		do(503, method, strings.Replace(path, "{id}", "1", 1), "")
	}
	for what := range listed {
		if !b.answers[what] {
			t.Errorf("openapi.yaml has the answer %s, which was not given", what)
		}
	}
}
