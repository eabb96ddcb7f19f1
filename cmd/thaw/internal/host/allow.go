package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/fetcher/registry"
)

// Allow lists the patterns of the references that clients may open.
type Allow []string

// Check fails with an InvalidError if a pattern is malformed.
func (p Allow) Check() error {
	for _, s := range p {
		if _, err := parsePattern(s); err != nil {
			return InvalidError{fmt.Errorf("the pattern %q: %w", s, err)}
		}
	}
	return nil
}

// Match reports whether a client may open name.
func (p Allow) Match(name string) bool {
	// A pattern is compared with the parsed reference, so that no other spelling gets
	// past it, and no ".." leads out of a directory.
	ref, err := registry.ParseRef(name)
	if err != nil || ref.Archive != "" || slices.Contains(strings.Split(ref.Layout, "/"), "..") {
		return false
	}
	return slices.ContainsFunc(p, func(s string) bool {
		x, err := parsePattern(s)
		return err == nil && x.match(ref)
	})
}

// pattern is a parsed pattern.
type pattern struct {
	layout      bool
	host        string // "*": any
	place       string // repository or directory
	tag, digest string // "": any
}

var errNoRepository = errors.New("it names no repository, as in registry.example/team/*")

func parsePattern(s string) (p pattern, err error) {
	for _, prefix := range []string{"oci-archive:", "docker-archive:"} {
		if strings.HasPrefix(s, prefix) {
			return p, errors.New("clients cannot open archives")
		}
	}
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		return p, fmt.Errorf("write it without %s://, as %s", scheme, rest)
	}
	rest, layout := strings.CutPrefix(s, "oci:")
	if i := strings.LastIndex(rest, "@sha256:"); i >= 0 {
		rest, p.digest = rest[:i], rest[i+1:]
		if _, err := v1.NewHash(p.digest); err != nil {
			return p, err
		}
	}
	if p.layout = layout; layout {
		p.place, p.tag, _ = strings.Cut(rest, ":")
	} else {
		p.host, p.place = cutHost(rest)
		if i := strings.LastIndexByte(p.place, ':'); i > strings.LastIndexByte(p.place, '/') {
			p.place, p.tag = p.place[:i], p.place[i+1:]
		}
		if p.host == registryHub && p.place != "" && p.place != "**" && !strings.Contains(p.place, "/") {
			p.place = "library/" + p.place
		}
	}
	if p.tag = strings.ReplaceAll(p.tag, "**", "*"); p.place == "" {
		return p, errNoRepository
	}
	if slices.Contains(strings.Split(p.place, "/"), "..") {
		return p, errors.New(`".." is not allowed`)
	}
	parts := []string{p.place, p.tag}
	if !strings.HasPrefix(p.host, "[") { // an IPv6 address
		parts = append(parts, p.host)
	}
	for _, part := range parts {
		if _, err := path.Match(strings.TrimSuffix(part, "**"), ""); err != nil {
			return p, err
		}
		if strings.Contains(strings.TrimSuffix(part, "**"), "**") {
			return p, errors.New("** is allowed only at the end")
		}
	}
	return p, nil
}

// registryHub is the host of Docker Hub as package registry writes it.
const registryHub = "index.docker.io"

// cutHost separates the host from the repository, as ParseRef does.
func cutHost(s string) (host, place string) {
	first, rest, slash := strings.Cut(s, "/")
	switch {
	case s == "**":
		return "*", "**"
	case !slash && strings.HasSuffix(s, "**") && looksLikeHost(s):
		host, place = strings.TrimSuffix(s, "**"), "**"
	case slash && (looksLikeHost(first) || strings.ContainsRune(first, '*')):
		host, place = strings.TrimSuffix(first, "**"), rest
		if host == "" {
			host = "*"
		}
	default:
		return registryHub, s
	}
	host = strings.ToLower(host)
	if host == "docker.io" {
		host = registryHub
	}
	return host, place
}

func looksLikeHost(s string) bool {
	return strings.ContainsAny(s, ".:") || strings.TrimSuffix(s, "**") == "localhost"
}

func (p pattern) match(ref registry.Ref) bool {
	switch {
	case p.layout != (ref.Layout != ""):
		return false
	case p.layout && !matchPlace(p.place, ref.Layout, true), !p.layout && !p.matchRegistry(ref):
		return false
	case p.digest != "":
		return p.digest == ref.Digest.String()
	case p.tag != "":
		ok, _ := path.Match(p.tag, ref.Tag)
		return ok && ref.Digest.Hex == ""
	}
	return true
}

func (p pattern) matchRegistry(ref registry.Ref) bool {
	return matchHost(p.host, strings.ToLower(ref.Registry)) && matchPlace(p.place, ref.Repository, false)
}

// matchHost compares hosts label by label: * matches within one label.
func matchHost(pattern, host string) bool {
	if pattern == "*" || pattern == host {
		return true
	}
	if !strings.ContainsRune(pattern, '*') {
		return false
	}
	pname, pport := splitPort(pattern)
	name, port := splitPort(host)
	if ok, _ := path.Match(pport, port); !ok || (pport == "") != (port == "") {
		return false
	}
	labels, want := strings.Split(name, "."), strings.Split(pname, ".")
	if len(labels) != len(want) {
		return false
	}
	for i := range want {
		if ok, _ := path.Match(want[i], labels[i]); !ok {
			return false
		}
	}
	return true
}

func splitPort(s string) (host, port string) {
	if h, p, err := net.SplitHostPort(s); err == nil {
		return h, p
	}
	return s, ""
}

// matchPlace compares repositories, or directories with their symbolic links resolved.
func matchPlace(pattern, place string, directory bool) bool {
	if directory {
		var err error
		if place, err = realPath(place); err != nil {
			return false
		}
		// Links are resolved in the part of the pattern without wildcards, too.
		fixed, rest := pattern, ""
		if i := strings.IndexAny(pattern, `*?[\`); i >= 0 {
			i = strings.LastIndexByte(pattern[:i], '/') + 1
			fixed, rest = pattern[:i], pattern[i:]
		}
		if fixed, err = realPath(fixed); err != nil {
			return false
		}
		if rest == "" {
			return place == fixed // a wildcard character in it is part of a name
		}
		inside, ok := strings.CutPrefix(place, strings.TrimSuffix(fixed, "/")+"/")
		if !ok {
			return false
		}
		pattern, place = rest, inside
	}
	prefix, any := strings.CutSuffix(pattern, "**")
	if !any {
		ok, _ := path.Match(pattern, place)
		return ok
	}
	// The components of prefix match one by one, the last one as a prefix.
	want, have := strings.Split(prefix, "/"), strings.Split(place, "/")
	if len(have) < len(want) {
		return false
	}
	last := len(want) - 1
	for i, w := range want {
		if i == last {
			w += "*"
		}
		if ok, _ := path.Match(w, have[i]); !ok {
			return false
		}
	}
	return len(have) > len(want) || have[last] != ""
}

// realPath resolves the symbolic links in the path of a directory, which need not
// exist.
func realPath(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	missing := ""
	for at := dir; ; at = filepath.Dir(at) {
		real, err := filepath.EvalSymlinks(at)
		if err == nil {
			return filepath.Join(real, missing), nil
		}
		if at == "/" || !isMissing(at) {
			return "", err
		}
		missing = filepath.Join(filepath.Base(at), missing)
	}
}

// isMissing reports whether the path does not exist, not even as a broken symbolic
// link.
func isMissing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}
