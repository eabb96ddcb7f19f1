package registry

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// An unusable entry must not hide the others.
func TestParseIndex(t *testing.T) {
	good := describe([]byte("good"), types.OCIManifestSchema1)
	entry, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	sha512 := `{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":3,"digest":"sha512:` + strings.Repeat("a", 128) + `"}`
	with := func(field string) string {
		return strings.TrimSuffix(string(entry), "}") + "," + field + "}"
	}
	for _, x := range []struct {
		name, in string
		want     int // usable entries; -1 for an error
	}{
		{"plain", `{"schemaVersion":2,"manifests":[` + string(entry) + `]}`, 1},
		{"sha512 first", `{"manifests":[` + sha512 + `,` + string(entry) + `]}`, 1},
		{"sha512 alone", `{"manifests":[` + sha512 + `]}`, 0},
		{"null", `{"manifests":null}`, 0},
		{"missing", `{"schemaVersion":2}`, 0},
		{"empty", `{"manifests":[]}`, 0},
		{"odd entries", `{"manifests":[null,5,"x",[],{},{"digest":"sha256:"},{"digest":5},` + string(entry) + `]}`, 1},
		{"a negative size", `{"manifests":[` + strings.Replace(string(entry), `"size":4`, `"size":-4`, 1) + `]}`, 0},
		{"a size in letters", `{"manifests":[` + strings.Replace(string(entry), `"size":4`, `"size":"4"`, 1) + `]}`, 0},
		{"a platform that is a word", `{"manifests":[` + with(`"platform":"linux"`) + `,` + string(entry) + `]}`, 1},
		{"annotations that are no strings", `{"manifests":[` + with(`"annotations":{"a":1,"b":"c"}`) + `]}`, 1},
		{"annotations that are a list", `{"manifests":[` + with(`"annotations":[1]`) + `]}`, 1},
		{"urls and data that are numbers", `{"manifests":[` + with(`"urls":5,"data":6`) + `]}`, 1},
		{"not a list", `{"manifests":{}}`, -1},
		{"a page", `<html>`, -1},
		{"nothing", ``, -1},
		{"null itself", `null`, -1},
		{"a list itself", `[]`, -1},
	} {
		got, err := parseIndex([]byte(x.in))
		if (err != nil) != (x.want < 0) || len(got) != max(x.want, 0) {
			t.Errorf("%s: %v, %v", x.name, got, err)
		}
		for _, d := range got {
			if d.Digest != good.Digest || d.Size != good.Size || d.MediaType != good.MediaType {
				t.Errorf("%s: %+v", x.name, d)
			}
		}
	}
	got, _ := parseIndex([]byte(`{"manifests":[` + with(`"annotations":{"a":1,"b":"c"}`) + `]}`))
	if fmt.Sprint(got[0].Annotations) != "map[b:c]" {
		t.Errorf("annotations %v", got[0].Annotations)
	}
}

func FuzzParseIndex(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"mediaType":"a/b","size":1,"digest":"sha256:` + strings.Repeat("0", 64) + `","platform":{"os":"linux"}},null]}`))
	f.Add([]byte(`{"manifests":null}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := parseIndex(raw)
		if err != nil && list != nil {
			t.Error("a list and an error")
		}
		for _, d := range list {
			if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != 64 || d.Size < 0 {
				t.Errorf("%+v", d)
			}
			if _, err := json.Marshal(d); err != nil {
				t.Error(err)
			}
		}
	})
}
