package registry

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Mirrors are, for each registry (HOST or HOST:PORT), the URLs of its mirrors,
// the first to be asked first.
type Mirrors map[string][]string

// ParseMirrors reads a hosts file. A line is a registry and its mirrors:
//
//	# HOST                 MIRROR-URL...
//	registry.example:5000  https://mirror.zone-a.example  http://10.0.0.7:5000
//	docker.io              https://cache.example/hub
//
// A mirror's URL is scheme://host[:port][/prefix], where the prefix comes
// before the name of the repository, as pull-through caches want it:
// docker.io/library/debian is asked for at
// https://cache.example/v2/hub/library/debian. Lines with the same host add
// up. Empty lines and what follows a # at the start of a word are left out.
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
			if err := checkMirror(f); err != nil {
				return nil, fmt.Errorf("hosts file, line %d: mirror %q: %w", n, f, err)
			}
			m[host] = append(m[host], strings.TrimRight(f, "/"))
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

// A source is a registry or a mirror as a whole: its health and its counters.
type source struct {
	name     string // scheme and host
	mirrorOf string // empty for a registry itself
	log      *slog.Logger

	requests, bytes atomic.Int64
	ignoresRange    atomic.Bool // has been logged
	listsReferrers  atomic.Bool // has the referrers API
	several         several     // ranges in one answer

	mu struct {
		sync.Mutex
		errors map[int]int64
		fails  int       // since it last worked
		wrong  int       // bodies with wrong bytes, ever
		until  time.Time // leave it alone until then
	}
}

// Times that a mirror is left alone for: doubled with each failure.
const (
	restAfterFailure, maxRestAfterFailure = time.Second, 2 * time.Minute
	restAfterWrong, maxRestAfterWrong     = time.Minute, time.Hour
	restAfterMissing                      = time.Minute // the mirror may pull it yet
)

// resting says whether a mirror is being left alone. A registry never is.
func (s *source) resting(now time.Time) bool {
	if s.mirrorOf == "" {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Before(s.mu.until)
}

// distrusted says whether a mirror rests because of wrong bytes.
func (s *source) distrusted(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.wrong > 0 && now.Before(s.mu.until)
}

func (s *source) failed(after time.Duration, cause error) {
	if s.mirrorOf == "" {
		return
	}
	now := time.Now()
	s.mu.Lock()
	// Requests that were under way together fail together, once.
	first := !now.Before(s.mu.until)
	d := after
	if first {
		s.mu.fails++
		d = max(d, min(restAfterFailure<<min(s.mu.fails-1, 16), maxRestAfterFailure))
	}
	if t := now.Add(d); t.After(s.mu.until) {
		s.mu.until = t
	}
	s.mu.Unlock()
	if first {
		s.log.Warn("mirror fails, leaving it alone", "mirror", s.name, "of", s.mirrorOf, "for", d, "error", cause)
	}
}

func (s *source) distrust() {
	s.mu.Lock()
	s.mu.wrong++
	d := min(restAfterWrong<<min(s.mu.wrong-1, 16), maxRestAfterWrong)
	s.mu.until = time.Now().Add(d)
	s.mu.Unlock()
	if s.mirrorOf != "" {
		s.log.Warn("mirror sends wrong bytes, leaving it alone", "mirror", s.name, "of", s.mirrorOf, "for", d)
	} else {
		s.log.Warn("registry sends wrong bytes", "registry", s.name)
	}
}

func (s *source) succeeded() {
	if s.mirrorOf == "" {
		return
	}
	s.mu.Lock()
	s.mu.fails = 0
	s.mu.Unlock()
}

// count counts an error by its status, 0 for no answer.
func (s *source) count(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.errors == nil {
		s.mu.errors = make(map[int]int64)
	}
	s.mu.errors[status]++
}

// SourceStats are the counters of a registry or a mirror.
type SourceStats struct {
	// Source is a scheme and a host; MirrorOf is empty for a registry.
	Source, MirrorOf string
	// Requests are those sent, wherever the registry redirected them to, but
	// for tokens; Bytes are those received in bodies.
	Requests, Bytes int64
	// Errors are answers by status from 400 on, and under 0 the requests
	// that had none. Those that only asked for credentials are among them.
	Errors map[int]int64
	// Wrong counts the bodies that were distrusted.
	Wrong int64
	// Resting says that a mirror is being left alone.
	Resting bool
}

// Stats gives the counters of every source that was opened, mirrors before
// the registry they stand for.
func (c *Client) Stats() []SourceStats {
	c.mu.Lock()
	order := c.mu.order[:len(c.mu.order):len(c.mu.order)]
	c.mu.Unlock()
	var all []SourceStats
	for _, s := range order {
		st := SourceStats{Source: s.name, MirrorOf: s.mirrorOf, Requests: s.requests.Load(), Bytes: s.bytes.Load(),
			Resting: s.resting(time.Now())}
		s.mu.Lock()
		st.Errors, st.Wrong = maps.Clone(s.mu.errors), int64(s.mu.wrong)
		s.mu.Unlock()
		all = append(all, st)
	}
	return all
}
