package flatten

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func resolved(digit string) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: strings.Repeat(digit, 64)}
}

var resolutions = map[string]Resolution{
	"resolution.v2.json": {Name: "registry.example/team/app:v1", Manifest: resolved("1"), Source: resolved("2"), Top: resolved("3")},
	"itself.v2.json":     {Name: "oci:/srv/images:app", Manifest: resolved("1")},
}

// A kept resolution is the frozen one, byte by byte, and is read again as it was
// written.
func TestResolution(t *testing.T) {
	for file, r := range resolutions {
		want, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Encode(); err != nil || !bytes.Equal(got, bytes.TrimSuffix(want, []byte("\n"))) {
			t.Errorf("%s has changed: %v\n%s", file, err, got)
		}
		if got, err := ParseResolution(want, r.Name); err != nil || got != r {
			t.Errorf("%s: read %+v, %v", file, got, err)
		}
		if got, err := ParseResolution(want, "registry.example/other"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the resolution of another name is taken: %+v, %v", file, got, err)
		}
	}
}

// A resolution by other rules counts as none; nonsense is an error.
func TestBadResolutions(t *testing.T) {
	one := resolved("1").String()
	for what, kept := range map[string]string{
		"no format":           `{"name":"n","manifest":"` + one + `"}`,
		"an older format":     `{"format":1,"name":"n","manifest":"` + one + `"}`,
		"no digest":           `{"format":2,"name":"n"}`,
		"another algorithm":   `{"format":2,"name":"n","manifest":"sha512:` + strings.Repeat("0", 128) + `"}`,
		"a source of another": `{"format":2,"name":"n","manifest":"` + one + `","source":"sha512:` + strings.Repeat("0", 128) + `"}`,
	} {
		if r, err := ParseResolution([]byte(kept), "n"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}
	for what, kept := range map[string]string{"no JSON": "nonsense", "half a digest": `{"format":2,"name":"n","manifest":"sha256:12"}`} {
		if r, err := ParseResolution([]byte(kept), "n"); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}
}

// FuzzResolution reads what a cache directory may hold after a crash: what is
// accepted is about the name, and is written as it was read.
func FuzzResolution(f *testing.F) {
	for file, r := range resolutions {
		b, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, r.Name)
	}
	f.Fuzz(func(t *testing.T, kept []byte, name string) {
		r, err := ParseResolution(kept, name)
		if err != nil {
			return
		}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseResolution(b, name); err != nil || again != r || r.Name != name {
			t.Errorf("%+v is read again as %+v, %v", r, again, err)
		}
	})
}
