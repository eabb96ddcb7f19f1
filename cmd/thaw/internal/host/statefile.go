package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"thaw/fetcher/registry"
	"thaw/nbd/attach"
)

// The state file says which nodes a server has. The next server in the same cache
// directory reads it, and goes on serving the nodes of one that was killed. It is JSON:
//
//	{"version": 1, "nodes": [{"image": "registry.example/app@sha256:…", "name": "registry.example/app:v1",
//	  "overlay": "/var/lib/vm7", "mount": "/mnt", "node": {…attach.State…}}]}
//
// It is replaced as a whole, by a file that is durable and then renamed. It is in a
// directory that no other user can write to, but it is read without trust: it may be
// damaged, or of another version.
const (
	stateName    = "nodes.json"
	stateVersion = 1
	maxStateFile = 4 << 20
	maxNodes     = 512
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

type savedNodes struct {
	Version int         `json:"version"`
	Nodes   []savedNode `json:"nodes"`
}

// errStateVersion says that another version of thaw wrote the file.
var errStateVersion = errors.New("another version of thaw has written it")

// parseState reads the content of a state file. Nodes that make no sense are left out, and
// bad says why.
func parseState(text []byte) (nodes []savedNode, bad []error, err error) {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return nil, nil, err
	}
	if v.Version != stateVersion {
		return nil, nil, fmt.Errorf("its version is %d instead of %d: %w", v.Version, stateVersion, errStateVersion)
	}
	var s savedNodes
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return nil, nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, nil, errors.New("something follows its object")
	}
	if len(s.Nodes) > maxNodes {
		return nil, nil, fmt.Errorf("it has %d nodes, of at most %d", len(s.Nodes), maxNodes)
	}
	seen := make(map[string]bool)
	for i, n := range s.Nodes {
		err := n.check()
		if err == nil && seen[n.state.Path] {
			err = fmt.Errorf("%s is there twice", n.state.Path)
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("node %d: %w", i, err))
			continue
		}
		seen[n.state.Path] = true
		nodes = append(nodes, n)
	}
	return nodes, bad, nil
}

var ephemeralName = regexp.MustCompile(`^[A-Z2-7]+$`)

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
	case n.Ephemeral != "" && (len(n.Ephemeral) < 16 || len(n.Ephemeral) > 64 || !ephemeralName.MatchString(n.Ephemeral)):
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
func readState(dir string) (nodes []savedNode, bad []error, err error) {
	f, err := os.OpenFile(filepath.Join(dir, stateName), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	if err == nil && len(text) > maxStateFile {
		err = fmt.Errorf("it has more than %d bytes", maxStateFile)
	}
	if err == nil {
		nodes, bad, err = parseState(text)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("state file %s: %w", f.Name(), err)
	}
	return nodes, bad, nil
}

// writeState replaces the state file in dir, durably. Without nodes there is none.
func writeState(dir string, nodes []savedNode) error {
	path := filepath.Join(dir, stateName)
	if len(nodes) == 0 {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	text, err := json.Marshal(savedNodes{stateVersion, nodes})
	if err != nil {
		return err
	}
	// A fixed name: only one process uses the directory, and what a killed one has left is
	// written over.
	temp := filepath.Join(dir, "."+stateName+".tmp")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil {
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
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// maxPath is PATH_MAX without the zero at its end.
const maxPath = 4095

// checkPath fails unless a path is absolute and clean, or empty. what is the field that
// has it.
func checkPath(what, path string) error {
	switch {
	case path == "":
		return nil
	case len(path) > maxPath, bytes.IndexByte([]byte(path), 0) >= 0:
		return InvalidError{fmt.Errorf("%s %.100q: it must be a path of at most %d bytes, without a zero", what, path, maxPath)}
	case !filepath.IsAbs(path), filepath.Clean(path) != path:
		return InvalidError{fmt.Errorf("%s %.100q: it must be an absolute path without . and .. and double slashes", what, path)}
	}
	return nil
}
