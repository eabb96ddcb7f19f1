package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// layersOf is a source of n layers of 1 MiB each, which give what read does.
func layersOf(n int, read func(p []byte) (int, error)) *flatten.Source {
	s := new(flatten.Source)
	for i := range n {
		d := v1.Descriptor{Size: 1 << 20, Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%012d%052d", i+1, 0)}}
		s.Layers = append(s.Layers, flatten.Layer{Descriptor: d, Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(readerFunc(read)), nil
		}})
	}
	return s
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

var (
	fromRef = registry.Ref{Registry: "from.example", Repository: "a"}
	toRef   = registry.Ref{Registry: "to.example", Repository: "a"}
)

// Only layers that are worked on have a row, whatever the terminal's size, and what
// has moved nothing on for a second is named.
func TestProgressRows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		defer close(hang)
		src := layersOf(120, func(p []byte) (int, error) { <-hang; return 0, io.EOF })
		a := &app{stderr: &screen{out: io.Discard, size: func() (int, int) { return 80, 24 }}}
		p := newProgress(a, nil, src, fromRef, toRef)
		defer p.end()
		rows := func(width, most int) []string {
			p.screen.mu.Lock() // as when it draws them
			defer p.screen.mu.Unlock()
			return p.rows(time.Now(), width, most)
		}
		show := func(width, most int) string { return strings.Join(rows(width, most), "\n") }
		want := func(what string, width, most int, want string) {
			t.Helper()
			if got := show(width, most); got != strings.TrimPrefix(want, "\n") {
				t.Errorf("%s:\n%s\nwant:%s", what, got, want)
			}
		}
		want("nothing runs", 79, 23, `
0 of 120 layers [..........] looking for converted layers in to.example`)

		p.Done(0, true)
		for _, i := range []int{1, 2, 118} {
			rc, err := src.Layers[i].Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if i == 2 {
				go rc.Read(nil)
			}
		}
		synctest.Wait()
		show(79, 23) // rates begin here
		time.Sleep(2 * time.Second)
		p.Read(1, 600<<10)
		p.Read(118, 1<<20)
		p.Push(118, 1<<20)
		p.Pushed(118, 512<<10)
		want("at 80 columns", 79, 23, `
layer   2/120 000000000002 [##........] 600 KiB of 1.0 MiB, 300 KiB/s
layer   3/120 000000000003 [..........] waiting for from.example
layer 119/120 000000000119 [#######...] pushing 512 KiB of 1.0 MiB, 768 KiB/s
1 of 120 layers (1 reused) [..........] 2.6 of 120 MiB, 1.0 MiB/s`)
		want("at 40 columns", 39, 23, `
  2/120 [##........] 600 KiB of 1.0 MiB
  3/120 waiting for from.example
119/120 [#######...] 512 KiB of 1.0 MiB
1/120 [..........] 2.6 of 120 MiB`)
		want("at 4 lines", 79, 3, `
layer   2/120 000000000002 [##........] 600 KiB of 1.0 MiB, 300 KiB/s
and 2 more
1 of 120 layers (1 reused) [..........] 2.6 of 120 MiB, 1.0 MiB/s`)
		want("at 2 lines", 79, 1, `
1 of 120 layers (1 reused) [..........] 2.6 of 120 MiB, 1.0 MiB/s`)
		time.Sleep(2 * time.Second)
		p.Done(1, false)
		want("the push hangs", 79, 23, `
layer   3/120 000000000003 [..........] waiting for from.example
layer 119/120 000000000119 [#######...] waiting for to.example
2 of 120 layers (1 reused) [..........] 3.0 of 120 MiB, 534 KiB/s`)
		p.Done(2, false)
		want("all that runs waits", 79, 23, `
layer 119/120 000000000119 [#######...] waiting for to.example
3 of 120 layers (1 reused) [..........] waiting for to.example`)
		for i := range 120 {
			if i != 118 {
				p.Done(i, i == 0)
			}
		}
		p.Pushed(118, 1<<20)
		want("the last push", 79, 23, `
layer 119/120 000000000119 [##########] pushing 1.0 of 1.0 MiB, 512 KiB/s
119 of 120 layers (1 reused) [##########] pushing 1.0 of 1.0 MiB, 662 KiB/s`)
		p.Done(118, false)
		want("all layers", 79, 23, `
120 of 120 layers (1 reused) [##########] assembling the filesystem`)
		for width := range 100 {
			for _, row := range rows(width, 23) {
				if len(row) > width {
					t.Errorf("%d characters in %d columns: %q", len(row), width, row)
				}
			}
		}
	})
}

// Where stderr is no terminal there is a line a layer, and one at times while none
// is done; with a JSON log they are a part of it.
func TestProgressLines(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		synctest.Test(t, func(t *testing.T) {
			var out syncBuffer
			src := layersOf(3, func(p []byte) (int, error) { return 0, io.EOF })
			log := slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			}}))
			p := newProgress(&app{stderr: &out, logFormat: format}, log, src, fromRef, toRef)
			p.Done(0, true)
			if _, err := src.Layers[1].Open(t.Context()); err != nil {
				t.Fatal(err)
			}
			p.Read(1, 768<<10)
			time.Sleep(lineInterval + time.Second)
			p.Push(1, 700<<10)
			p.Done(1, false)
			p.end()
			want := `layer 1/3 000000000001: already there
1 of 3 layers (1 reused): 1.8 of 3.0 MiB, 51 KiB/s
layer 2/3 000000000002: stored as 700 KiB
`
			if format == "json" {
				want = `{"level":"INFO","msg":"layer done","layer":1,"layers":3,"digest":"sha256:` + src.Layers[0].Digest.Hex + `","reused":true,"stored_bytes":0}
{"level":"INFO","msg":"building","layers_done":1,"layers":3,"read_bytes":1835008,"bytes":3145728,"status":"1.8 of 3.0 MiB, 51 KiB/s"}
{"level":"INFO","msg":"layer done","layer":2,"layers":3,"digest":"sha256:` + src.Layers[1].Digest.Hex + `","reused":false,"stored_bytes":716800}
`
			}
			if out.String() != want {
				t.Errorf("%s:\n%swant:\n%s", format, out.String(), want)
			}
		})
	}
}

// What is written while rows are shown stands above them, also after the terminal
// has become narrower.
func TestScreenWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		term := &terminal{t: t, width: 40, height: 10}
		n := 0
		s := &screen{out: term, size: term.size}
		s.start(func(time.Time, int, int) []string {
			n++
			return []string{fmt.Sprintf("first row %d with thirty characters", n), fmt.Sprintf("second row %d", n)}
		})
		time.Sleep(10*frame + frame/2)
		fmt.Fprintln(s, "a warning")
		time.Sleep(frame)
		if got := term.text(); got != "a warning\nfirst row 11 with thirty characters\nsecond row 11\n" {
			t.Errorf("shown:\n%s", got)
		}
		term.resize(20)
		time.Sleep(frame)
		if got := term.text(); got != "a warning\nfirst row 12 with thi\nrty characters\nsecond row 12\n" && !strings.HasPrefix(got, "a warning\nfirst row 12") {
			t.Errorf("after it has become narrower:\n%s", got)
		}
		s.stop()
		if got := term.text(); got != "a warning\n" {
			t.Errorf("left on the screen:\n%q", got)
		}
	})
}

// A build on a terminal, in a process of its own: the rows stay within 80 and 40
// columns, no layer has one before its turn, and nothing is left in the end but the
// results and the log.
func TestBuildOnATerminal(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	for _, width := range []int{80, 40} {
		p := startProxy(t, reg.addr)
		ref := p.host() + "/team/app" + strconv.Itoa(width) + ":v1"
		img := imageOf(t, layerOf(t, files(1, "a", 3)...), layerOf(t, files(2, "b", 3)...), layerOf(t, files(3, "c", 3)...))
		push(t, ref, img)
		slow := make(chan struct{})
		release := sync.OnceFunc(func() { close(slow) })
		t.Cleanup(release)
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		first, err := layers[0].Digest()
		if err != nil {
			t.Fatal(err)
		}
		p.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, first.Hex) {
				select {
				case <-slow:
				case <-r.Context().Done():
				}
			}
			return true
		})
		primary, secondary := openPTY(t, width, 24)
		cmd := asProgram("build", ref, "--jobs", "1", "--temp", t.TempDir())
		cmd.Env = append(cmd.Env, "TERM=xterm")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, secondary
		if err := startWithUs(cmd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill() })
		secondary.Close()
		shown := make(chan string, 10000)
		term := &terminal{t: t, width: width, height: 24}
		go func() {
			defer close(shown)
			b := make([]byte, 64<<10)
			for {
				n, err := primary.Read(b)
				term.Write(b[:n])
				if err != nil { // EIO: the program has closed it
					return
				}
				shown <- term.text()
			}
		}()
		waiting := "waiting for " + p.host()
		seen := false
		timeout := time.After(atMost)
	frames:
		for {
			select {
			case text, ok := <-shown:
				if !ok {
					break frames
				}
				// The other layers do not wait for the first. When they are done, its row
				// is left.
				lines := strings.Split(strings.TrimSpace(text), "\n")
				if !seen && len(lines) == 2 && strings.Contains(text, waiting) && strings.Contains(lines[1], "2") {
					seen = true
					if !strings.Contains(lines[0], "1/3 ") {
						t.Errorf("%d columns:\n%s", width, text)
					}
					release()
				}
			case <-timeout:
				t.Fatalf("%d columns: it does not end; shown:\n%s", width, term.text())
			}
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%d columns: %v\n%s", width, err, term.text())
		}
		if !seen {
			t.Errorf("%d columns: no row said that it waits", width)
		}
		if term.wrapped {
			t.Errorf("%d columns: a row was too wide", width)
		}
		if left := term.text(); left != "" {
			t.Errorf("%d columns: left on the screen:\n%s", width, left)
		}
		if !strings.Contains(out.String(), "serve    thaw serve "+ref) {
			t.Errorf("%d columns: printed:\n%s", width, out.String())
		}
	}
}

// openPTY opens a pseudo terminal of a size.
func openPTY(t testing.TB, width, height int) (primary, secondary *os.File) {
	t.Helper()
	primary, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { primary.Close() })
	fd := int(primary.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(height), Col: uint16(width)})
	}
	if err == nil {
		secondary, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { secondary.Close() })
	return primary, secondary
}

// terminal is what a terminal makes of the sequences that a screen uses. Any other
// fails the test.
type terminal struct {
	t             testing.TB
	mu            sync.Mutex
	width, height int
	lines         []string // the last one is where the cursor is, at its end
	wrapped       bool
	rest          string // of what was written: the beginning of a sequence
}

func (m *terminal) size() (int, int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.width, m.height
}

// resize breaks lines that are too long now, as most terminals do.
func (m *terminal) resize(width int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.width = width
	var lines []string
	for _, l := range m.lines {
		for len(l) > width {
			lines, l = append(lines, l[:width]), l[width:]
		}
		lines = append(lines, l)
	}
	m.lines = lines
}

// begun is the beginning of a sequence.
var begun = regexp.MustCompile(`^\x1b(\[\d*)?$`)

var sequence = regexp.MustCompile(`^\x1b\[(\d*)([AJ])`)

func (m *terminal) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.rest + string(p)
	for m.rest = ""; s != ""; {
		if begun.MatchString(s) { // the other part comes with the next read
			m.rest = s
			break
		}
		if m.lines == nil {
			m.lines = []string{""}
		}
		last := len(m.lines) - 1
		if found := sequence.FindStringSubmatch(s); found != nil {
			s = s[len(found[0]):]
			if found[2] == "A" {
				n, err := strconv.Atoi(found[1])
				if err != nil || n > last || m.lines[last] != "" {
					m.t.Errorf("the cursor goes up %s lines from line %d %q", found[1], last, m.lines[last])
					n = last
				}
				// A screen erases from where it goes to.
				if !strings.HasPrefix(s, "\x1b[J") && !begun.MatchString(s) && s != "" {
					m.t.Errorf("the cursor goes up and nothing is erased: %q", s)
				}
				m.lines = append(m.lines[:last-n], "")
			}
			continue
		}
		c := s[0]
		s = s[1:]
		switch {
		case c == '\r': // a terminal has it before each \n
		case c == '\n':
			m.lines = append(m.lines, "")
		case c < ' ' || c > '~':
			m.t.Errorf("a terminal is sent %q", c)
		default:
			if len(m.lines[last]) == m.width {
				m.wrapped = true
				m.lines, last = append(m.lines, ""), last+1
			}
			m.lines[last] += string(c)
		}
	}
	return len(p), nil
}

func (m *terminal) text() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.Join(m.lines, "\n")
}
