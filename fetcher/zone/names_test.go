package zone

import (
	"slices"
	"strings"
	"testing"
)

func TestParseHolders(t *testing.T) {
	for field, want := range map[string][]string{
		"":                       nil,
		"a":                      {"a"},
		"a, b,c":                 {"a", "b", "c"},
		",,a":                    {"a"},
		"a/b,\x00,b c,d":         {"d"},
		"a,b,c,d,e,f":            {"a", "b", "c", "d"},
		strings.Repeat("a", 254): nil,
		"10.0.0.1:7946":          {"10.0.0.1:7946"},
	} {
		if got := ParseHolders(field); !slices.Equal(got, want) {
			t.Errorf("%.40q: %q, want %q", field, got, want)
		}
	}
}

func FuzzParseHolders(f *testing.F) {
	f.Add("a,b")
	f.Add(",,,\x00, host-1 ")
	f.Fuzz(func(t *testing.T, field string) {
		names := ParseHolders(field)
		if len(names) > maxHolders {
			t.Fatalf("%d names", len(names))
		}
		for _, name := range names {
			if !ValidName(name) {
				t.Fatalf("%q", name)
			}
		}
	})
}
