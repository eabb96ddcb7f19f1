package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func platform(t testing.TB, s string) *v1.Platform {
	t.Helper()
	p, err := v1.ParsePlatform(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The images of an index that fit a platform, the best one first.
func TestPreferences(t *testing.T) {
	for want, have := range map[string]string{
		"linux/amd64":        "amd64 386",
		"linux/amd64/v1":     "amd64 386",
		"linux/amd64/v3":     "amd64/v3 amd64/v2 amd64 386",
		"linux/386":          "386",
		"linux/arm":          "arm/v7 arm/v6 arm/v5",
		"linux/arm/v7":       "arm/v7 arm/v6 arm/v5",
		"linux/arm/v6":       "arm/v6 arm/v5",
		"linux/arm/7":        "arm/v7 arm/v6 arm/v5",
		"linux/armhf":        "arm/v7 arm/v6 arm/v5",
		"linux/arm64":        "arm64 arm/v8 arm/v7 arm/v6 arm/v5",
		"linux/arm64/v8":     "arm64 arm/v8 arm/v7 arm/v6 arm/v5",
		"linux/aarch64":      "arm64 arm/v8 arm/v7 arm/v6 arm/v5",
		"linux/arm64/v8.2":   "arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
		"linux/arm64/v9.1":   "arm64/v9.1 arm64/v9 arm64/v8.6 arm64/v8.5 arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
		"linux/riscv64":      "riscv64",
		"linux/amd64/v99999": "amd64/v99999 386",
	} {
		var got []string
		for _, p := range preferences(platform(t, want)) {
			if p.OS != "linux" {
				t.Errorf("%s: %s", want, p)
			}
			got = append(got, strings.TrimPrefix(p.String(), "linux/"))
		}
		if s := strings.Join(got, " "); s != have {
			t.Errorf("%s: %s\nwant %s", want, s, have)
		}
	}
}

// The test names every entry of an index by the first digit of its digest.
func entryOf(digit, platform string, more ...string) string {
	s := `{"mediaType":"` + string(types.OCIManifestSchema1) + `","size":10,"digest":"sha256:` + strings.Repeat(digit, 64) + `"`
	if platform != "" {
		os, arch, _ := strings.Cut(platform, "/")
		arch, variant, _ := strings.Cut(arch, "/")
		s += fmt.Sprintf(`,"platform":{"os":%q,"architecture":%q,"variant":%q}`, os, arch, variant)
	}
	return s + strings.Join(more, "") + "}"
}

func TestPick(t *testing.T) {
	looked := 0
	// The content of each digest.
	behind := map[string]string{"a": "linux/amd64", "b": "linux/arm64", "c": "linux/arm/v6", "d": "not found", "e": "an artifact", "f": "an index"}
	look := func(_ context.Context, d v1.Descriptor) (*v1.Platform, []byte, error) {
		looked++
		switch s := behind[d.Digest.Hex[:1]]; s {
		case "not found":
			return nil, nil, ErrNotFound
		case "an artifact", "":
			return nil, nil, nil
		case "an index":
			return nil, []byte(`{"manifests":[` + entryOf("9", "linux/s390x") + "," + entryOf("f", "") + "," + entryOf("b", "") + `]}`), nil
		case "broken":
			return nil, nil, ErrUnavailable
		default:
			return platform(t, s), nil, nil
		}
	}
	for _, x := range []struct {
		platform string
		entries  []string
		want     string // a digit, or a part of the error
	}{
		{"linux/amd64", []string{entryOf("1", "linux/arm64"), entryOf("2", "linux/amd64")}, "2"},
		{"linux/arm/v7", []string{entryOf("1", "linux/arm/v5"), entryOf("2", "linux/arm/v6")}, "2"},
		{"linux/arm/v6", []string{entryOf("1", "linux/arm/v7"), entryOf("2", "linux/arm/v5")}, "2"},
		{"linux/arm", []string{entryOf("1", "linux/arm/v5"), entryOf("2", "linux/arm/v7")}, "2"},
		{"linux/arm/v7", []string{entryOf("1", "linux/arm/v6"), entryOf("2", "linux/arm")}, "2"},
		{"linux/arm64", []string{entryOf("1", "linux/arm/v7"), entryOf("2", "linux/arm64/v8")}, "2"},
		{"linux/arm64", []string{entryOf("1", "linux/arm64/v9"), entryOf("2", "linux/arm/v7")}, "2"},
		{"linux/amd64", []string{entryOf("1", "linux/386"), entryOf("2", "linux/amd64")}, "2"},
		{"linux/amd64", []string{entryOf("1", "linux/386"), entryOf("2", "linux/s390x")}, "1"},
		{"linux/386", []string{entryOf("1", "linux/amd64"), entryOf("2", "linux/s390x")}, "no image for linux/386, there are: linux/amd64, linux/s390x"},
		{"linux/amd64/v3", []string{entryOf("1", "linux/amd64"), entryOf("2", "linux/amd64/v2"), entryOf("3", "linux/amd64/v4")}, "2"},
		{"linux/amd64", []string{entryOf("1", "linux/amd64/v2"), entryOf("2", "linux/amd64/v3")}, "no image for linux/amd64"},
		{"linux/amd64", []string{entryOf("1", "linux/x86_64"), entryOf("2", "linux/aarch64")}, "1"},
		{"linux/amd64", []string{entryOf("1", "Linux/AMD64"), entryOf("2", "linux/arm64")}, "1"},
		{"linux/amd64", []string{entryOf("1", "windows/amd64"), entryOf("2", "freebsd/amd64")}, "no image for linux/amd64, there are: freebsd/amd64, windows/amd64"},
		{"windows/amd64", []string{entryOf("1", "windows/amd64", `,"x":1`), entryOf("2", "windows/amd64")}, "1"},
		{"linux/amd64", []string{entryOf("1", "linux/amd64"), entryOf("2", "linux/amd64")}, "1"},
		// The only entry.
		{"linux/amd64", []string{entryOf("1", "linux/arm64")}, "no image for linux/amd64, there are: linux/arm64"},
		{"linux/amd64", []string{entryOf("1", "")}, "1"},
		{"", []string{entryOf("1", "linux/arm64")}, "1"},
		{"", []string{entryOf("1", "linux/arm64"), entryOf("2", "unknown/unknown")}, "1"},
		{"", []string{entryOf("1", "linux/arm64"), entryOf("2", "linux/amd64")}, "choose a platform: linux/amd64, linux/arm64"},
		{"linux/amd64", nil, "the index has no image"},
		// An entry without a platform: the platform of its config counts.
		{"linux/amd64", []string{entryOf("b", ""), entryOf("a", "")}, "a"},
		{"linux/arm/v7", []string{entryOf("b", ""), entryOf("c", "")}, "c"},
		{"linux/arm64", []string{entryOf("d", ""), entryOf("e", ""), entryOf("b", "")}, "b"},
		{"linux/arm64", []string{entryOf("c", ""), entryOf("1", "linux/arm/v7"), entryOf("b", "")}, "b"},
		{"linux/amd64", []string{entryOf("a", `/`), entryOf("b", "")}, "a"},
		{"linux/s390x", []string{entryOf("a", ""), entryOf("f", "")}, "9"},
		{"linux/arm64", []string{entryOf("a", ""), entryOf("f", "")}, "b"},
		{"linux/ppc64le", []string{entryOf("a", ""), entryOf("f", "")}, "no image for linux/ppc64le, there are: linux/amd64, linux/arm64, linux/s390x"},
		// Artifacts, recognized by their fields.
		{"linux/amd64", []string{entryOf("1", "", `,"artifactType":"application/vnd.test"`), entryOf("2", "")}, "2"},
		{"linux/amd64", []string{entryOf("1", "linux/amd64", `,"artifactType":"`+string(types.OCIConfigJSON)+`"`), entryOf("2", "linux/arm64")}, "1"},
		{"linux/amd64", []string{entryOf("1", "linux/amd64", `,"artifactType":"`+string(types.DockerConfigJSON)+`"`), entryOf("2", "unknown/unknown")}, "1"},
		// An unusable entry does not affect the others.
		{"linux/amd64", []string{`null`, `7`, `"x"`, `{}`, `{"digest":"sha512:` + strings.Repeat("0", 128) + `"}`, `{"digest":"md5:1"}`,
			`{"digest":7}`, strings.Replace(entryOf("3", "linux/amd64"), `"size":10`, `"size":-1`, 1), strings.Replace(entryOf("3", "linux/amd64"), `"size":10`, `"size":1e30`, 1),
			entryOf("3", "", `,"platform":"linux/amd64"`), entryOf("1", "linux/amd64")}, "1"},
	} {
		var p *v1.Platform
		if x.platform != "" {
			p = platform(t, x.platform)
		}
		raw := []byte(`{"schemaVersion":2,"manifests":[` + strings.Join(x.entries, ",") + `]}`)
		d, err := pick(t.Context(), raw, p, look)
		switch {
		case len(x.want) == 1 && (err != nil || d.Digest.Hex[:1] != x.want):
			t.Errorf("%s of %s: %v, %v", x.platform, raw, d.Digest, err)
		case len(x.want) > 1 && (err == nil || !strings.Contains(err.Error(), x.want)):
			t.Errorf("%s of %s: %v, %v", x.platform, raw, d.Digest, err)
		}
	}

	// A bounded number of entries is examined, and none if it cannot be better.
	var many []string
	for range 1000 {
		many = append(many, entryOf("e", ""))
	}
	for last, want := range map[string]int{entryOf("1", "linux/arm/v7"): maxPlatformLooks, entryOf("1", "linux/arm64"): 0} {
		looked = 0
		raw := []byte(`{"manifests":[` + strings.Join(append(slices.Clip(many), last), ",") + `]}`)
		d, err := pick(t.Context(), raw, platform(t, "linux/arm64"), look)
		if err != nil || d.Digest.Hex[:1] != "1" || looked != want {
			t.Errorf("%v, %v; looked at %d, want %d", d.Digest, err, looked, want)
		}
	}
	// An error says what was examined, and that the rest was not.
	for raw, want := range map[string]string{
		`{"manifests":[` + strings.Join(many, ",") + `]}`:                                      "none of the 1000 entries of the index is known to be one",
		`{"manifests":[` + strings.Join(append(many, entryOf("1", "linux/arm64")), ",") + `]}`: "there are: linux/arm64, and 984 without a platform, whose manifests were not read",
	} {
		if _, err := pick(t.Context(), []byte(raw), platform(t, "linux/s390x"), look); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	// If a registry does not answer, the second best image is not taken.
	behind["e"] = "broken"
	if _, err := pick(t.Context(), []byte(`{"manifests":[`+entryOf("e", "")+`,`+entryOf("1", "linux/386")+`]}`), &amd64, look); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"", "[]", "7", `{"manifests":7}`, `{"manifests":`} {
		if _, err := pick(t.Context(), []byte(bad), &amd64, look); err == nil {
			t.Errorf("%s is taken for an index", bad)
		}
	}
}

// An index without platforms, in a registry and in a layout.
func TestResolveByConfig(t *testing.T) {
	media(t, func(t *testing.T, place string) {
		ctx := context.Background()
		r := openRepo(t, newClient(t, Options{}), place+":multi")
		var index v1.IndexManifest
		index.SchemaVersion, index.MediaType = 2, types.OCIImageIndex
		for _, s := range []string{"linux/arm64", "linux/amd64"} {
			d, _ := pushImage(t, ctx, r, "", []byte(s), *platform(t, s))
			index.Manifests = append(index.Manifests, d)
		}
		inner, err := json.Marshal(index)
		if err != nil {
			t.Fatal(err)
		}
		in, err := r.PushManifest(ctx, inner, types.OCIImageIndex, "inner")
		if err != nil {
			t.Fatal(err)
		}
		other, _ := pushImage(t, ctx, r, "", []byte("other"), *platform(t, "linux/s390x"))
		nested, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{other, in}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.PushManifest(ctx, nested, types.OCIImageIndex, "multi"); err != nil {
			t.Fatal(err)
		}
		for s, want := range map[string]v1.Hash{"linux/amd64": index.Manifests[1].Digest, "linux/arm64": index.Manifests[0].Digest, "linux/s390x": other.Digest} {
			if got, err := r.Resolve(ctx, platform(t, s)); err != nil || got.Digest != want {
				t.Errorf("%s: %v", s, err)
			}
		}
	})
}

func FuzzPick(f *testing.F) {
	f.Add([]byte(`{"manifests":[`+entryOf("1", "linux/arm64")+`,`+entryOf("2", "")+`]}`), "linux/arm64/v9.1")
	f.Add([]byte(`{"manifests":[null,{"digest":"sha512:0"},`+entryOf("2", "linux/arm/v7")+`]}`), "linux/arm")
	f.Fuzz(func(t *testing.T, raw []byte, s string) {
		p, err := v1.ParsePlatform(s)
		if err != nil {
			p = nil
		}
		looked := 0
		d, err := pick(t.Context(), raw, p, func(context.Context, v1.Descriptor) (*v1.Platform, []byte, error) {
			looked++
			return nil, raw, nil
		})
		if err == nil && checkDescriptor(d) != nil {
			t.Fatalf("picked %v", d)
		}
		if looked > maxPlatformLooks {
			t.Fatalf("looked at %d", looked)
		}
	})
}
