package bench

import (
	"bufio"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// BuildThaw compiles the thaw of this checkout into dir.
func BuildThaw(ctx context.Context, dir string) (path string, err error) {
	path = filepath.Join(dir, "thaw")
	_, err = Run(exec.CommandContext(ctx, "go", "build", "-buildvcs=auto", "-o", path, "thaw/cmd/thaw"))
	return path, err
}

// Commit returns the commit that a Go program was built from, if the program
// knows it.
func Commit(program string) (string, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", fmt.Errorf("commit of %s: %w", program, err)
	}
	commit, more := "unknown commit", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value[:min(len(s.Value), 12)]
		case s.Key == "vcs.modified" && s.Value == "true":
			more = " and changes"
		}
	}
	return commit + more, nil
}

// Server is a running `thaw serve`.
type Server struct {
	Socket string
	Ready  time.Duration // from its start to its ready line

	image, cache string
	cmd          *exec.Cmd
	began        time.Time
	said         tail
	err          error // of the process; set before done is closed
	done         chan struct{}
}

// Serve starts `thaw serve` with one image on a unix socket, with its cache and
// socket in dir, and returns once it is ready. more has further arguments; a later
// flag overrides an earlier one.
func Serve(ctx context.Context, thaw, image, dir string, more ...string) (*Server, error) {
	s := &Server{Socket: filepath.Join(dir, "sock"), image: image, cache: filepath.Join(dir, "cache"), done: make(chan struct{})}
	s.cmd = exec.Command(thaw, append([]string{"serve", image, "--listen", "unix:" + s.Socket, "--cache", s.cache, "--json", "--log-format", "json"}, more...)...)
	s.cmd.Stderr = &s.said
	dieWithUs(s.cmd)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.began = time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	ready := make(chan error, 1)
	go func() {
		_, err := bufio.NewReader(out).ReadBytes('\n')
		ready <- err
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	select {
	case err = <-ready:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		s.kill()
		return nil, fmt.Errorf("%s did not become ready: %w%s", Command(s.cmd), err, s.said.lines())
	}
	s.Ready = time.Since(s.began)
	return s, nil
}

// Served is what a server logs at its end.
type Served struct {
	Usage        Usage `json:"-"`
	FetchedBytes int64 `json:"fetched_bytes"`
	Chunks       int64 `json:"fetched_chunks"`
	Requests     int64 `json:"requests"`
	StoredBytes  int64 `json:"images_stored_bytes"`
	ContentBytes int64 `json:"images_content_bytes"`
	CachedBytes  int64 `json:"cached_bytes"`
	Retries      int64 `json:"retries"`
	WrongChunks  int64 `json:"wrong_chunks"`
	FailedChunks int64 `json:"failed_chunks"`
}

// Stop ends the server with SIGTERM, and returns what it served. After Kill or
// Stop it fails.
func (s *Server) Stop() (*Served, error) {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return nil, fmt.Errorf("stop thaw serve: %w%s", err, s.said.lines())
	}
	select {
	case <-s.done:
	case <-time.After(time.Minute):
		s.kill()
		return nil, fmt.Errorf("stop thaw serve: it has not ended a minute after SIGTERM%s", s.said.lines())
	}
	if s.err != nil {
		return nil, fmt.Errorf("thaw serve: %w%s", s.err, s.said.lines())
	}
	d, err := parseServed(s.said.b)
	if err != nil {
		return nil, err
	}
	d.Usage = usageOf(s.cmd.ProcessState, time.Since(s.began))
	return d, nil
}

// PID is the server's process ID.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Said returns the end of the server's log, for the end of an error. While the
// server runs it is empty.
func (s *Server) Said() string {
	select {
	case <-s.done:
		return s.said.lines()
	default:
		return ""
	}
}

// Kill kills the server unless it has ended.
func (s *Server) Kill() {
	select {
	case <-s.done:
	default:
		s.kill()
	}
}

func (s *Server) kill() {
	s.cmd.Process.Kill() // fails only if it has ended
	<-s.done
}

// parseServed finds the summary in a log.
func parseServed(log []byte) (*Served, error) {
	var found *Served
	for len(log) > 0 {
		n, line, err := bufio.ScanLines(log, true)
		if err != nil || n == 0 {
			break
		}
		log = log[n:]
		var m struct {
			Msg string `json:"msg"`
			Served
		}
		if json.Unmarshal(line, &m) == nil && m.Msg == "stopped" {
			found = &m.Served
		}
	}
	if found == nil {
		return nil, errors.New("the log of thaw serve has no line \"stopped\" that says what it fetched")
	}
	return found, nil
}

// Registry is a running docker-registry on a loopback port.
type Registry struct {
	Addr string
	cmd  *exec.Cmd
	said tail
}

// StartRegistry starts a registry that stores everything in dir.
func StartRegistry(ctx context.Context, dir string) (*Registry, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "registry.yml")
	err = os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: %q}
`, filepath.Join(dir, "storage"), addr), 0o600)
	if err != nil {
		return nil, err
	}
	r := &Registry{Addr: addr, cmd: exec.Command("docker-registry", "serve", config)}
	r.cmd.Stderr = &r.said
	dieWithUs(r.cmd)
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	if err := waitForTCP(ctx, addr); err != nil {
		r.Close()
		return nil, fmt.Errorf("start a registry: %w%s", err, r.said.lines())
	}
	return r, nil
}

// PID is the registry's process.
func (r *Registry) PID() int { return r.cmd.Process.Pid }

// Close kills the registry.
func (r *Registry) Close() {
	r.cmd.Process.Kill() // fails only if it has ended
	r.cmd.Wait()
}

// freeAddr returns a loopback address that was free a moment ago.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// waitForTCP waits up to a minute until something listens on addr.
func waitForTCP(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		if e := sleep(ctx, 10*time.Millisecond); e != nil {
			return errors.Join(e, err)
		}
	}
}
