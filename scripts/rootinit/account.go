package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// An account is whom a process runs as.
type account struct {
	uid, gid uint32
	groups   []uint32 // further groups
	home     string
}

// lookUp finds, in the files of a directory, the account that an image's config names: USER or USER:GROUP, by name or number. "" is root. A number need not
// be in the files; its group is 0 then. As with container engines, a USER is in the further groups of the image's files only if
// no GROUP is given.
func lookUp(etc, name string) (account, error) {
	passwdFile, groupFile := filepath.Join(etc, "passwd"), filepath.Join(etc, "group")
	user, group, hasGroup := strings.Cut(name, ":")
	a := account{home: "/"}
	found, login := false, ""
	if user == "" {
		user = "0"
	}
	number, numeric := parseID(user)
	for _, f := range records(passwdFile) {
		uid, okUID := parseID(field(f, 2))
		gid, okGID := parseID(field(f, 3))
		if !okUID || !okGID || f[0] != user && (!numeric || uid != number) {
			continue
		}
		found, login = true, f[0]
		a.uid, a.gid = uid, gid
		if home := field(f, 5); home != "" {
			a.home = home
		}
		break
	}
	if !found {
		if !numeric {
			return account{}, errors.New("the image's /etc/passwd does not have it")
		}
		a.uid = number
		if number == 0 {
			a.home = "/root"
		}
	}
	if !hasGroup {
		for _, f := range records(groupFile) {
			gid, ok := parseID(field(f, 2))
			if ok && login != "" && slices.Contains(strings.Split(field(f, 3), ","), login) && gid != a.gid {
				a.groups = append(a.groups, gid)
			}
		}
		return a, nil
	}
	number, numeric = parseID(group)
	for _, f := range records(groupFile) {
		if gid, ok := parseID(field(f, 2)); ok && (f[0] == group || numeric && gid == number) {
			a.gid = gid
			return a, nil
		}
	}
	if !numeric {
		return account{}, fmt.Errorf("the image's /etc/group does not have the group %q", group)
	}
	a.gid = number
	return a, nil
}

// records returns the lines of a file like /etc/passwd, split into fields. A file that cannot be read has none.
func records(file string) [][]string {
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	var all [][]string
	for s := bufio.NewScanner(f); s.Scan(); {
		if line := s.Text(); line != "" && line[0] != '#' {
			all = append(all, strings.Split(line, ":"))
		}
	}
	return all
}

func field(f []string, i int) string {
	if i < len(f) {
		return f[i]
	}
	return ""
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return uint32(n), err == nil
}
