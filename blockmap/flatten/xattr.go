package flatten

import (
	"archive/tar"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"

	"thaw/blockmap/ext4"
)

// xattrs reads the extended attributes from a pax header: the records of GNU tar, star
// and Docker, and those of libarchive for attributes that have no other record.
func xattrs(h *tar.Header, e *entry, drop func(attribute, entry string)) error {
	const schily, libarchive = "SCHILY.xattr.", "LIBARCHIVE.xattr."
	values := make(map[string]string)
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, libarchive); ok {
			name, err := url.PathUnescape(name)
			if err != nil {
				return fmt.Errorf("extended attribute %s: %w", quoted(k), err)
			}
			if !keeps(name) {
				drop(name, e.name)
				continue
			}
			b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
			if err != nil {
				return fmt.Errorf("extended attribute %s: %w", quoted(name), err)
			}
			values[name] = string(b)
		}
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, schily); ok {
			if keeps(name) {
				values[name] = v
			} else {
				drop(name, e.name)
			}
		}
	}
	total := 0
	for name, v := range values {
		if len(name) > maxXattrName {
			return fmt.Errorf("the name of extended attribute %q has %d bytes: the limit is %d", name[:40]+"…", len(name), maxXattrName)
		}
		if len(v) > maxXattr {
			return fmt.Errorf("extended attribute %q has %d bytes: the limit is %d", name, len(v), maxXattr)
		}
		x := ext4.Xattr{Name: name, Value: []byte(v)}
		if total += xattrSize(&x); total > maxXattrs {
			return fmt.Errorf("%d extended attributes, of more than %d bytes together", len(values), maxXattrs)
		}
		e.inode.Xattrs = append(e.inode.Xattrs, x)
	}
	slices.SortFunc(e.inode.Xattrs, func(a, b ext4.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// keeps reports whether Linux can keep an attribute on ext4. Others, such as
// com.apple.provenance, are dropped: other programs that unpack images drop them too.
func keeps(attribute string) bool {
	space, name, _ := strings.Cut(attribute, ".")
	return name != "" && (space == "user" || space == "trusted" || space == "security") ||
		attribute == "system.posix_acl_access" || attribute == "system.posix_acl_default"
}

// dropper logs attributes that are omitted, each name once.
func dropper(log *slog.Logger) func(attribute, entry string) {
	seen := make(map[string]bool)
	return func(attribute, entry string) {
		if len(attribute) > maxXattrName {
			attribute = attribute[:maxXattrName]
		}
		if seen[attribute] || len(seen) >= 100 {
			return
		}
		seen[attribute] = true
		log.Warn("omitting an extended attribute that Linux cannot keep", "name", attribute, "entry", entry)
	}
}
