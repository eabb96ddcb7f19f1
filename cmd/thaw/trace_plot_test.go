package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"image/png"
	"os"
	"strings"
	"testing"
	"time"

	"thaw/tracefile"
)

// A trace is drawn by the command, with the image's layers named, or without
// the image; and what is wrong with a command line is told with what to do.
func TestTracePlot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", sample(t))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	b, err := finderOf(t).Find(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	// Some blocks of each stream, in the order of the device.
	x := &tracefile.Trace{Header: tracefile.Header{Index: tracefile.IndexDigest(b.Index), Blocks: b.Index.Blocks, Starts: 1}}
	for i, run := range b.Index.Runs {
		x.Touches = append(x.Touches, tracefile.Touch{At: time.Duration(i) * time.Millisecond, Block: run.Device, Count: 1, Miss: i%2 == 0})
	}
	var file bytes.Buffer
	if err := x.Write(&file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/start.trace", file.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}

	must(t, "trace", "plot", dir+"/start.trace", "--image", image, "-o", dir+"/start.svg")
	svg, err := os.ReadFile(dir + "/start.svg")
	if err != nil {
		t.Fatal(err)
	}
	if err := xml.Unmarshal(svg, new(struct{})); err != nil {
		t.Errorf("%v\n%.300s", err, svg)
	}
	names := streamNames(b)
	if len(names) != len(b.Index.Streams) || !strings.HasPrefix(names[1], "layer 1 (") {
		t.Errorf("the streams are %q", names)
	}
	for _, name := range names {
		if !strings.Contains(string(svg), ">"+name+"<") {
			t.Errorf("%s is not in the picture", name)
		}
	}
	must(t, "trace", "plot", dir+"/start.trace", "-o", dir+"/start.PNG", "--width", "640", "--height", "480")
	f, err := os.Open(dir + "/start.PNG")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if c, err := png.DecodeConfig(f); err != nil || c.Width != 640 || c.Height != 480 {
		t.Errorf("%+v, %v", c, err)
	}

	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"start.trace"}, exitUsage, "-o start.svg"},
		{[]string{"start.trace", "-o", "x.pdf"}, exitUsage, ".svg or .png"},
		{[]string{"start.trace", "-o", "x.svg", "--width", "9"}, exitUsage, "pixels"},
		{[]string{"none", "-o", "x.svg"}, exitError, "no such file"},
		{[]string{"start.trace", "-o", "x.svg", "--image", image + "2"}, exitError, ""},
		{[]string{"start.trace", "-o", "none/x.svg"}, exitError, "none/x.svg"},
	} {
		args := append([]string{"trace", "plot"}, c.args...)
		for i, s := range args {
			if i >= 2 && (strings.Contains(s, ".") || s == "none") && !strings.Contains(s, ":") {
				args[i] = dir + "/" + s
			}
		}
		if _, stderr, code := thaw(t, args...); code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("thaw %s: exit %d, want %d and %q:\n%s", strings.Join(args, " "), code, c.code, c.want, stderr)
		}
	}
	if _, err := os.Stat(dir + "/x.svg"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a command that fails leaves a file: %v", err)
	}
}
