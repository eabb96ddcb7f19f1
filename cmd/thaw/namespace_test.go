package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"thaw/blockmap/blocktest"
	"thaw/cmd/thaw/internal/host"
)

// Each server runs in a mount namespace of its own, as services of systemd and containers
// do. What a killed one has answered is there, flushed or not: in an overlay, and in the
// ephemeral overlays of a device of the command line and of one that the control socket has
// added. Cache and overlays are on a disk, where the kernel has what was not flushed.
func TestNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting requires root")
	}
	need(t, "mkfs.ext4")
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 5)...)))
	must(t, "build", "--size", "64M", ref)
	file := filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(file, nil, 0o600))
	check(t, os.Truncate(file, 128<<20))
	tool(t, "mkfs.ext4", "-q", file)

	for _, c := range []struct {
		name, export string // that machines have
		added        bool
		args         func(disk string) []string
	}{
		{"overlay", ref, false, func(disk string) []string { return []string{ref, "--overlay", filepath.Join(disk, "vm1")} }},
		{"ephemeral", ref + "~vm2", false, func(string) []string { return []string{ref + "~vm2", "--ephemeral"} }},
		{"added", ref + "~vm3", true, func(string) []string { return []string{"--ephemeral"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk, _ := blocktest.Mount(t, file, "ext4", false)
			cache := filepath.Join(disk, c.name)
			args := append(c.args(disk), "--vhost-user", sockets(t), "--cache", cache)
			serve := func() *server {
				s := launchWith(t, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, nil, args...)
				s.mustBeReady()
				theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", s.cmd.Process.Pid))
				check(t, err)
				if ours, err := os.Readlink("/proc/self/ns/mnt"); err != nil || theirs == ours {
					t.Fatalf("the server runs in our mount namespace: %v", err)
				}
				return s
			}
			s := serve()
			if c.added {
				addDevice(t, cache, c.export, c.export)
			}
			socket := listed(t, cache, c.export).Socket
			m := newMachine(t)
			m.mustConnect(socket)
			for round := range 2 {
				off := int64(40<<20 + round*slotData)
				m.begin(0, diskWrite, off, bytes.Repeat([]byte{byte(round + 1)}, slotData), 0) // and no flush
				if status, _ := m.end(0, 0); status != 0 {
					t.Fatalf("status %d", status)
				}
				s.kill()
				s = serve()
				if d := listed(t, cache, c.export); d.State != host.Ready {
					t.Fatalf("%+v\n%s", d, s.stderr.String())
				}
				m.mustConnect(socket)
				for round := range round + 1 {
					if got := m.read(int64(40<<20+round*slotData), slotData); !bytes.Equal(got, bytes.Repeat([]byte{byte(round + 1)}, slotData)) {
						t.Errorf("the machine reads %d, wrote %d", got[0], round+1)
					}
				}
			}
			m.disconnect()
			s.term()
		})
	}
}
