package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
	"thaw/tracefile"
)

var update = flag.Bool("update", false, "write the golden files of help texts and JSON outputs")

// golden compares got with a file of testdata.
func golden(t testing.TB, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; go test ./cmd/thaw -run Golden -update writes it", err)
	}
	if got != string(want) {
		t.Errorf("%s is not what thaw prints; go test ./cmd/thaw -run Golden -update writes it. It prints:\n%s", path, got)
	}
}

// commands are all commands but those that cobra makes: completion and help.
func commands(c *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		all = append(all, commands(sub)...)
	}
	return all
}

// words are the arguments that run a command.
func words(c *cobra.Command) []string { return strings.Fields(c.CommandPath())[1:] }

// Each command's help is a file in testdata/help, and there are no others.
func TestGoldenHelp(t *testing.T) {
	want := make(map[string]bool)
	for _, c := range commands(rootCommand(new(app))) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".txt"
		want[name] = true
		out := must(t, append(words(c), "--help")...)
		golden(t, "help/"+name, strings.ReplaceAll(out, defaultPlatform, "linux/GOARCH"))
		for line := range strings.Lines(out) {
			// Examples are to be copied as they are.
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 100 && !strings.HasPrefix(line, "  ") {
				t.Errorf("%s --help: %d columns: %s", c.CommandPath(), n, line)
			}
		}
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: its one-line help is %q", c.CommandPath(), c.Short)
		}
	}
	for _, name := range filesIn(t, "testdata/help") {
		if !want[filepath.Base(name)] {
			t.Errorf("testdata/help/%s is of no command", filepath.Base(name))
		}
	}
}

// noResult are the commands that print no result, but a file, a picture or a page.
var noResult = []string{"thaw", "thaw man", "thaw trace", "thaw trace export", "thaw trace plot", "thaw overlay"}

// Every command that prints a result prints it as JSON, too.
func TestEveryResultHasJSON(t *testing.T) {
	for _, c := range commands(rootCommand(new(app))) {
		if has := c.Flags().Lookup("json") != nil; has == slices.Contains(noResult, c.CommandPath()) {
			t.Errorf("%s: --json is %v", c.CommandPath(), has)
		}
	}
}

// What differs between two runs, machines, or versions of the compressor.
var volatile = []struct{ pattern, with string }{
	{`sha256:[0-9a-f]{64}`, "sha256:DIGEST"},
	{`"index": "[0-9a-f]{64}"`, `"index": "DIGEST"`},
	{`"((?:stored|index|uploaded|space|overlay_stored|commit_stored)_bytes|bytes|seconds|stored)": [0-9.e+-]+`, `"$1": 0`},
	{`"(go|platform|version)": "[^"]*"`, `"$1": "VALUE"`},
	{`\t"commit(_time)?": "[^"]*",\n`, ``},
	{`"modified": (true|false)`, `"modified": false`},
}

// goldenJSON compares a line of JSON, indented, but for what is volatile.
func goldenJSON(t testing.TB, name, line, dir string) {
	t.Helper()
	if strings.Count(line, "\n") != 1 {
		t.Errorf("%s: not one line: %q", name, line)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(line), "", "\t"); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	s := strings.ReplaceAll(b.String(), dir, "DIR")
	for _, v := range volatile {
		s = regexp.MustCompile(v.pattern).ReplaceAllString(s, v.with)
	}
	golden(t, "json/"+name+".json", s)
}

// What scripts read has the fields that it had.
func TestGoldenJSON(t *testing.T) {
	dir := t.TempDir()
	img := imageOf(t, layerOf(t, file{name: "run", data: []byte("#!/nowhere\n")}, file{name: "a", data: make([]byte, 9000)}),
		layerOf(t, file{name: "b", data: []byte("b")}))
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Config.Cmd = []string{"/run"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	copyLayout(t, dir+"/src", "v1", img)
	copyLayout(t, dir+"/beside", "v1", img)
	image := "oci:" + dir + "/dst:v1"

	goldenJSON(t, "version", must(t, "version", "--json"), dir)
	first := must(t, "build", "--json", "--size", "64M", "oci:"+dir+"/src", image)
	goldenJSON(t, "build", first, dir)
	goldenJSON(t, "build-again", must(t, "build", "--json", "--size", "64M", "oci:"+dir+"/src", image), dir)
	goldenJSON(t, "inspect", must(t, "inspect", "--json", image), dir)
	goldenJSON(t, "verify", must(t, "verify", "--json", image), dir)
	goldenJSON(t, "serve", readyLine(t, image, "--listen", "unix:"+dir+"/s", "--cache", dir+"/cache"), dir)
	must(t, "build", "oci:"+dir+"/beside")
	goldenJSON(t, "inspect-beside", must(t, "inspect", "--json", "oci:"+dir+"/beside"), dir)

	var b built
	if err := json.Unmarshal([]byte(first), &b); err != nil {
		t.Fatal(err)
	}
	writeTrace(t, dir+"/start.trace", dir+"/dst", b)
	goldenJSON(t, "trace-show", must(t, "trace", "show", "--json", dir+"/start.trace"), dir)
	goldenJSON(t, "trace-show-image", must(t, "trace", "show", "--json", dir+"/start.trace", "--image", image), dir)
	goldenJSON(t, "trace-push", must(t, "trace", "push", "--json", image, dir+"/start.trace"), dir)
	recording := serving(t, image, "--listen", "unix:"+dir+"/r", "--cache", dir+"/recording", "--record", dir+"/r.trace")
	goldenJSON(t, "trace-stop", must(t, "trace", "stop", "--json", "--cache", dir+"/recording"), dir)
	recording.kill()
	goldenJSON(t, "trace-merge", must(t, "trace", "merge", "--json", dir+"/start.trace", "-o", dir+"/merged.trace"), dir)
	goldenJSON(t, "trace-pack", must(t, "trace", "pack", "--json", image, dir+"/start.trace"), dir)
	overlay := overlayOf(t, dir+"/overlay", first)
	goldenJSON(t, "overlay-ls", must(t, "overlay", "ls", "--json", dir), dir)
	goldenJSON(t, "overlay-inspect", must(t, "overlay", "inspect", "--json", overlay), dir)
	goldenJSON(t, "overlay-diff", must(t, "overlay", "diff", "--json", overlay, "--cache", dir+"/cache"), dir)
	goldenJSON(t, "commit", must(t, "commit", "--json", overlay, "oci:"+dir+"/dst:changed", "--cache", dir+"/cache"), dir)
	goldenJSON(t, "inspect-committed", must(t, "inspect", "--json", "oci:"+dir+"/dst:changed"), dir)
	goldenJSON(t, "overlay-rm", must(t, "overlay", "rm", "--json", overlay), dir)
	goldenJSON(t, "build-trace", must(t, "build", "--json", "--size", "64M", "--trace", dir+"/start.trace", "oci:"+dir+"/src", image), dir)
}

// overlayOf makes an overlay of the image that build --json describes, with a block of data
// and one of zeros where the image has nothing.
func overlayOf(t testing.TB, dir, build string) string {
	t.Helper()
	b := decoded[built](t, build)
	digest, err := blockmap.ParseDigest(strings.TrimPrefix(b.Digest, "sha256:"))
	if err != nil {
		t.Fatal(err)
	}
	place, _, _ := strings.Cut(strings.TrimPrefix(b.Target, "oci:"), ":")
	o, err := blockmap.OpenOverlay(dir, blocktest.NewMemory(b.DeviceSize), blockmap.OverlayOptions{Image: "oci:" + place + "@" + b.Digest, Digest: digest})
	if err == nil {
		err = o.WriteAt(t.Context(), bytes.Repeat([]byte{1}, blockmap.BlockSize), b.DeviceSize-blockmap.BlockSize)
	}
	if err == nil {
		err = o.Zero(t.Context(), blockmap.Range(b.DeviceSize-4*blockmap.BlockSize, blockmap.BlockSize), true)
	}
	if err == nil {
		err = o.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// readyLine is what thaw serve --json prints.
func readyLine(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*atMost)
	defer cancel()
	r, w := io.Pipe()
	ended := make(chan int, 1)
	var stderr syncBuffer
	go func() {
		ended <- run(ctx, append([]string{"serve", "--json"}, args...), w, &stderr)
		w.Close()
	}()
	b := make([]byte, 64<<10)
	n, err := r.Read(b)
	cancel()
	if code := <-ended; err != nil || code != exitOK {
		t.Fatalf("serve: exit %d, %v\n%s", code, err, stderr.String())
	}
	return string(b[:n])
}

// Completion offers the values that a flag takes, the images of the cache, and
// paths of layouts and archives.
func TestCompletions(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	copyLayout(t, dir+"/app", "v1", imageOf(t, layerOf(t, files(1, "a", 1)...)))
	saveArchive(t, dir+"/app.tar", imageOf(t, layerOf(t, files(1, "a", 1)...)))
	must(t, "build", "oci:app")
	readyLine(t, "oci:app:v1", "--listen", "unix:"+dir+"/s", "--cache", dir+"/cache")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"inspect", "oci:a"}, "oci:app/"},
		{[]string{"inspect", "oci:" + dir + "/a"}, "oci:" + dir + "/app/"},
		{[]string{"inspect", "oci:./a"}, "oci:./app/"},
		{[]string{"inspect", "oci:nowhere/"}, ""},
		{[]string{"serve", "--cache", dir + "/cache", ""}, "oci:app:v1 oci:"},
		{[]string{"serve", "--cache", dir + "/cache", "o"}, "oci:app:v1 oci:"},
		{[]string{"serve", "--cache", dir + "/cache", "x"}, ""},
		{[]string{"build", "docker"}, "docker-archive:"},
		{[]string{"build", "docker-archive:a"}, "docker-archive:app/ docker-archive:app.tar"},
		{[]string{"verify", "oci:app", ""}, ""},
		{[]string{"trace", "show", "x", "--image", "oci:app"}, "oci:app/"},
		{[]string{"inspect", "--log-format", ""}, "text json"},
		{[]string{"trace", "export", "--format", ""}, "fio blkparse"},
		{[]string{"serve", "--fetch-ahead", ""}, "metadata readahead program none"},
		{[]string{"build", "--jobs", ""}, ""},
		{[]string{"tra"}, "trace"},
	} {
		out := must(t, append([]string{"__completeNoDesc"}, c.args...)...)
		lines := strings.Fields(out)
		if got := strings.Join(lines[:max(len(lines)-1, 0)], " "); got != c.want {
			t.Errorf("completing %q: %q, want %q", c.args, got, c.want)
		}
	}
}

// There is a manual page for each command, which groff reads without a complaint,
// and two runs write the same.
func TestMan(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	one, two := t.TempDir()+"/new/man1", t.TempDir()
	must(t, "man", one)
	must(t, "man", two)
	for _, c := range commands(rootCommand(new(app))) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		page, err := os.ReadFile(filepath.Join(one, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if again, err := os.ReadFile(filepath.Join(two, name)); err != nil || !bytes.Equal(page, again) {
			t.Errorf("%s differs between two runs: %v", name, err)
		}
		if !strings.Contains(string(page), ".SH NAME") || !strings.Contains(string(page), "2023") {
			t.Errorf("%s:\n%s", name, page)
		}
	}
	if _, stderr, code := thaw(t, "man", "/proc/none"); code != exitError || !strings.Contains(stderr, "/proc/none") {
		t.Errorf("a directory that cannot be made: exit %d, %s", code, stderr)
	}
}

// writeTrace writes a trace of one start of the image that build --json describes,
// which is in a layout.
func writeTrace(t testing.TB, path, layout string, b built) {
	t.Helper()
	raw, err := os.ReadFile(layout + "/blobs/sha256/" + strings.TrimPrefix(b.Digest, "sha256:"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := flatten.ParseImage(raw)
	if err != nil {
		t.Fatal(err)
	}
	index, err := blockmap.ParseDigest(m.Index.Digest.Hex)
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	w, err := tracefile.NewWriter(&file, tracefile.Header{Index: index, Blocks: uint32(b.DeviceSize / blockmap.BlockSize), Starts: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(64) {
		if err := w.Add(tracefile.Touch{At: time.Duration(i) * time.Millisecond, Block: 8 * i, Count: 4, Miss: i%2 == 0}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(tracefile.End{Why: tracefile.WentQuiet, After: time.Second, Dropped: 3}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, file.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The reference names each command and each flag.
func TestReference(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, c := range commands(rootCommand(new(app))) {
		if c.Runnable() && !c.HasSubCommands() && !strings.Contains(text, "`"+strings.Replace(c.UseLine(), " [flags]", "", 1)+"`") {
			t.Errorf("README.md does not have the command `%s`", strings.Replace(c.UseLine(), " [flags]", "", 1))
		}
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Name != "help" && f.Name != "version" && !regexp.MustCompile("--"+f.Name+`\b[^-]`).MatchString(text) {
				t.Errorf("README.md does not have --%s of %s", f.Name, c.CommandPath())
			}
		})
	}
}
