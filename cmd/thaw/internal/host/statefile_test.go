package host

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"thaw/nbd/attach"
)

var updateState = flag.Bool("update-state", false, "write the frozen state file again")

const (
	testDigest = "sha256:aaac2d98d176efdbc6f690ddea2919aa8f2355bc69011b92fb1a3ae2b989464b"
	testState  = `{"driver":"ublk","path":"/dev/ublkb3","number":3,"pid":42,"started":77,"boot":"8d1f33f0-5d26-4a2a-9c2b-6f1a1d8d4a10","token":"ABCDEFGHIJKLMNOPQRSTUVWXYZ","size":4096,"readonly":false,"queues":2}`
)

// sampleState is a state file with a node of each kind.
func sampleState() string {
	loop := strings.NewReplacer("ublkb3", "loop3", "ublk", "fuse", `,"queues":2`, "").Replace(testState)
	nbd := strings.NewReplacer("ublkb3", "nbd3", "ublk", "nbd", `"readonly":false`, `"readonly":true`).Replace(testState)
	return `{"version":1,"nodes":[` +
		`{"image":"registry.example/app@` + testDigest + `","name":"registry.example/app:v1","overlay":"/var/lib/vm7","limit_bytes":1073741824,"mount":"/mnt","node":` + testState + `},` +
		`{"image":"registry.example/app@` + testDigest + `","name":"app","ephemeral":"ABCDEFGHIJKLMNOPQRSTUVWXYZ","node":` + loop + `},` +
		`{"image":"oci:/srv/images@` + testDigest + `","name":"oci:/srv/images:app","node":` + nbd + `}]}` + "\n"
}

// The format is what it was: what was written is read, and written again to the same bytes.
func TestStateFileFrozen(t *testing.T) {
	const frozen = "testdata/nodes.json"
	if *updateState {
		if err := os.WriteFile(frozen, []byte(sampleState()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(frozen)
	if err != nil {
		t.Fatal(err)
	}
	nodes, bad, err := parseState(want)
	if err != nil || len(bad) > 0 || len(nodes) != 3 {
		t.Fatalf("%d nodes, %v, %v", len(nodes), bad, err)
	}
	if n := nodes[0]; n.Overlay != "/var/lib/vm7" || n.Limit != 1<<30 || n.Mount != "/mnt" || n.state.Path != "/dev/ublkb3" || n.state.Driver != attach.UBLK {
		t.Errorf("%+v", n)
	}
	dir := t.TempDir()
	if err := writeState(dir, nodes); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil || string(got) != string(want) {
		t.Errorf("%v\n%s\n%s", err, got, want)
	}
	if fi, err := os.Stat(filepath.Join(dir, stateName)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	again, bad, err := readState(dir)
	if err != nil || len(bad) > 0 || !reflect.DeepEqual(again, nodes) {
		t.Errorf("%v, %v\n%+v", bad, err, again)
	}
	// Without nodes there is no file; and no other.
	if err := errors.Join(writeState(dir, nil), writeState(dir, nil)); err != nil {
		t.Fatal(err)
	}
	if e, err := os.ReadDir(dir); err != nil || len(e) > 0 {
		t.Errorf("%v, %v", e, err)
	}
	if nodes, bad, err := readState(dir); nodes != nil || bad != nil || err != nil {
		t.Errorf("%v, %v, %v", nodes, bad, err)
	}
}

// A state file that makes no sense is refused, and a node that makes none is left out.
func TestStateFileDamaged(t *testing.T) {
	sample := sampleState()
	for what, text := range map[string]string{
		"nothing": "", "no JSON": "x", "cut": sample[:len(sample)/2], "more": sample + sample, "another version": strings.Replace(sample, `"version":1`, `"version":2`, 1),
		"no version": `{"nodes":[]}`, "an unknown field": strings.Replace(sample, `"nodes"`, `"colour":1,"nodes"`, 1), "an array": "[]",
		"too many": `{"version":1,"nodes":[` + strings.Repeat("{},", maxNodes) + `{}]}`,
	} {
		if nodes, _, err := parseState([]byte(text)); err == nil {
			t.Errorf("%s: %d nodes", what, len(nodes))
		}
	}
	if _, _, err := parseState([]byte(`{"version":2}`)); !errors.Is(err, errStateVersion) {
		t.Errorf("another version: %v", err)
	}
	for what, r := range map[string][2]string{
		"no digest":                  {"registry.example/app@" + testDigest, "registry.example/app:v1"},
		"no reference":               {"registry.example/app@" + testDigest, "no name"},
		"a relative overlay":         {"/var/lib/vm7", "var/lib/vm7"},
		"an overlay that is unclean": {"/var/lib/vm7", "/var/lib/../vm7"},
		"a relative mount":           {"/mnt", "mnt"},
		"a negative limit":           {"1073741824", "-1"},
		"two overlays":               {`"overlay":`, `"ephemeral":"ABCDEFGHIJKLMNOPQRSTUVWXYZ","overlay":`},
		"no overlay":                 {`"overlay":"/var/lib/vm7",`, ""},
		"an overlay, read-only":      {`"readonly":false`, `"readonly":true`},
		"another node's path":        {"/dev/ublkb3", "/dev/sda"},
		"no token":                   {`"token":"ABCDEFGHIJKLMNOPQRSTUVWXYZ"`, `"token":""`},
		"no process":                 {`"pid":42`, `"pid":0`},
		"no size":                    {`"size":4096`, `"size":-4096`},
		"an unknown driver":          {`"driver":"ublk"`, `"driver":"floppy"`},
	} {
		text := strings.Replace(sample, r[0], r[1], 1)
		if text == sample {
			t.Fatalf("%s: nothing changes", what)
		}
		if nodes, bad, err := parseState([]byte(text)); err != nil || len(bad) != 1 || len(nodes) != 2 {
			t.Errorf("%s: %d nodes, %v, %v", what, len(nodes), bad, err)
		}
	}
	// What is removed with a node is in the cache directory.
	for _, name := range []string{"../../etc", "/etc", ".", "..", "a/b", "ABC"} {
		text, _ := json.Marshal(name)
		if nodes, bad, err := parseState([]byte(strings.Replace(sample, `"ephemeral":"ABCDEFGHIJKLMNOPQRSTUVWXYZ"`, `"ephemeral":`+string(text), 1))); err != nil || len(bad) != 1 || len(nodes) != 2 {
			t.Errorf("ephemeral overlay %s: %d nodes, %v, %v", name, len(nodes), bad, err)
		}
	}
	if nodes, bad, err := parseState([]byte(strings.ReplaceAll(sample, "loop3", "ublkb3"))); err != nil || len(bad) != 1 || len(nodes) != 2 {
		t.Errorf("one path twice: %d nodes, %v, %v", len(nodes), bad, err)
	}
	// Neither a file without end nor another kind of file is read.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, stateName), make([]byte, maxStateFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readState(dir); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a long file: %v", err)
	}
	os.Remove(filepath.Join(dir, stateName))
	if err := os.Symlink("/dev/zero", filepath.Join(dir, stateName)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readState(dir); err == nil {
		t.Error("a symbolic link is read")
	}
}

// The state file is whole at any time: a write that fails leaves the earlier one.
func TestStateFileIsReplaced(t *testing.T) {
	dir := t.TempDir()
	nodes, _, err := parseState([]byte(sampleState()))
	if err != nil {
		t.Fatal(err)
	}
	if err := writeState(dir, nodes); err != nil {
		t.Fatal(err)
	}
	// The temporary file cannot be made.
	if err := os.Mkdir(filepath.Join(dir, "."+stateName+".tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeState(dir, nodes[:1]); err == nil {
		t.Error("it is written")
	}
	if got, _, err := readState(dir); err != nil || len(got) != 3 {
		t.Errorf("%d nodes, %v", len(got), err)
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(sampleState()))
	f.Add([]byte(`{"version":1,"nodes":[]}`))
	f.Add([]byte(`{"version":1,"nodes":[{"node":{}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		nodes, _, err := parseState(text)
		if err != nil || len(nodes) == 0 {
			return
		}
		for i := range nodes {
			nodes[i].Node = nodes[i].state.Encode()
		}
		raw, err := json.Marshal(savedNodes{stateVersion, nodes})
		if err != nil {
			t.Fatal(err)
		}
		again, bad, err := parseState(raw)
		if err != nil || len(bad) > 0 || len(again) != len(nodes) {
			t.Fatalf("%v, %v: %s", err, bad, raw)
		}
	})
}
