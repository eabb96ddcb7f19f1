package registry

import (
	"strings"
)

// challenge says which credentials a registry requires.
type challenge struct {
	scheme string // "bearer" or "basic"
	params map[string]string
}

// readChallenge returns the first bearer challenge of the WWW-Authenticate headers, or else
// the first basic one (RFC 9110, 11.6.1).
func readChallenge(headers []string) *challenge {
	var found *challenge
	for _, h := range headers {
		for h = strings.TrimLeft(h, " \t,"); h != ""; h = strings.TrimLeft(h, " \t,") {
			var c challenge
			c.scheme, h = cutToken(h)
			if c.scheme == "" {
				break
			}
			c.scheme = strings.ToLower(c.scheme)
			c.params, h = readParams(h)
			if c.scheme == "bearer" && c.params["realm"] != "" {
				return &c
			}
			if c.scheme == "basic" && found == nil {
				found = &c
			}
		}
	}
	return found
}

// readParams reads name=value pairs up to the next scheme.
func readParams(s string) (map[string]string, string) {
	params := make(map[string]string)
	for {
		s = strings.TrimLeft(s, " \t,")
		name, rest := cutToken(s)
		rest = strings.TrimLeft(rest, " \t")
		if name == "" || !strings.HasPrefix(rest, "=") {
			return params, s
		}
		rest = strings.TrimLeft(rest[1:], " \t")
		var value string
		if strings.HasPrefix(rest, `"`) {
			value, rest = cutQuoted(rest[1:])
		} else {
			value, rest = cutToken(rest)
			if value == "" {
				return params, ""
			}
		}
		params[strings.ToLower(name)] = value
		s = rest
	}
}

// cutToken cuts off a token (RFC 9110, 5.6.2), leniently.
func cutToken(s string) (string, string) {
	i := strings.IndexFunc(s, func(c rune) bool { return c <= ' ' || c >= 0x7f || strings.ContainsRune(`",=`, c) })
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

func cutQuoted(s string) (string, string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:]
		case '\\':
			if i++; i == len(s) {
				return b.String(), ""
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}
