package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The unit of systemd is valid, and what it starts is a command line that thaw takes.
func TestUnit(t *testing.T) {
	text, err := os.ReadFile("../../scripts/deploy/thaw.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/thaw (.*)$`).FindStringSubmatch(string(text))
	if m == nil {
		t.Fatal("it starts no thaw")
	}
	root := rootCommand(new(app))
	c, rest, err := root.Find(strings.Fields(m[1]))
	if err != nil || c.Name() != "serve" {
		t.Fatalf("%s: %v", m[1], err)
	}
	if err := c.ParseFlags(rest); err != nil {
		t.Errorf("%s: %v", m[1], err)
	}
	if err := c.Args(c, c.Flags().Args()); err != nil {
		t.Errorf("%s: %v", m[1], err)
	}
	for _, want := range []string{
		"Type=notify", "Restart=on-failure", "StartLimitIntervalSec=0",
		"ProtectSystem=full", "ProtectKernelLogs=yes", "ProtectKernelModules=yes", "ProtectControlGroups=yes",
	} {
		if !strings.Contains(string(text), "\n"+want+"\n") {
			t.Errorf("it lacks %s", want)
		}
	}
	// In its mount namespace, it must see what the host has: devices and their settings, and overlays wherever they are.
	if m := regexp.MustCompile(`(?m)^(Protect(System=strict|Home|KernelTunables|Proc)|ProcSubset|Private(Tmp|Devices|Mounts)|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind.*|Root.*|TemporaryFileSystem|DynamicUser|Mount.*).*$`).FindString(string(text)); m != "" {
		t.Errorf("%s takes from the server what it needs", m)
	}
	need(t, "systemd-analyze")
	// The program need not be installed: this one stands in for it.
	exe, err := copyProgram(t)
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(t.TempDir(), "thaw.service")
	if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(text), "/usr/local/bin/thaw", exe)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := tool(t, "systemd-analyze", "verify", "--man=no", unit); strings.Contains(out, "thaw.service") {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
}
