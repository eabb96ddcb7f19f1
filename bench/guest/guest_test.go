package guest

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

// Of a console, the lines of the script count, whatever the kernel says in between.
func TestConsole(t *testing.T) {
	for name, c := range map[string]struct {
		text   string
		lines  []string
		booted bool
		done   bool
		err    string
	}{
		"all":        {"[    0.1] Linux\r\nguest 1.0 booted Linux 6.12\r\nguest 1.2 one 2 3\r\n[ 5.0] printk\r\nguest 2.0 done\r\n", []string{"one 2 3"}, true, true, ""},
		"failed":     {"guest 1.0 booted Linux\nguest 1.2 failed: fio\nguest 1.3 one\n", nil, true, false, "failed: fio"},
		"cut":        {"guest 1.0 booted Linux\nguest 1.2 one\n", []string{"one"}, true, false, ""},
		"not booted": {"guest\nguests 1 done\n", []string{""}, false, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var lines []string
			booted := false
			r := console{line: func(s string) error { lines = append(lines, s); return nil }}
			err := r.read(strings.NewReader(c.text), func() { booted = true })
			if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err {
				t.Errorf("error %v", err)
			}
			if !slices.Equal(lines, c.lines) || booted != c.booted || r.done != c.done {
				t.Errorf("lines %q, booted %t, done %t", lines, booted, r.done)
			}
		})
	}
	want := errors.New("stop")
	r := console{line: func(string) error { return want }}
	if err := r.read(strings.NewReader("guest 1 a\nguest 1 b\n"), func() {}); !errors.Is(err, want) {
		t.Errorf("an error of the listener: %v", err)
	}
}
