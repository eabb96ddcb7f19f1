package nbd

import (
	"log/slog"
	"net"
	"os/exec"
	"testing"

	"thaw/blockmap/blocktest"
)

// Tools that probe a server and disconnect at any point cause no warning.
func TestProbesAreNoWarnings(t *testing.T) {
	tool(t, "nbdinfo")
	p := newPKI(t)
	for name, srv := range map[string]*Server{
		"plain":        {},
		"TLS":          {TLSFunc: p.serverFunc(t)},
		"TLS required": {TLSFunc: p.serverFunc(t), RequireTLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			h := &leveled{Handler: slog.DiscardHandler, lines: make(map[slog.Level][]string)}
			dev := blocktest.NewMemory(testSize)
			dev.Fill(pattern(0, testSize), 0)
			srv.Log, srv.Exports = slog.New(h), Static{{Name: "disk", Device: dev}, {Name: "other", Device: dev}}
			l, err := Listen(t.Context(), "tcp:127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, srv, l)
			_, port, err := net.SplitHostPort(l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			runs := 0
			for _, scheme := range []string{"nbd", "nbds"} {
				u := scheme + "://localhost:" + port + "/"
				certs := "?tls-certificates=" + p.dir
				if scheme == "nbd" {
					certs = ""
				}
				for _, args := range [][]string{
					{u + "disk" + certs}, {u + certs}, {u + "missing" + certs}, {"--list", u + certs}, {"--size", u + "disk" + certs},
					{"--no-content", u + "disk" + certs}, {"--map", u + "other" + certs}, {"--is", "read-only", u + "disk" + certs}, {"--can", "df", u + certs},
				} {
					// Some probes fail, as they should; the test checks the server's
					// log.
					out, err := exec.CommandContext(t.Context(), "nbdinfo", args...).CombinedOutput()
					t.Logf("nbdinfo %q: %v %.60q", args, err, out)
					runs++
				}
			}
			for _, say := range []string{"", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "\x00\x00\x00\x03", "\x00\x00\x00\x03rubbish rubbish rubbish"} {
				nc, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				nc.Write([]byte(say))
				nc.Close()
			}
			eventually(t, "all connections end", func() bool { return srv.Stats().Conns == 0 })
			if n := srv.Stats().Accepted; n < int64(runs) {
				t.Errorf("%d connections, for %d runs of nbdinfo", n, runs)
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			if lines := h.lines[slog.LevelWarn]; len(lines) > 0 {
				t.Errorf("warnings: %q", lines)
			}
		})
	}
}
