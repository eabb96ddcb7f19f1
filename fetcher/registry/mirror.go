package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
)

// Mirrors lists, for each registry (HOST or HOST:PORT), its mirrors in the order in which
// they are asked.
type Mirrors map[string][]Mirror

// A Mirror has blobs and manifests of a registry. It is asked for them by digest. Only if
// Resolve is set is it asked what a tag leads to and what refers to an image: such an answer
// cannot be verified, so whoever gives it chooses what runs.
type Mirror struct {
	URL     string
	Resolve bool
}

// ParseMirrors reads a hosts file. A line is a registry and its mirrors:
//
//	# HOST                 MIRROR-URL[,resolve]...
//	registry.example:5000  https://mirror.zone-a.example,resolve  http://10.0.0.7:5000
//	docker.io              https://cache.example/hub
//
// A mirror's URL is scheme://host[:port][/prefix], where the prefix comes
// before the name of the repository, as pull-through caches want it:
// docker.io/library/debian is asked for at
// https://cache.example/v2/hub/library/debian. A mirror with ",resolve" is
// trusted to resolve tags and to list referrers; the others only serve bytes by digest, even
// if the registry is down. Several lines for a host are added up. A # at the start of a word
// begins a comment.
func ParseMirrors(r io.Reader) (Mirrors, error) {
	m := make(Mirrors)
	s := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for n := 1; s.Scan(); n++ {
		fields := strings.Fields(s.Text())
		for i, f := range fields {
			if f[0] == '#' {
				fields = fields[:i]
				break
			}
		}
		if len(fields) == 0 {
			continue
		}
		host := fields[0]
		if !reHost.MatchString(host) {
			return nil, fmt.Errorf("hosts file, line %d: %q is not the host of a registry", n, host)
		}
		if host == "docker.io" {
			host = dockerHub
		}
		if len(fields) == 1 {
			return nil, fmt.Errorf("hosts file, line %d: %s has no mirror", n, host)
		}
		for _, f := range fields[1:] {
			mirror, err := parseMirror(f)
			if err != nil {
				return nil, fmt.Errorf("hosts file, line %d: mirror %q: %w", n, f, err)
			}
			m[host] = append(m[host], mirror)
		}
		if len(m[host]) > 16 {
			return nil, fmt.Errorf("hosts file, line %d: %s has more than 16 mirrors", n, host)
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("hosts file: %w", err)
	}
	return m, nil
}

func parseMirror(s string) (Mirror, error) {
	u, mark, marked := strings.Cut(s, ",")
	if marked && mark != "resolve" {
		return Mirror{}, fmt.Errorf("the mark %q is unknown: the only mark of a mirror is resolve", mark)
	}
	return Mirror{URL: strings.TrimRight(u, "/"), Resolve: marked}, checkMirror(u)
}

func checkMirror(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return errors.New("it is not a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return errors.New("it must begin with http:// or https://")
	case u.User != nil:
		return errors.New("credentials belong in the docker config")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return errors.New("it must end with the prefix of the repository")
	case !reHost.MatchString(u.Host):
		return fmt.Errorf("%q is not a host", u.Host)
	}
	if p := strings.Trim(u.Path, "/"); p != "" && !reRepository.MatchString(p) {
		return fmt.Errorf("%q cannot begin the name of a repository", p)
	}
	return nil
}
