package flatten

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// badCase is an image that cannot be built, and what is said of it.
type badCase struct {
	name  string
	layer []byte // the second of two
	store func(testing.TB, []byte) []byte
	says  []string
}

func truncated(store func(testing.TB, []byte) []byte) func(testing.TB, []byte) []byte {
	return func(t testing.TB, b []byte) []byte {
		t.Helper()
		b = store(t, b)
		return b[:len(b)*2/3]
	}
}

func damaged(store func(testing.TB, []byte) []byte) func(testing.TB, []byte) []byte {
	return func(t testing.TB, b []byte) []byte {
		t.Helper()
		b = bytes.Clone(store(t, b))
		for i := range 16 {
			b[len(b)/2+i] ^= 0x55
		}
		return b
	}
}

func TestBadLayers(t *testing.T) {
	var squares strings.Builder
	for i := range 50_000 {
		fmt.Fprint(&squares, i*i, " ")
	}
	some := tarball(t, dir("d"), reg("d/first", noise(1, 200_000)), reg("d/second", noise(2, 200_000)), reg("d/third", noise(3, 200_000)))
	one := func(l ...line) []byte { return tarball(t, l...) }
	header := func(kind byte, name string, size int64, fields map[int]string) []byte {
		return one(reg("before", ""), raw(headerBlock(kind, name, size, fields)))
	}
	// with makes a header of which pax records say something that archive/tar
	// does not write.
	with := func(kv ...string) []byte {
		records := paxRecords(kv...)
		return one(reg("before", ""), raw(headerBlock('x', "pax", int64(len(records)), nil), padded(records), headerBlock('0', "the entry", 0, nil)))
	}
	for _, c := range []badCase{
		{name: "a tar cut short", layer: some, store: truncated(plain), says: []string{`"d/second"`, "unexpected EOF"}},
		{name: "gzip cut short", layer: some, store: truncated(gzipped), says: []string{`"d/second"`, "unexpected EOF"}},
		{name: "zstd cut short", layer: some, store: truncated(zstdded), says: []string{`"d/`, "unexpected EOF"}},
		{name: "gzip damaged", layer: one(reg("d", squares.String())), store: damaged(gzipped), says: []string{"gzip: invalid checksum"}},
		{name: "zstd damaged", layer: one(reg("d", squares.String())), store: damaged(zstdded), says: []string{`"d"`}},
		{name: "gzip cut within its header", layer: some, store: func(t testing.TB, b []byte) []byte { return gzipped(t, b)[:5] }, says: []string{"gzip", "EOF"}},
		{name: "xz", layer: some, store: func(testing.TB, []byte) []byte { return []byte("\xfd7zXZ\x00 and so on") }, says: []string{"compressed by xz", "gzip, zstd"}},
		{name: "bzip2", layer: some, store: func(testing.TB, []byte) []byte { return []byte("BZh91AY&SY and so on") }, says: []string{"compressed by bzip2", "gzip, zstd"}},
		{name: "no tar", layer: []byte(strings.Repeat("this is a text\n", 100)), says: []string{"first entry", "invalid tar header"}},
		{name: "a damaged header behind a good one", layer: one(reg("good", "x"), raw(bytes.Repeat([]byte("?"), 512))), says: []string{`"good"`, "invalid tar header"}},
		{name: "another layer", layer: some, store: func(t testing.TB, _ []byte) []byte { return gzipped(t, tarball(t, reg("other", "x"))) },
			says: []string{"is not the one that the image config names", "sha256:"}},

		{name: "a hard link to nothing", layer: one(hardlink("link", "nothing")), says: []string{`"link"`, `"nothing"`, "does not exist"}},
		{name: "a hard link to what comes later", layer: one(hardlink("link", "later"), reg("later", "")), says: []string{`"link"`, `"later"`, "does not exist"}},
		{name: "a hard link to a directory", layer: one(dir("d"), hardlink("link", "d")), says: []string{`"link"`, `"d"`, "directory"}},
		{name: "a hard link to the root", layer: one(hardlink("link", "/")), says: []string{`"link"`, "directory"}},
		{name: "a hard link in the place of the root", layer: one(reg("f", ""), hardlink(".", "f")), says: []string{"root is not a directory"}},
		{name: "a hard link to what was hidden", layer: one(whiteout("lower"), hardlink("link", "lower")), says: []string{`"link"`, `"lower"`, "does not exist"}},
		{name: "the root is a file", layer: one(reg(".", "x")), says: []string{"root is not a directory"}},
		{name: "the root is a symlink", layer: one(symlink("/", "x")), says: []string{"root is not a directory"}},
		{name: "a symlink to itself in a parent", layer: one(symlink("loop", "loop"), reg("loop/f", "x")), says: []string{`"loop/f"`, "too many levels of symbolic links"}},
		{name: "symlinks to each other in a parent", layer: one(symlink("a", "b/x"), symlink("b", "a/y"), reg("a/f", "x")), says: []string{`"a/f"`, "too many levels"}},
		{name: "symlinks that grow", layer: one(symlink("a", strings.Repeat("a/", 2000)), reg("a/f", "x")), says: []string{`"a/f"`, "too many levels"}},
		{name: "a whiteout of no name", layer: one(reg("d/.wh.", "")), says: []string{`"d/.wh."`, "no name"}},
		{name: "a whiteout of dots", layer: one(reg("d/.wh...", "")), says: []string{"no name"}},

		{name: "a name of 256 bytes", layer: one(reg("d/"+long+"n", "x")), says: []string{long, "more than 255 bytes"}},
		{name: "a directory of 256 bytes", layer: one(reg(long+"n/f", "x")), says: []string{long, "more than 255 bytes"}},
		{name: "a name of 4097 bytes", layer: one(reg("x"+strings.Repeat("/x", 2048), "")), says: []string{"a name of 4097 bytes", "4096", `"...`}},
		{name: "a name of a megabyte", layer: one(reg(strings.Repeat("x/", 500_000)+"x", "")), says: []string{"a name of 1000001 bytes", `"...`}},
		{name: "a name of a megabyte that is short when it is cleaned", layer: one(reg(strings.Repeat("x/../", 200_000)+"x", "")), says: []string{"a name of 1000001 bytes"}},
		{name: "a whiteout of a long name", layer: one(reg(strings.Repeat("x/", 2048)+".wh.x", "")), says: []string{"a name of 4101 bytes"}},
		{name: "a whiteout of a name of 256 bytes", layer: one(reg(".wh."+long+"n", "")), says: []string{"more than 255 bytes"}},
		{name: "a hard link to a long name", layer: one(reg("f", ""), hardlink("link", strings.Repeat("x/", 2048)+"x")), says: []string{`"link"`, "4097 bytes", "4096"}},
		{name: "a hard link to a pseudo-link that is not there", layer: one(hardlink("link", ".wh..wh.plnk/1.2")), says: []string{`"link"`, "pseudo-link of aufs"}},
		{name: "a name with a NUL", layer: with("path", "a\x00b"), says: []string{`"before"`, "invalid tar header"}},
		{name: "a symlink of 4096 bytes", layer: one(symlink("s", strings.Repeat("s", 4096))), says: []string{`"s"`, "4096 bytes", "4095"}},
		{name: "a symlink to nothing at all", layer: header('2', "s", 0, nil), says: []string{`"s"`, "to nothing"}},
		{name: "an owner beyond 32 bits", layer: with("uid", "4294967296"), says: []string{`"the entry"`, "4294967296", "out of range"}},
		{name: "an owner below 0", layer: with("gid", "-1"), says: []string{`"the entry"`, "-1", "out of range"}},
		{name: "a device beyond what Linux has", layer: one(device('3', "dev", 4096, 0)), says: []string{`"dev"`, "4096:0", "out of range"}},
		{name: "a socket or the like", layer: header('V', "volume", 0, nil), says: []string{`"volume"`, "not a file"}},
		{name: "a size below 0", layer: with("size", "-1"), says: []string{`"before"`, "invalid tar header"}},
		{name: "a size below 0 in base 256", layer: header('0', "f", 0, map[int]string{124: "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}), says: []string{"invalid tar header"}},
		{name: "a size beyond what is there", layer: header('0', "f", 1<<30, nil), says: []string{`"f"`, "unexpected EOF"}},
		{name: "a size beyond ext4", layer: with("size", "17592186044416"), says: []string{`"the entry"`, "17592186044416", "ext4"}},
		{name: "a pax header of gigabytes", layer: header('x', "pax", 3<<30, nil), says: []string{`"before"`}},
		{name: "a pax header that is none", layer: one(raw(headerBlock('x', "pax", 10, nil), padded("not a pax "))), says: []string{"first entry", "invalid tar header"}},
		{name: "a GNU long name of gigabytes", layer: header('L', "././@LongLink", 3<<30, nil), says: []string{`"before"`}},
		{name: "a sparse file that contradicts itself", layer: with("GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", "5,10,3,10", "GNU.sparse.size", "20"),
			says: []string{`"before"`, "invalid tar header"}},
		{name: "an attribute of more than 64 KiB", layer: with("SCHILY.xattr.user.x", strings.Repeat("x", 65537)), says: []string{`"the entry"`, `"user.x"`, "65537 bytes"}},
		{name: "attributes of more than ext4 has room for", layer: with("SCHILY.xattr.user.x", strings.Repeat("x", 5000)), says: []string{`the entry"`, `"user.x"`, "does not fit", "all layers"}},
		{name: "attributes of more than 64 KiB", layer: with("SCHILY.xattr.user.x", strings.Repeat("x", 40_000), "SCHILY.xattr.user.y", strings.Repeat("x", 40_000)), says: []string{`"the entry"`, "more than 65536 bytes together"}},
		{name: "an attribute with a long name", layer: with("SCHILY.xattr.user."+strings.Repeat("x", 300), "v"), says: []string{`"the entry"`, "305 bytes"}},
		{name: "an attribute of libarchive that is no base64", layer: with("LIBARCHIVE.xattr.user.x", "*"), says: []string{`"the entry"`, `"user.x"`, "base64"}},
		{name: "an ACL that is none", layer: with("SCHILY.xattr.system.posix_acl_access", "u::rwx"), says: []string{`the entry"`, "posix_acl_access", "all layers"}},
		{name: "an entry that cannot be in the way", layer: one(reg("a/b", ""), hardlink("a/b/c/../../..", "a/b")), says: []string{"root is not a directory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.store == nil {
				c.store = gzipped
			}
			// The first layer is good, and stays.
			lower := tarball(t, reg("lower", noise(9, 10_000)))
			src := newSource(t, func(t testing.TB, b []byte) []byte {
				if bytes.Equal(b, lower) {
					return b
				}
				return c.store(t, b)
			}, lower, c.layer)
			dst := newTarget(t)
			src.inTurn(dst)
			o := testOptions
			o.TempDir, o.Jobs, o.Tag = t.TempDir(), 1, "tag"
			_, err := Build(t.Context(), &src.Source, dst, o)
			if err == nil {
				t.Fatal("it was built")
			}
			for _, s := range append(c.says, "layer") {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("the error does not say %q:\n%v", s, err)
				}
			}
			if n := dst.manifests(ArtifactTypeImage); n != 0 {
				t.Errorf("%d manifests of images", n)
			}
			if raw, err := dst.Tagged(t.Context(), "tag"); raw != nil || err != nil {
				t.Errorf("the tag is there: %v", err)
			}
			if n := dst.manifests(ArtifactTypeLayer); n < 1 {
				t.Error("the good layer did not stay")
			}
			if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
				t.Errorf("left in the temporary directory: %v, %v", left, err)
			}
		})
	}
}

func TestBadConfig(t *testing.T) {
	good := newSource(t, plain, tarball(t, reg("f", "x")))
	for _, c := range []struct{ name, config, says string }{
		{"of other layers", `{"rootfs":{"type":"layers","diff_ids":[]}}`, "the image has 1 layers, but its config lists 0"},
		{"of another program", `{"helm":"chart"}`, "not a container image"},
		{"no JSON", `<xml/>`, "image config"},
		{"of another digest", `{"rootfs":{"diff_ids":["sha512:` + strings.Repeat("0", 128) + `"]}}`, "SHA-256"},
		{"of half a digest", `{"rootfs":{"diff_ids":["sha256:1234"]}}`, "image config"},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := Source{Manifest: good.Manifest, Layers: good.Layers, Config: []byte(c.config)}
			dst := newTarget(t)
			_, err := Build(t.Context(), &src, dst, testOptions)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
			if len(dst.pushed) > 0 {
				t.Errorf("pushed: %v", dst.pushed)
			}
		})
	}
	for _, size := range []int{0, 4096, 100_000, 8 << 20, -1} {
		o := testOptions
		o.ChunkSize = size
		if _, err := Build(t.Context(), &good.Source, newTarget(t), o); err == nil || !strings.Contains(err.Error(), "power of two") {
			t.Errorf("a chunk size of %d: %v", size, err)
		}
	}
}

// TestBadManifest parses manifests of other things.
func TestBadManifest(t *testing.T) {
	src := newSource(t, plain, tarball(t, reg("f", noiseFile)))
	res := build(t, src, newTarget(t), testOptions)
	change := func(f func(m *v1.Manifest)) []byte {
		var m v1.Manifest
		if err := json.Unmarshal(res.Raw, &m); err != nil {
			t.Fatal(err)
		}
		f(&m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		name string
		raw  []byte
		is   error
	}{
		{"nothing", nil, ErrNotBlockImage},
		{"no JSON", []byte("<html>"), ErrNotBlockImage},
		{"a container image", change(func(m *v1.Manifest) { m.ArtifactType = "" }), ErrNotBlockImage},
		{"a layer", change(func(m *v1.Manifest) { m.ArtifactType = ArtifactTypeLayer }), ErrNotBlockImage},
		{"no index", change(func(m *v1.Manifest) { m.Layers = m.Layers[1:] }), blockmap.ErrCorrupt},
		{"no layers", change(func(m *v1.Manifest) { m.Layers = nil }), blockmap.ErrCorrupt},
		{"an index of gigabytes", change(func(m *v1.Manifest) { m.Layers[0].Size = 2 << 30 }), blockmap.ErrCorrupt},
		{"an index of less than nothing", change(func(m *v1.Manifest) { m.Layers[0].Size = -1 }), blockmap.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ParseImage(c.raw); !errors.Is(err, c.is) {
				t.Errorf("error %v, want %v", err, c.is)
			}
		})
	}
	later := change(func(m *v1.Manifest) { m.Layers[1].MediaType = "application/vnd.thaw.stream.v9" })
	if _, err := ParseImage(later); err == nil || !strings.Contains(err.Error(), "later version") {
		t.Errorf("a stream of another type: %v", err)
	}
	// An index of streams that are not the manifest's.
	m, err := ParseImage(change(func(m *v1.Manifest) { m.Layers = m.Layers[:2] }))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.ParseIndex(res.Index.Encode()); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("an index of other streams: %v", err)
	}
}

// TestForeignAttributes builds what other systems put in layers.
func TestForeignAttributes(t *testing.T) {
	src := newSource(t, gzipped, tarball(t,
		reg("mac", "x").with(pax("SCHILY.xattr.com.apple.provenance", "v")).with(pax("SCHILY.xattr.user.kept", "v")),
		reg("nfs", "x").with(pax("SCHILY.xattr.system.nfs4_acl", "v")).with(pax("SCHILY.xattr.", "v")).with(pax("SCHILY.xattr.user", "v")),
		line{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}, Format: tar.FormatPAX}},
	))
	need(t, "root", "mount")
	dst := newTarget(t)
	got := listing(t, mount(t, assemble(t, build(t, src, dst, testOptions).Index, dst)))
	if got["mac"].xattrs != "user.kept=76 " || got["nfs"].xattrs != "" {
		t.Errorf("attributes %q and %q", got["mac"].xattrs, got["nfs"].xattrs)
	}
}
