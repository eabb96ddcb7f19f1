package attach

import (
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/mdlayher/genetlink"
)

// frozenState is how a state was written when the format was made.
const frozenState = `{"driver":"ublk","path":"/dev/ublkb3","number":3,"pid":4711,"started":123456,"boot":"2b7cbd79-4c7f-4dd4-8d5e-6a4e4a6f3a37","token":"ABCDEFGHIJKLMNOPQRSTUVWXYZ","size":1073741824,"readonly":true,"queues":4}
`

func TestStateFrozen(t *testing.T) {
	s, err := ParseState([]byte(frozenState))
	if err != nil {
		t.Fatal(err)
	}
	if s.Driver != UBLK || s.Number != 3 || s.PID != 4711 || s.Size != 1<<30 || !s.ReadOnly || s.Queues != 4 {
		t.Errorf("%+v", s)
	}
	if got := string(s.Encode()); got != frozenState {
		t.Errorf("it becomes %q", got)
	}
}

func TestStateRefused(t *testing.T) {
	for what, change := range map[string][2]string{
		"another driver":  {`"ublk"`, `"iscsi"`},
		"another path":    {"/dev/ublkb3", "/dev/sda"},
		"no size":         {"1073741824", "0"},
		"a negative size": {"1073741824", "-4096"},
		"no process":      {"4711", "0"},
		"a short token":   {"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "A"},
		"many queues":     {`"queues":4`, `"queues":100000`},
		"a task":          {`"queues":4`, `"queues":4,"task":7`},
		"another field":   {`"queues":4`, `"queues":4,"root":"/"`},
		"a second object": {"}\n", "}{}"},
		"too much":        {"}\n", "}" + strings.Repeat(" ", maxState)},
	} {
		text := strings.Replace(frozenState, change[0], change[1], 1)
		if text == frozenState {
			t.Fatalf("%s: nothing is changed", what)
		}
		if s, err := ParseState([]byte(text)); err == nil {
			t.Errorf("%s is accepted: %+v", what, s)
		}
	}
}

// The process of a state is found, and no other one with its ID.
func TestServed(t *testing.T) {
	var s State
	s.serve()
	if !s.served() {
		t.Error("this process is not found")
	}
	s.Started--
	if s.served() {
		t.Error("another process with the same ID is taken for it")
	}
	s.PID = os.Getpid() + 1<<23
	if s.served() {
		t.Error("a process is found that is not there")
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(frozenState))
	f.Add([]byte(`{"driver":"fuse","path":"/dev/loop0"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := ParseState(text)
		if err != nil {
			return
		}
		again, err := ParseState(s.Encode())
		if err != nil || again != s {
			t.Errorf("%+v becomes %+v, or %v", s, again, err)
		}
	})
}

// A request of ublk lies within the device, or is refused.
func FuzzParseUBLK(f *testing.F) {
	f.Add(make([]byte, ublkDescLen), int64(testSize))
	f.Add([]byte{0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, int64(testSize))
	f.Add([]byte{1, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0}, int64(4096))
	f.Fuzz(func(t *testing.T, desc []byte, size int64) {
		if len(desc) < ublkDescLen || size < 0 {
			return
		}
		r, ok := parseUBLK(desc, 1, size)
		if !ok {
			return
		}
		if r.e.Check(size) != nil {
			t.Errorf("%+v is beyond %d", r, size)
		}
		if (r.op == ublkRead || r.op == ublkWrite) && r.e.Len() > ublkMaxIO {
			t.Errorf("%+v is larger than a buffer", r)
		}
	})
}

// The reply of the kernel's nbd driver is read without trust.
func FuzzNBDIndex(f *testing.F) {
	f.Add([]byte{8, 0, nbdAttrIndex, 0, 7, 0, 0, 0})
	f.Add([]byte{5, 0, nbdAttrIndex, 0, 7})
	f.Add([]byte{4, 0, nbdAttrIndex, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = nbdIndex(messages(data))
	})
}

func TestNBDIndex(t *testing.T) {
	if n, err := nbdIndex(messages([]byte{8, 0, nbdAttrIndex, 0, 7, 0, 0, 0})); err != nil || n != 7 {
		t.Errorf("%d, %v", n, err)
	}
	for _, data := range [][]byte{nil, {8, 0, 2, 0, 7, 0, 0, 0}, {5, 0, nbdAttrIndex, 0, 7, 0, 0, 0}, {200, 0, nbdAttrIndex, 0}} {
		if n, err := nbdIndex(messages(data)); err == nil {
			t.Errorf("%v has the number %d", data, n)
		}
	}
}

func messages(data []byte) []genetlink.Message { return []genetlink.Message{{Data: data}} }

// The structures of ublk are as large as the kernel's.
func TestUBLKSizes(t *testing.T) {
	if n := unsafe.Sizeof(ublkCommand{}); n != 32 {
		t.Errorf("a control command has %d bytes", n)
	}
	if n := unsafe.Sizeof(ublkInfo{}); n != 64 {
		t.Errorf("the description of a device has %d bytes", n)
	}
	if n := unsafe.Offsetof(ublkParams{}.discardGranularity); n != 44 {
		t.Errorf("the granularity of discards is at byte %d of the parameters", n)
	}
	if n := unsafe.Sizeof(ublkParams{}); n != 64 { // 60, and padding
		t.Errorf("the parameters have %d bytes", n)
	}
}
