package registry

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Ref names an image, or a repository of images. It is one of
//
//	[HOST[:PORT]/]NAME[:TAG][@sha256:HEX]    a registry; Docker Hub without HOST
//	oci:DIR[:TAG][@sha256:HEX]               an OCI layout directory
//	docker-archive:FILE[:NAME]               what docker save writes
//	oci-archive:FILE[:TAG][@sha256:HEX]      a tar of an OCI layout
//
// Archives may be compressed.
//
// If a name has a digest, the digest counts and the tag is only kept. Refs are comparable, and
// ParseRef reads what String returns.
type Ref struct {
	// Registry and Repository are the host, with its port if any, and the full name of the
	// repository. Both are empty for files.
	Registry, Repository string
	// Layout is the directory of an OCI layout, Archive is the file of an archive; OCI is
	// set if the archive holds an OCI layout.
	Layout, Archive string
	OCI             bool
	// Tag is "latest" for a registry if neither tag nor digest is given. In a layout it is
	// the annotation org.opencontainers.image.ref.name, in docker's archives one of the
	// RepoTags; empty means the only image.
	Tag string
	// Digest is zero if there is none.
	Digest v1.Hash
}

// dockerHub is the host of "docker.io", and of names without a host.
const dockerHub = "index.docker.io"

var (
	reTag        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)
	reRepository = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*$`)
	reHost       = regexp.MustCompile(`^(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?$`)
	reRefName    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.:@/+-]*$`)
)

// The lengths are not in the expressions: to compile such a repetition takes a millisecond,
// at each start of the program.
func validTag(s string) bool     { return len(s) <= 128 && reTag.MatchString(s) }
func validRefName(s string) bool { return len(s) <= 256 && reRefName.MatchString(s) }

// ParseRef reads a reference. Its error says what is wrong with s.
func ParseRef(s string) (Ref, error) {
	r, err := parseRef(s)
	if err != nil {
		return Ref{}, fmt.Errorf("image reference %q: %w", s, err)
	}
	return r, nil
}

func parseRef(s string) (Ref, error) {
	if strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return Ref{}, errors.New("control characters are not allowed")
	}
	if rest, ok := strings.CutPrefix(s, "oci:"); ok {
		r, err := parseLayout(rest)
		if r.Layout == "" && err == nil {
			err = errors.New("the directory is missing: oci:DIR[:TAG]")
		}
		return r, err
	}
	if rest, ok := strings.CutPrefix(s, "oci-archive:"); ok {
		r, err := parseLayout(rest)
		if r.Layout == "" && err == nil {
			err = errors.New("the file is missing: oci-archive:FILE[:TAG]")
		}
		r.Archive, r.Layout, r.OCI = r.Layout, "", true
		return r, err
	}
	if rest, ok := strings.CutPrefix(s, "docker-archive:"); ok {
		var r Ref
		r.Archive, r.Tag, _ = strings.Cut(rest, ":")
		switch {
		case r.Archive == "":
			return Ref{}, errors.New("the file is missing: docker-archive:FILE[:NAME]")
		case strings.HasSuffix(rest, ":"):
			return Ref{}, errors.New("the name after the colon is missing")
		}
		return r, nil
	}
	return parseRegistry(s)
}

func parseLayout(s string) (Ref, error) {
	s, digest, err := cutDigest(s)
	if err != nil {
		return Ref{}, err
	}
	r := Ref{Digest: digest}
	var colon bool
	r.Layout, r.Tag, colon = strings.Cut(s, ":")
	if r.Layout != "" && colon && !validRefName(r.Tag) {
		return Ref{}, fmt.Errorf("%q is not a tag of a layout", r.Tag)
	}
	return r, nil
}

func parseRegistry(s string) (Ref, error) {
	if s == "" {
		return Ref{}, errors.New("it is empty")
	}
	if strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../") {
		return Ref{}, errors.New("it is a path, and not the name of a repository")
	}
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		return Ref{}, fmt.Errorf("write it without %s://, as %s", scheme, rest)
	}
	name, digest, err := cutDigest(s)
	if err != nil {
		return Ref{}, err
	}
	r := Ref{Registry: dockerHub, Repository: name, Digest: digest}
	// The part before the first slash is a host if it looks like one.
	if first, rest, ok := strings.Cut(name, "/"); ok && (strings.ContainsAny(first, ".:") || first == "localhost") {
		r.Registry, r.Repository = first, rest
		if !reHost.MatchString(first) {
			return Ref{}, fmt.Errorf("%q is not a host", first)
		}
		if u, err := url.Parse("//" + first); err != nil || u.Host != first {
			return Ref{}, fmt.Errorf("%q is not a host", first)
		}
		if first == "docker.io" {
			r.Registry = dockerHub
		}
	}
	if i := strings.LastIndexByte(r.Repository, ':'); i >= 0 {
		r.Repository, r.Tag = r.Repository[:i], r.Repository[i+1:]
		if !validTag(r.Tag) {
			return Ref{}, fmt.Errorf("%q is not a tag: letters, digits, _ . and -, at most 128 of them", r.Tag)
		}
	} else if digest == (v1.Hash{}) {
		r.Tag = "latest"
	}
	given := r.Repository
	if r.Registry == dockerHub && given != "" && !strings.Contains(given, "/") {
		r.Repository = "library/" + given
	}
	switch {
	case r.Repository == "":
		return Ref{}, errors.New("the name of the repository is missing")
	case len(r.Repository) > 255:
		return Ref{}, errors.New("the name of the repository is longer than 255 bytes")
	case !reRepository.MatchString(r.Repository):
		return Ref{}, fmt.Errorf("%q is not the name of a repository: lower-case letters and digits, "+
			"separated by . _ or -, in components separated by /", given)
	}
	return r, nil
}

// cutDigest takes the digest off the end of s.
func cutDigest(s string) (string, v1.Hash, error) {
	i := strings.LastIndexByte(s, '@')
	if i < 0 || strings.ContainsRune(s[i:], '/') {
		return s, v1.Hash{}, nil
	}
	h, err := v1.NewHash(s[i+1:])
	if err != nil || h.Algorithm != "sha256" {
		return "", v1.Hash{}, fmt.Errorf("%q is not a digest: sha256: and 64 hexadecimal digits", s[i+1:])
	}
	return s[:i], h, nil
}

// String returns the full reference.
func (r Ref) String() string {
	s := r.Place()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != (v1.Hash{}) {
		s += "@" + r.Digest.String()
	}
	return s
}

// Place is the reference without tag and digest.
func (r Ref) Place() string {
	switch {
	case r.Layout != "":
		return "oci:" + r.Layout
	case r.OCI:
		return "oci-archive:" + r.Archive
	case r.Archive != "":
		return "docker-archive:" + r.Archive
	}
	return r.Registry + "/" + r.Repository
}

// WithDigest is a reference to a digest in the same place.
func (r Ref) WithDigest(h v1.Hash) Ref {
	r.Tag, r.Digest = "", h
	return r
}

// WithTag is a reference to a tag in the same place.
func (r Ref) WithTag(tag string) Ref {
	r.Tag, r.Digest = tag, v1.Hash{}
	return r
}

// key is what a registry is asked for: the digest if there is one, or else the tag.
func (r Ref) key() string {
	if r.Digest != (v1.Hash{}) {
		return r.Digest.String()
	}
	return r.Tag
}
