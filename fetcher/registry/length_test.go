package registry

import (
	"strings"
	"testing"
)

// Tags and names have the lengths that registries and layouts allow, and no more.
func TestLengths(t *testing.T) {
	for s, want := range map[string]bool{
		"r.example/app:" + strings.Repeat("t", 128): true,
		"r.example/app:" + strings.Repeat("t", 129): false,
		"oci:dir:" + strings.Repeat("n", 256):       true,
		"oci:dir:" + strings.Repeat("n", 257):       false,
	} {
		if _, err := ParseRef(s); (err == nil) != want {
			t.Errorf("a reference of %d bytes: %v", len(s), err)
		}
	}
}
