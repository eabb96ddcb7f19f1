package main

import (
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"

	"thaw/fetcher/registry"
)

// What is not found is said once, and what to do about it.
func TestNotFound(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	push(t, p.host()+"/team/app:v1", imageOf(t, layerOf(t, files(1, "a", 1)...)))
	dir := t.TempDir()
	t.Chdir(dir)
	copyLayout(t, dir+"/layout", "v1", imageOf(t, layerOf(t, files(1, "a", 1)...)))
	must(t, "build", "oci:layout") // so that it has tags of thaw's own
	must(t, "build", "oci:layout", "oci:layout:v1-thaw")
	saveArchive(t, dir+"/app.tar", imageOf(t, layerOf(t, files(1, "a", 1)...)))
	if err := os.WriteFile(dir+"/app", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const asFile = " is a file: write docker-archive:%s for what docker save wrote, or oci-archive:%s for a tar of an OCI layout"
	for _, c := range []struct{ args, want string }{
		{"inspect " + p.host() + "/team/app:v9", p.host() + "/team/app:v9: GET " + p.URL + "/v2/team/app/manifests/v9: not found (404 MANIFEST_UNKNOWN); check the name and the tag\n"},
		{"build " + p.host() + "/none:v1", "not found (404 MANIFEST_UNKNOWN); check the name and the tag\n"},
		{"verify oci:layout:v9", "not found: no image is tagged v9, there are: v1, v1-thaw\n"},
		{"build oci:none", "not found: there is no directory none\n"},
		// These have no characters that are wrong in a name.
		{"build " + p.host() + "/../layout", "lower-case letters and digits"},
		{"build ./layout", "; ./layout is a directory: write oci:./layout for an OCI layout\nSee 'thaw build --help'.\n"},
		{"build " + dir + "/layout", "; " + dir + "/layout is a directory: write oci:" + dir + "/layout for an OCI layout\n"},
		{"inspect ./app.tar", "; ./app.tar" + strings.ReplaceAll(asFile, "%s", "./app.tar") + "\n"},
	} {
		_, stderr, code := thaw(t, strings.Fields(c.args)...)
		if code == exitOK || !strings.Contains(stderr, c.want) {
			t.Errorf("thaw %s: exit %d, want %q:\n%s", c.args, code, c.want, stderr)
		}
		if n := strings.Count(strings.ToLower(stderr), "not found"); n > 1 {
			t.Errorf("thaw %s says %d times that something is not found:\n%s", c.args, n, stderr)
		}
		if strings.Contains(stderr, "thaw-image-") || strings.Contains(stderr, "thaw-layer-") {
			t.Errorf("thaw %s lists tags that are thaw's own:\n%s", c.args, stderr)
		}
	}
	// A name that may be one of Docker Hub, which a mirror stands in for here.
	if err := os.WriteFile("hosts", []byte("docker.io "+p.URL+",resolve\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, want string }{
		{"app", "app" + strings.ReplaceAll(asFile, "%s", "app")},
		{"layout", "layout is a directory: write oci:layout for an OCI layout"},
	} {
		if _, stderr, code := thaw(t, "build", "--hosts", "hosts", c.name); code != exitError || !strings.HasSuffix(stderr, "; "+c.want+"\n") {
			t.Errorf("thaw build %s: exit %d, want %q:\n%s", c.name, code, c.want, stderr)
		}
	}
}

// An image for several platforms is that for this host's, or the error says which
// there are.
func TestPlatforms(t *testing.T) {
	foreign := map[string]string{"amd64": "s390x"}[runtime.GOARCH]
	if foreign == "" {
		foreign = "amd64"
	}
	dir := t.TempDir()
	add := func(arch string, n int) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: imageOf(t, layerOf(t, files(uint64(n), "a", n)...)),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}}
	}
	for name, images := range map[string][]mutate.IndexAddendum{
		"both":  {add(foreign, 2), add(runtime.GOARCH, 1)},
		"other": {add(foreign, 2), add("riscv64", 3)},
	} {
		p, err := layout.Write(dir+"/"+name, empty.Index)
		if err == nil {
			err = p.AppendIndex(mutate.AppendManifests(empty.Index, images...))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := add(runtime.GOARCH, 1).Add.(v1.Image).Digest()
	if err != nil {
		t.Fatal(err)
	}
	must(t, "build", "--size", "64M", "oci:"+dir+"/both", "oci:"+dir+"/dst:x")
	if in := inspectJSON(t, "oci:"+dir+"/dst:x"); in.Subject != want.String() {
		t.Errorf("built from %s, want %s", in.Subject, want)
	}
	list := fmt.Sprintf("not found: no image for %s, there are: linux/riscv64, linux/%s\n", defaultPlatform, foreign)
	if _, stderr, code := thaw(t, "build", "oci:"+dir+"/other"); code != exitError || !strings.HasSuffix(stderr, list) {
		t.Errorf("exit %d, want %q:\n%s", code, list, stderr)
	}
}

// Docker Hub is asked for a name without a host, and answers 401 for what it does
// not have.
func TestHintDockerHub(t *testing.T) {
	t.Chdir(t.TempDir())
	const hub = "a name without a host is one of Docker Hub: write HOST/team/app for another registry"
	for _, c := range []struct {
		arg  string
		err  error
		want string
	}{
		{"team/app", fmt.Errorf("resolve index.docker.io/team/app:latest: %w", registry.ErrUnauthorized), hub},
		{"team/app", fmt.Errorf("resolve index.docker.io/team/app:latest: %w", registry.ErrNotFound), hub},
		{"team/app", fmt.Errorf("resolve index.docker.io/team/app:latest: %w", registry.ErrUnavailable), ""},
		{"docker.io/team/app", fmt.Errorf("resolve index.docker.io/team/app:latest: %w", registry.ErrNotFound), "check the name and the tag"},
		{"docker.io/team/app", fmt.Errorf("resolve index.docker.io/team/app:latest: %w", registry.ErrUnauthorized), "check the name, or run docker login with an account that has access"},
		{"a.example/app", fmt.Errorf("resolve a.example/app:latest: %w", registry.ErrUnauthorized), "check the name, or run docker login a.example with an account that has access"},
		{"a.example/app", fmt.Errorf("resolve a.example/app:latest: %w: there are none: run docker login", registry.ErrUnauthorized), ""},
		{"team/app", fmt.Errorf("another.example/x: %w", registry.ErrNotFound), ""},
		{"oci:dir", fmt.Errorf("resolve oci:dir: %w", registry.ErrNotFound), ""},
	} {
		if got := hint(c.err, []string{c.arg}, ""); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

// A directory that cannot be used for temporary files is the fault of --temp; a file
// that is gone from it is not.
func TestHintTemp(t *testing.T) {
	const another = "name another directory by --temp, or by TMPDIR"
	for _, c := range []struct {
		err  fs.PathError
		want string
	}{
		{fs.PathError{Op: "stat", Path: "/temp", Err: unix.ENOENT}, another},
		{fs.PathError{Op: "mkdir", Path: "/temp/thaw-streams-1", Err: unix.EACCES}, another},
		{fs.PathError{Op: "write", Path: "/temp/thaw-streams-1/0", Err: unix.ENOSPC}, "/temp is full: name a directory with more room by --temp, or by TMPDIR"},
		{fs.PathError{Op: "write", Path: "/temp/thaw-streams-1/0", Err: unix.EDQUOT}, "/temp is full: name a directory with more room by --temp, or by TMPDIR"},
		{fs.PathError{Op: "write", Path: "/temp/thaw-archive-1", Err: unix.ENOSPC}, "/temp is full: name a directory with more room by --temp, or by TMPDIR"},
		{fs.PathError{Op: "open", Path: "/temp/thaw-streams-1/0", Err: unix.ENOENT}, ""},
		{fs.PathError{Op: "write", Path: "/temp/other", Err: unix.ENOSPC}, ""},
		{fs.PathError{Op: "write", Path: "/temporary/thaw-streams-1", Err: unix.ENOSPC}, ""},
	} {
		if got := hint(fmt.Errorf("build: %w", &c.err), nil, "/temp/"); got != c.want {
			t.Errorf("%v: %q, want %q", &c.err, got, c.want)
		}
	}
}

// Numbers that mean nothing are refused before anything is done.
func TestNonsenseNumbers(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"build a.example/b --jobs -1", "--jobs -1: it must be at least 1"},
		{"build a.example/b --jobs 1.5", "--jobs"},
		{"build a.example/b --size -1", "a size is a number of bytes"},
		{"build a.example/b --size 16T", "--size 16T: it must be less than 16T"},
		{"build a.example/b --size 99999999999T", "a size is a number of bytes"},
		{"build a.example/b --chunk-size 0", "power of two"},
		{"build a.example/b --chunk-size 1G", "power of two"},
		{"build a.example/b --level 0", "1 to 22"},
		{"build a.example/b --level -3", "1 to 22"},
	} {
		_, stderr, code := thaw(t, strings.Fields(c.args)...)
		if code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("thaw %s: exit %d, want %q:\n%s", c.args, code, c.want, stderr)
		}
	}
}
