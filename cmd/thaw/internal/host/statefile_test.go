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

// sampleState is a state file with nodes and devices of each kind.
func sampleState() string {
	loop := strings.NewReplacer("ublkb3", "loop3", "ublk", "fuse", `,"queues":2`, "").Replace(testState)
	nbd := strings.NewReplacer("ublkb3", "nbd3", "ublk", "nbd", `"readonly":false`, `"readonly":true`).Replace(testState)
	return `{"version":2,"nodes":[` +
		`{"image":"registry.example/app@` + testDigest + `","name":"registry.example/app:v1","overlay":"/var/lib/vm7","limit_bytes":1073741824,"mount":"/mnt","node":` + testState + `},` +
		`{"image":"registry.example/app@` + testDigest + `","name":"app","ephemeral":"ABCDEFGHIJKLMNOPQRSTUVWXYZ","node":` + loop + `},` +
		`{"image":"oci:/srv/images@` + testDigest + `","name":"oci:/srv/images:app","node":` + nbd + `}],"attaching":["K5ZKQ3AAABBBCCCDDDEEEFFFGG"],"devices":[` +
		`{"name":"root","image":"registry.example/app:v1","base":"registry.example/app@` + testDigest + `","by":"api","socket":"/run/vms/root.sock","default":true},` +
		`{"name":"app:v1~vm9","image":"app:v1~vm9","base":"registry.example/app@` + testDigest + `","by":"api","writable":true,"overlay":"/var/lib/vms/vm9","socket":"/run/vms/vm9.sock"},` +
		`{"name":"app:v1~vm8","image":"app:v1~vm8","base":"registry.example/app@` + testDigest + `","by":"client","writable":true,"ephemeral":"ZYXWVUTSRQPONMLKJIHGFEDCBA","boot":"8d1f33f0-5d26-4a2a-9c2b-6f1a1d8d4a10"}]}` + "\n"
}

// The format is what it was: what was written is read, and written again to the same bytes.
func TestStateFileFrozen(t *testing.T) {
	const frozen = "testdata/state.json"
	if *updateState {
		if err := os.WriteFile(frozen, []byte(sampleState()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(frozen)
	if err != nil {
		t.Fatal(err)
	}
	kept, bad, err := parseState(want)
	if err != nil || len(bad) > 0 || len(kept.Nodes) != 3 || len(kept.Attaching) != 1 || len(kept.Devices) != 3 {
		t.Fatalf("%+v, %v, %v", kept, bad, err)
	}
	if n := kept.Nodes[0]; n.Overlay != "/var/lib/vm7" || n.Limit != 1<<30 || n.Mount != "/mnt" || n.state.Path != "/dev/ublkb3" || n.state.Driver != attach.UBLK {
		t.Errorf("%+v", n)
	}
	dir := t.TempDir()
	if err := writeState(dir, kept, true); err != nil {
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
	if err != nil || len(bad) > 0 || !reflect.DeepEqual(again, kept) {
		t.Errorf("%v, %v\n%+v", bad, err, again)
	}
	// Without nodes and devices there is no file; and no other.
	if err := errors.Join(writeState(dir, saved{}, true), writeState(dir, saved{}, true)); err != nil {
		t.Fatal(err)
	}
	if e, err := os.ReadDir(dir); err != nil || len(e) > 0 {
		t.Errorf("%v, %v", e, err)
	}
	if kept, bad, err := readState(dir); kept.Nodes != nil || kept.Devices != nil || bad != nil || err != nil {
		t.Errorf("%v, %v, %v", kept, bad, err)
	}
}

// What a loss of power may leave of a state file are no nodes.
func TestStateFileLost(t *testing.T) {
	for what, text := range map[string][]byte{"nothing": nil, "zeros": make([]byte, 704)} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, stateName), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if nodes, bad, err := readState(dir); len(nodes.Nodes) > 0 || len(nodes.Devices) > 0 || bad != nil || err != nil {
			t.Errorf("%s: %v, %v, %v", what, nodes, bad, err)
		}
	}
}

// A state file that makes no sense is refused, and a node that makes none is left out.
func TestStateFileDamaged(t *testing.T) {
	sample := sampleState()
	for what, text := range map[string]string{
		"nothing": "", "no JSON": "x", "cut": sample[:len(sample)/2], "more": sample + sample, "another version": strings.Replace(sample, `"version":2`, `"version":1`, 1),
		"no version": `{"nodes":[]}`, "an unknown field": strings.Replace(sample, `"nodes"`, `"colour":1,"nodes"`, 1), "an array": "[]",
		"too many devices": `{"version":2,"devices":[` + strings.Repeat("{},", maxSaved) + `{}]}`,
		"too many tokens":  `{"version":2,"attaching":[` + strings.Repeat(`"",`, 2*maxNodes) + `""]}`,
		"too many":         `{"version":2,"nodes":[` + strings.Repeat("{},", maxNodes) + `{}]}`,
	} {
		if kept, _, err := parseState([]byte(text)); err == nil {
			t.Errorf("%s: %+v", what, kept)
		}
	}
	if _, _, err := parseState([]byte(`{"version":1}`)); !errors.Is(err, errStateVersion) {
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
		if kept, bad, err := parseState([]byte(text)); err != nil || len(bad) != 1 || len(kept.Nodes) != 2 || len(kept.Devices) != 3 {
			t.Errorf("%s: %+v, %v, %v", what, kept, bad, err)
		}
	}
	// What is removed with a node is in the cache directory.
	for _, name := range []string{"../../etc", "/etc", ".", "..", "a/b", "ABC"} {
		text, _ := json.Marshal(name)
		for _, was := range []string{`"ephemeral":"ABCDEFGHIJKLMNOPQRSTUVWXYZ"`, `"ephemeral":"ZYXWVUTSRQPONMLKJIHGFEDCBA"`} {
			kept, bad, err := parseState([]byte(strings.Replace(sample, was, `"ephemeral":`+string(text), 1)))
			if err != nil || len(bad) != 1 || len(kept.Nodes)+len(kept.Devices) != 5 {
				t.Errorf("ephemeral overlay %s: %+v, %v, %v", name, kept, bad, err)
			}
		}
	}
	if kept, bad, err := parseState([]byte(strings.ReplaceAll(sample, "loop3", "ublkb3"))); err != nil || len(bad) != 1 || len(kept.Nodes) != 2 {
		t.Errorf("one path twice: %+v, %v, %v", kept, bad, err)
	}
	// So it is with devices.
	for what, r := range map[string][2]string{
		"no name":                 {`"name":"root"`, `"name":""`},
		"a long name":             {`"name":"root"`, `"name":"` + strings.Repeat("x", maxSavedName+1) + `"`},
		"one name twice":          {`"name":"app:v1~vm8"`, `"name":"app:v1~vm9"`},
		"no image":                {`"image":"app:v1~vm9"`, `"image":""`},
		"a base without a digest": {`"base":"registry.example/app@` + testDigest, `"base":"registry.example/app:v1`},
		"a base that is none":     {`"base":"registry.example/app@` + testDigest, `"base":"no name`},
		"a stranger":              {`"by":"client"`, `"by":"nobody"`},
		"nothing to keep":         {`"by":"api","socket"`, `"by":"flags","socket"`},
		"a relative overlay":      {`"/var/lib/vms/vm9"`, `"../vm9"`},
		"a relative socket":       {`"/run/vms/root.sock"`, `"root.sock"`},
		"one socket twice":        {`"/run/vms/root.sock"`, `"/run/vms/vm9.sock"`},
		"two overlays":            {`"ephemeral":"ZYX`, `"overlay":"/o","ephemeral":"ZYX`},
		"an overlay, read-only":   {`"writable":true,"overlay"`, `"overlay"`},
		"the overlay of a node":   {"ZYXWVUTSRQPONMLKJIHGFEDCBA", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
		"no boot":                 {`,"boot":"8d1f33f0-5d26-4a2a-9c2b-6f1a1d8d4a10"}]}`, "}]}"},
		"a boot without overlay":  {`"default":true`, `"default":true,"boot":"8d1f33f0"`},
	} {
		text := strings.Replace(sample, r[0], r[1], 1)
		if text == sample {
			t.Fatalf("%s: nothing changes", what)
		}
		if kept, bad, err := parseState([]byte(text)); err != nil || len(bad) != 1 || len(kept.Nodes) != 3 || len(kept.Devices) != 2 {
			t.Errorf("%s: %+v, %v, %v", what, kept, bad, err)
		}
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
	kept, _, err := parseState([]byte(sampleState()))
	if err != nil {
		t.Fatal(err)
	}
	if err := writeState(dir, kept, true); err != nil {
		t.Fatal(err)
	}
	// The temporary file cannot be made.
	if err := os.Mkdir(filepath.Join(dir, "."+stateName+".tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeState(dir, saved{Nodes: kept.Nodes[:1]}, true); err == nil {
		t.Error("it is written")
	}
	if got, _, err := readState(dir); err != nil || !reflect.DeepEqual(got, kept) {
		t.Errorf("%+v, %v", got, err)
	}
	// What the next server would refuse is not written.
	for _, devices := range [][]savedDevice{make([]savedDevice, maxSaved+1), {{Name: strings.Repeat("x", maxStateFile)}}} {
		if err := writeState(t.TempDir(), saved{Devices: devices}, true); !errors.As(err, new(ConflictError)) {
			t.Errorf("%d devices: %v", len(devices), err)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(sampleState()))
	f.Add([]byte(`{"version":2,"nodes":[],"devices":[{}]}`))
	f.Add([]byte(`{"version":2,"nodes":[{"node":{}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		kept, _, err := parseState(text)
		if err != nil {
			return
		}
		for i := range kept.Nodes {
			kept.Nodes[i].Node = kept.Nodes[i].state.Encode()
		}
		kept.Version = stateVersion
		raw, err := json.Marshal(kept)
		if err != nil {
			t.Fatal(err)
		}
		again, bad, err := parseState(raw)
		if err != nil || len(bad) > 0 || len(again.Nodes) != len(kept.Nodes) || len(again.Devices) != len(kept.Devices) {
			t.Fatalf("%v, %v: %s", err, bad, raw)
		}
	})
}
