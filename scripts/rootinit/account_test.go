package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestAccounts(t *testing.T) {
	etc := t.TempDir()
	os.WriteFile(filepath.Join(etc, "passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n# no account\nbroken\nnan:x:a:b::/:\n"+
		"www:x:33:34::/var/www:/bin/false\nbare:x:40:40\n"), 0o644)
	os.WriteFile(filepath.Join(etc, "group"), []byte("root:x:0:\nwww:x:34:www\nssl:x:50:other,www\naudio:x:51:www\nbroken:x\n"), 0o644)
	for _, c := range []struct {
		name string
		want account
		bad  string
	}{
		{name: "", want: account{home: "/root"}},
		{name: "root", want: account{home: "/root"}},
		{name: "0", want: account{home: "/root"}},
		{name: "www", want: account{uid: 33, gid: 34, groups: []uint32{50, 51}, home: "/var/www"}},
		{name: "33", want: account{uid: 33, gid: 34, groups: []uint32{50, 51}, home: "/var/www"}},
		{name: "www:ssl", want: account{uid: 33, gid: 50, home: "/var/www"}},
		{name: "www:51", want: account{uid: 33, gid: 51, home: "/var/www"}},
		{name: "bare", want: account{uid: 40, gid: 40, home: "/"}},
		{name: "1000", want: account{uid: 1000, home: "/"}},
		{name: "1000:1001", want: account{uid: 1000, gid: 1001, home: "/"}},
		{name: ":ssl", want: account{gid: 50, home: "/root"}},
		{name: "nobody", bad: "/etc/passwd"},
		{name: "nan", bad: "/etc/passwd"},
		{name: "www:nobody", bad: "/etc/group"},
		{name: "-1", bad: "/etc/passwd"},
		{name: "99999999999", bad: "/etc/passwd"},
	} {
		got, err := lookUp(etc, c.name)
		if c.bad != "" {
			if err == nil || !strings.Contains(err.Error(), c.bad) {
				t.Errorf("%q: %v, want an error about %s", c.name, err, c.bad)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
	// An image need not have the files.
	if got, err := lookUp(t.TempDir(), ""); err != nil || got.uid != 0 || got.home != "/root" {
		t.Errorf("without files: %+v, %v", got, err)
	}
}
