package host

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/fetcher/registry"
	"thaw/nbd/attach"
)

// The state file says which nodes a server has, which devices were added to it, and which
// overlays go with its devices. It has the tokens of nodes that are being attached, of which
// nobody knows yet. The next server in the same cache directory reads it, and
// goes on serving what one had that was killed. It is JSON:
//
//	{"version": 2,
//	  "nodes": [{"image": "registry.example/app@sha256:…", "name": "registry.example/app:v1",
//	    "overlay": "/var/lib/vm7", "mount": "/mnt", "node": {…attach.State…}}],
//	  "attaching": ["K5ZKQ…"],
//	  "devices": [{"name": "registry.example/app:v1~vm9", "image": "registry.example/app:v1~vm9",
//	    "base": "registry.example/app@sha256:…", "by": "api", "writable": true,
//	    "overlay": "/var/lib/vms/vm9", "socket": "/run/vms/vm9.sock"}]}
//
// It is replaced as a whole, by a file that is renamed. Nodes go with the machine, so a file
// of nodes alone need not outlive a loss of power, and is not synced: an attach would wait for
// the disk twice. What a loss of power may leave of it, nothing or zeros, are no nodes. It is
// in a directory that no other user can write to, but it is read without trust: it may be
// damaged, or of another version.
const (
	stateName    = "state.json"
	stateVersion = 2
	maxStateFile = 32 << 20
	maxNodes     = 512
	maxSaved     = 4096 // devices
	maxSavedName = 4096 + len(clientMark) + maxClientName
)

// savedNode is a node in the state file.
type savedNode struct {
	Image     string          `json:"image"`               // the block image, by digest
	Name      string          `json:"name"`                // of the image, as it was asked for
	Overlay   string          `json:"overlay,omitempty"`   // its directory
	Ephemeral string          `json:"ephemeral,omitempty"` // the name of the overlay's directory, see ephemeralDir
	Limit     int64           `json:"limit_bytes,omitempty"`
	Mount     string          `json:"mount,omitempty"` // where a client mounts it
	Node      json.RawMessage `json:"node"`            // an attach.State

	state attach.State
}

// savedDevice is a device in the state file: one that was added, or one with an overlay that
// goes with it.
type savedDevice struct {
	Name      string `json:"name"`                // by which clients open it
	Image     string `json:"image"`               // as it was asked for; of a client's device, its name
	Base      string `json:"base"`                // the block image, by digest
	By        origin `json:"by"`                  // who asked for it
	Writable  bool   `json:"writable,omitempty"`  // without one of the next two, its overlay was to go with it, and is not there
	Overlay   string `json:"overlay,omitempty"`   // directory of the overlay of a client's device
	Ephemeral string `json:"ephemeral,omitempty"` // the name of the overlay's directory, see ephemeralDir
	Boot      string `json:"boot,omitempty"`      // during which the ephemeral overlay was made
	Socket    string `json:"socket,omitempty"`    // for virtual machines
	Default   bool   `json:"default,omitempty"`   // it is the default export
}

// origin is who asked for a device.
type origin string

const (
	byAPI    origin = "api"    // it stays until it is removed, also in the next server
	byFlags  origin = "flags"  // it stays as long as its server
	byClient origin = "client" // it stays as long as its clients
)

type saved struct {
	Version   int           `json:"version"`
	Nodes     []savedNode   `json:"nodes,omitempty"`
	Attaching []string      `json:"attaching,omitempty"` // tokens: see attach.Sweep
	Devices   []savedDevice `json:"devices,omitempty"`
}

// empty reports whether there is nothing to be saved.
func (s *saved) empty() bool {
	return len(s.Nodes) == 0 && len(s.Attaching) == 0 && len(s.Devices) == 0
}

// errStateVersion says that another version of thaw wrote the file.
var errStateVersion = errors.New("another version of thaw has written it")

// parseState reads the content of a state file. Nodes and devices that make no sense are
// left out, and bad says why.
func parseState(text []byte) (kept saved, bad []error, err error) {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return saved{}, nil, err
	}
	if v.Version != stateVersion {
		return saved{}, nil, fmt.Errorf("its version is %d instead of %d: %w", v.Version, stateVersion, errStateVersion)
	}
	var lists struct {
		Version   int             `json:"version"`
		Nodes     json.RawMessage `json:"nodes"`
		Attaching json.RawMessage `json:"attaching"`
		Devices   json.RawMessage `json:"devices"`
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&lists); err != nil {
		return saved{}, nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return saved{}, nil, errors.New("something follows its object")
	}
	var s saved
	if s.Nodes, err = parseList[savedNode](lists.Nodes, "nodes", maxNodes); err != nil {
		return saved{}, nil, err
	}
	if s.Attaching, err = parseList[string](lists.Attaching, "tokens", 2*maxNodes); err != nil {
		return saved{}, nil, err
	}
	if s.Devices, err = parseList[savedDevice](lists.Devices, "devices", maxSaved); err != nil {
		return saved{}, nil, err
	}
	// A path, a name and a socket are those of one node or device, and so is an overlay.
	seen := make(map[[2]string]bool)
	twice := func(what, name string) error {
		key := [2]string{what, name}
		if name != "" && seen[key] {
			return fmt.Errorf("its %s %.200q is there twice", what, name)
		}
		seen[key] = true
		return nil
	}
	for i, n := range s.Nodes {
		err := n.check()
		if err == nil {
			err = cmp.Or(twice("node", n.state.Path), twice("overlay", n.Ephemeral))
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("node %d: %w", i, err))
			continue
		}
		kept.Nodes = append(kept.Nodes, n)
	}
	for i, token := range s.Attaching {
		if !attach.ValidToken(token) {
			bad = append(bad, fmt.Errorf("token %d: %.100q is no token of a node", i, token))
			continue
		}
		kept.Attaching = append(kept.Attaching, token)
	}
	for i, k := range s.Devices {
		err := k.check()
		if err == nil {
			err = cmp.Or(twice("name", k.Name), twice("socket", k.Socket), twice("overlay", k.Ephemeral))
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("device %d: %w", i, err))
			continue
		}
		kept.Devices = append(kept.Devices, k)
	}
	return kept, bad, nil
}

// parseList reads a list of at most that many entries. An entry takes a hundred times the
// memory of the shortest text of one, so they are not read before they are counted.
func parseList[T any](text json.RawMessage, what string, most int) (list []T, err error) {
	if len(text) == 0 {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	switch t, err := d.Token(); {
	case err != nil:
		return nil, err
	case t == nil: // null
		return nil, nil
	case t != json.Delim('['):
		return nil, fmt.Errorf("its %s are not a list", what)
	}
	for d.More() {
		if len(list) == most {
			return nil, fmt.Errorf("it has more than %d %s", most, what)
		}
		var v T
		if err := d.Decode(&v); err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

var ephemeralName = regexp.MustCompile(`^[A-Z2-7]+$`)

// isEphemeral reports whether a name is empty, or that of an overlay below ephemeralDir.
func isEphemeral(name string) bool {
	return name == "" || len(name) >= 16 && len(name) <= 64 && ephemeralName.MatchString(name)
}

// check fails where k makes no sense.
func (k *savedDevice) check() error {
	for _, name := range []string{k.Name, k.Image} {
		if name == "" || len(name) > maxSavedName || !utf8.ValidString(name) {
			return fmt.Errorf("its name %.200q: it must be at most %d bytes of UTF-8", name, maxSavedName)
		}
	}
	base, err := registry.ParseRef(k.Base)
	switch {
	case err != nil:
		return err
	case base.Digest.Hex == "":
		return fmt.Errorf("its image %.200q has no digest", k.Base)
	case k.By != byAPI && k.By != byFlags && k.By != byClient:
		return fmt.Errorf("%.100q has asked for it", k.By)
	case k.By != byAPI && k.Ephemeral == "":
		return errors.New("nothing of it is to be kept")
	case k.Overlay != "" && k.Ephemeral != "":
		return errors.New("it has two overlays")
	case !k.Writable && (k.Overlay != "" || k.Ephemeral != ""):
		return errors.New("it is read-only and has an overlay")
	case !isEphemeral(k.Ephemeral):
		return fmt.Errorf("its overlay %.100q is not one that goes with it", k.Ephemeral)
	case (k.Ephemeral == "") != (k.Boot == "") || len(k.Boot) > 64:
		return fmt.Errorf("its overlay is of the boot %.100q", k.Boot)
	}
	return cmp.Or(checkPath("overlay", k.Overlay), checkPath("socket", k.Socket))
}

// check fails where n makes no sense, and parses the state of its node.
func (n *savedNode) check() (err error) {
	ref, err := registry.ParseRef(n.Image)
	switch {
	case err != nil:
		return err
	case ref.Digest.Hex == "":
		return fmt.Errorf("its image %.200q has no digest", n.Image)
	case n.Overlay != "" && n.Ephemeral != "":
		return errors.New("it has two overlays")
	case !isEphemeral(n.Ephemeral):
		return fmt.Errorf("its overlay %.100q is not one that goes with its node", n.Ephemeral)
	case n.Limit < 0:
		return fmt.Errorf("its overlay has a limit of %d bytes", n.Limit)
	}
	if err := checkPath("overlay", n.Overlay); err != nil {
		return err
	}
	if err := checkPath("mount", n.Mount); err != nil {
		return err
	}
	if n.state, err = attach.ParseState(n.Node); err != nil {
		return err
	}
	if writable := n.Overlay != "" || n.Ephemeral != ""; writable == n.state.ReadOnly {
		return errors.New("it is read-only and has an overlay, or neither")
	}
	return nil
}

// readState reads the state file in dir. It is empty where there is none.
func readState(dir string) (kept saved, bad []error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, stateName), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return saved{}, nil, nil
	}
	if err != nil {
		return saved{}, nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	if err == nil && len(text) > maxStateFile {
		err = fmt.Errorf("it has more than %d bytes", maxStateFile)
	}
	if err == nil && len(bytes.TrimLeft(text, "\x00")) > 0 {
		kept, bad, err = parseState(text)
	}
	if err != nil {
		return saved{}, nil, fmt.Errorf("state file %s: %w", f.Name(), err)
	}
	return kept, bad, nil
}

// writeState replaces the state file in dir; durably, if it is to outlive a loss of power.
// Without nodes and devices there is none.
func writeState(dir string, s saved, durably bool) error {
	path := filepath.Join(dir, stateName)
	if s.empty() {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && durably {
			err = blockmap.OS.SyncDir(dir)
		}
		return err
	}
	if len(s.Devices) > maxSaved {
		return conflict("%d devices are to be kept for the next server, the most is %d: remove some", len(s.Devices), maxSaved)
	}
	s.Version = stateVersion
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if len(text) >= maxStateFile {
		return conflict("the state file would have %d bytes, the most is %d: remove some devices", len(text), maxStateFile)
	}
	// A fixed name: only one process uses the directory, and what a killed one has left is
	// written over.
	temp := filepath.Join(dir, "."+stateName+".tmp")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil && durably {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
		return err
	}
	if durably {
		return blockmap.OS.SyncDir(dir)
	}
	return nil
}

// maxPath is PATH_MAX without the zero at its end.
const maxPath = 4095

// checkPath fails unless a path is absolute and clean, or empty. what is the field that
// has it.
func checkPath(what, path string) error {
	switch {
	case path == "":
		return nil
	case len(path) > maxPath, strings.Contains(path, "\x00"), !utf8.ValidString(path):
		return InvalidError{fmt.Errorf("%s %.100q: it must be a path of at most %d bytes of UTF-8, without a zero", what, path, maxPath)}
	case !filepath.IsAbs(path), filepath.Clean(path) != path:
		return InvalidError{fmt.Errorf("%s %.100q: it must be an absolute path without . and .. and double slashes", what, path)}
	}
	return nil
}
