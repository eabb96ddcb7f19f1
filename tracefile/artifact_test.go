package tracefile_test

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/tracefile"
)

func hash(digit string) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: strings.Repeat(digit, 64)} }

// The manifests of traces and bundles are the frozen ones, byte by byte, and are
// read again as they were written.
func TestArtifactManifests(t *testing.T) {
	subject := v1.Descriptor{Digest: hash("2"), Size: 1234}
	for file, a := range map[string]struct {
		artifactType string
		layer        v1.Descriptor
	}{
		"trace.v1.json":  {tracefile.ArtifactTypeTrace, v1.Descriptor{MediaType: tracefile.MediaTypeTrace, Digest: hash("1"), Size: 567}},
		"bundle.v2.json": {tracefile.ArtifactTypeBundle, v1.Descriptor{MediaType: tracefile.MediaTypeBundle, Digest: hash("1"), Size: 8 << 30}},
	} {
		got, err := tracefile.ArtifactManifest(a.artifactType, a.layer, subject, false)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, bytes.TrimSuffix(want, []byte("\n"))) {
			t.Errorf("%s has changed:\n%s", file, got)
		}
		layer, err := tracefile.ArtifactLayer(want, a.layer.MediaType)
		if err != nil || layer.Digest != a.layer.Digest || layer.Size != a.layer.Size || layer.MediaType != a.layer.MediaType {
			t.Errorf("%s: read %+v, %v", file, layer, err)
		}
	}
	// A trace that replaces the others says so, in the list of referrers as well.
	raw, err := tracefile.ArtifactManifest(tracefile.ArtifactTypeTrace, v1.Descriptor{MediaType: tracefile.MediaTypeTrace, Digest: hash("1"), Size: 567}, subject, true)
	if err != nil || !bytes.Contains(raw, []byte(`"annotations":{"vnd.thaw.anew":"true",`)) {
		t.Errorf("a trace that replaces others: %s, %v", raw, err)
	}
	listed := v1.Descriptor{Annotations: map[string]string{tracefile.AnnotationLayer: hash("1").String() + " 567"}}
	if layer, ok := tracefile.AnnotatedLayer(listed, tracefile.MediaTypeTrace); !ok || layer.Digest != hash("1") || layer.Size != 567 || layer.MediaType != tracefile.MediaTypeTrace {
		t.Errorf("the annotation: read %+v, %v", layer, ok)
	}
}

// A malformed annotation or manifest yields no layer.
func TestBadArtifacts(t *testing.T) {
	good := hash("1").String()
	for _, annotation := range []string{"", good, good + " 0", good + " -1", good + " x", "sha256:12 5", "sha512:" + strings.Repeat("0", 128) + " 5", "nonsense 5"} {
		if layer, ok := tracefile.AnnotatedLayer(v1.Descriptor{Annotations: map[string]string{tracefile.AnnotationLayer: annotation}}, tracefile.MediaTypeTrace); ok {
			t.Errorf("the annotation %q is taken as %+v", annotation, layer)
		}
	}
	if _, ok := tracefile.AnnotatedLayer(v1.Descriptor{}, tracefile.MediaTypeTrace); ok {
		t.Error("a layer is found without any annotation")
	}
	layer := func(mediaType, digest, size string) string {
		return `{"mediaType":"` + mediaType + `","digest":"` + digest + `","size":` + size + `}`
	}
	right := string(tracefile.MediaTypeTrace)
	bad := map[string]string{
		"no JSON":           `nonsense`,
		"no layer":          `{"layers":[]}`,
		"two layers":        `{"layers":[` + layer(right, good, "1") + `,` + layer(right, good, "1") + `]}`,
		"another type":      `{"layers":[` + layer(string(tracefile.MediaTypeBundle), good, "1") + `]}`,
		"another algorithm": `{"layers":[` + layer(right, "sha512:"+strings.Repeat("0", 128), "1") + `]}`,
		"no size":           `{"layers":[` + layer(right, good, "0") + `]}`,
		"a negative size":   `{"layers":[` + layer(right, good, "-5") + `]}`,
	}
	for _, what := range slices.Sorted(maps.Keys(bad)) {
		if d, err := tracefile.ArtifactLayer([]byte(bad[what]), tracefile.MediaTypeTrace); err == nil {
			t.Errorf("%s: the manifest is taken as %+v", what, d)
		}
	}
}

// FuzzArtifact reads manifests and annotations that anybody may have pushed: what is
// accepted has a SHA-256 digest and a size.
func FuzzArtifact(f *testing.F) {
	for _, file := range []string{"trace.v1.json", "bundle.v2.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, hash("1").String()+" 567")
	}
	f.Fuzz(func(t *testing.T, manifest []byte, annotation string) {
		check := func(d v1.Descriptor) {
			if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != 64 || d.Size <= 0 {
				t.Errorf("accepted %+v", d)
			}
		}
		if d, err := tracefile.ArtifactLayer(manifest, tracefile.MediaTypeTrace); err == nil {
			check(d)
		}
		listed := v1.Descriptor{Annotations: map[string]string{tracefile.AnnotationLayer: annotation}}
		if d, ok := tracefile.AnnotatedLayer(listed, tracefile.MediaTypeBundle); ok {
			check(d)
		}
	})
}
