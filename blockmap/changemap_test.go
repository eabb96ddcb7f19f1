package blockmap

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// someChanges writes the map of an overlay of 3000 blocks: some changes are durable, some
// are only live.
func someChanges(t testing.TB) (dir string, m *changeMap) {
	t.Helper()
	dir = t.TempDir()
	m = newChangeMap(Digest{1, 2, 3}, 3000)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 64)
	check(m.create(OS, filepath.Join(dir, mapName)))
	check(m.attach(OS, filepath.Join(dir, liveName), BootID{7}, someData(t, FileID{Inode: 11, Born: 12, Device: 13, Superblock: 14})))
	check(m.set(2, []uint64{repeat(stateData), 0x1234_5678_9abc_def0}, buf))
	check(m.sync(m.snapshot()))
	check(m.set(90, []uint64{repeat(stateZero)}, buf))
	check(m.close())
	return dir, m
}

// someData is a data file that says that it is the one of that ID.
func someData(t testing.TB, id FileID) *dataFile {
	t.Helper()
	data, err := createData(OS, filepath.Join(t.TempDir(), "data"), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { data.close() })
	data.id = id
	return data
}

// The program reads maps of earlier versions, and writes the same bytes.
func TestFrozenChangeMap(t *testing.T) {
	dir, m := someChanges(t)
	for name, want := range map[string]struct {
		h mapHead
		s states
	}{
		liveName: {mapHead{m.id, m.blocks, BootID{7}, FileID{11, 12, 13, 14}}, m.live},
		mapName:  {mapHead{m.id, m.blocks, BootID{}, FileID{}}, m.durable},
	} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		frozen := frozenGzip(t, "testdata/overlay"+name+".gz", got)
		if !bytes.Equal(got, frozen) {
			t.Fatalf("the file %s that is written is not the frozen one", name)
		}
		h, copies, err := overlayMap.decode(frozen)
		if err != nil || h != want.h || !slices.Equal(copies[0], want.s.all64()) {
			t.Fatalf("%s: decoded %+v, %v", name, h, err)
		}
	}
	if m.durable.at(90*perWord) != stateAbsent || m.live.at(90*perWord) != stateZero {
		t.Error("the copies are alike")
	}
}

// Live is believed only of the file that was written, in the same run of the kernel and
// under the same superblock. Durable is believed of a copy.
func TestChangeMapTrust(t *testing.T) {
	for _, c := range []struct {
		name string
		boot BootID
		data FileID
		live bool
	}{
		{"the same", BootID{7}, FileID{11, 12, 13, 14}, true},
		{"another boot", BootID{8}, FileID{11, 12, 13, 14}, false},
		{"boot not known", BootID{}, FileID{11, 12, 13, 14}, false},
		{"mounted anew", BootID{7}, FileID{11, 12, 13, 15}, false},
		{"superblock not known", BootID{7}, FileID{11, 12, 13, 0}, false},
		{"a copy", BootID{7}, FileID{99, 98, 13, 14}, false},
	} {
		dir, m := someChanges(t)
		data := someData(t, c.data)
		for range 2 { // what attach has written is read again
			got := newChangeMap(m.id, m.blocks)
			err := got.load(OS, filepath.Join(dir, mapName))
			if err == nil {
				err = got.attach(OS, filepath.Join(dir, liveName), c.boot, data)
			}
			if err = errors.Join(err, got.close()); err != nil {
				t.Fatal(err)
			}
			if got.live.at(2*perWord) != stateData || (got.live.at(90*perWord) == stateZero) != c.live {
				t.Errorf("%s: durable states are there: %v; live ones are believed: %v", c.name, got.live.at(2*perWord) == stateData, !c.live)
			}
			if c.live != !got.clean() {
				t.Errorf("%s: what is not durable is to be made so: %v", c.name, !got.clean())
			}
		}
	}
	dir, m := someChanges(t)
	for what, other := range map[string]*changeMap{
		"another image's": newChangeMap(Digest{9}, m.blocks), "another length": newChangeMap(m.id, m.blocks+1),
	} {
		if err := other.load(OS, filepath.Join(dir, mapName)); err == nil {
			t.Errorf("%s map was believed", what)
		}
	}
}

func FuzzChangeMap(f *testing.F) {
	dir, _ := someChanges(f)
	b, err := os.ReadFile(filepath.Join(dir, liveName))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:mapHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= mapHeader { // with a right checksum the fuzzer reaches the code behind the check
			var h mapHead
			copy(h.id[:], b[16:])
			h.blocks = uint32(b[48]) | uint32(b[49])<<8 | uint32(b[50])<<16
			b = append(overlayMap.head(&h), b[mapHeadLen:]...)
		}
		h, copies, err := overlayMap.decode(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for _, words := range copies {
			s := statesOf(words)
			if n := s.count(stateData) + s.count(stateZero) + s.count(stateLost); n > int64(h.blocks) {
				t.Fatalf("%d of %d blocks are changed", n, h.blocks)
			}
		}
	})
}

func someHeader() overlayHeader {
	return overlayHeader{size: 40960, digest: Digest{1, 2, 3}, image: "registry.example/a@sha256:0102"}
}

// The program reads headers of earlier versions, and writes the same bytes.
func TestFrozenOverlayHeader(t *testing.T) {
	h := someHeader()
	const name = "testdata/overlayheader"
	if updating() {
		if err := os.WriteFile(name, h.encode(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(h.encode(), want) {
		t.Fatalf("encoded\n%x\nfrozen\n%x, %v", h.encode(), want, err)
	}
	if got, err := decodeOverlayHeader(want); err != nil || got != h {
		t.Errorf("decoded %+v, %v", got, err)
	}
	for i := range want {
		b := bytes.Clone(want)
		b[i] ^= 0x40
		if _, err := decodeOverlayHeader(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("with a wrong byte %d: %v", i, err)
		}
		if _, err := decodeOverlayHeader(want[:i]); !errors.Is(err, ErrCorrupt) {
			t.Errorf("the first %d bytes: %v", i, err)
		}
	}
}

// sealedHeader is b with the fields that a right header has.
func sealedHeader(b []byte) []byte {
	h := overlayHeader{size: int64(b[16]) * BlockSize, digest: Digest(b[24:56]), image: string(b[overlayHeadLen:])}
	return h.encode()
}

func FuzzOverlayHeader(f *testing.F) {
	h := someHeader()
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= overlayHeadLen { // with a right checksum the fuzzer reaches the code behind the check
			copy(b, sealedHeader(b))
		}
		h, err := decodeOverlayHeader(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if h.size < 0 || h.size%BlockSize != 0 || !bytes.Equal(h.encode(), b) {
			t.Fatalf("decoded %+v", h)
		}
	})
}
