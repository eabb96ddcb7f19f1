package zone

import "strings"

// maxName is the length of the longest name of a member: that of a DNS name.
const maxName = 253

// ValidName reports whether a host may have this name in a zone. Names are part of URLs,
// header fields and certificates.
func ValidName(name string) bool {
	if name == "" || len(name) > maxName {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '-', c == '_', c == ':':
		default:
			return false
		}
	}
	return true
}

// ParseHolders returns the names in a Thaw-Holders header field. It leaves out what is no
// name, and names beyond the first few.
func ParseHolders(field string) (names []string) {
	for n := 0; field != "" && n < maxHolders; n++ {
		name, rest, _ := strings.Cut(field, ",")
		if name = strings.TrimSpace(name); ValidName(name) {
			names = append(names, name)
		}
		field = rest
	}
	return names
}
