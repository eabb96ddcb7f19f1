package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// tool pipes b through a program.
func tool(t testing.TB, b []byte, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("%s is not installed", args[0])
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}

// layoutTar returns a tar of a layout with an image tagged v1.
func layoutTar(t testing.TB) (raw []byte, img, layer v1.Descriptor) {
	t.Helper()
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir+":v1")
	img, layer = pushImage(t, t.Context(), r, "v1", noise(300_000, 1), amd64)
	return tool(t, nil, "tar", "-C", dir, "-cf", "-", "."), img, layer
}

// An OCI archive, compressed or not, is read like the layout in it. A layout in a
// docker archive is too.
func TestOCIArchive(t *testing.T) {
	ctx := t.Context()
	plain, img, layer := layoutTar(t)
	for name, b := range map[string][]byte{
		"plain": plain, "gzip": tool(t, plain, "gzip", "-c"), "zstd": tool(t, plain, "zstd", "-c"),
		"zstd with a long window": tool(t, plain, "zstd", "-c", "--long=27", "-5"),
		"xz":                      tool(t, plain, "xz", "-c", "-1"), "xz of the strongest": tool(t, plain, "xz", "-c", "-9e"),
		"xz of several blocks":  tool(t, plain, "xz", "-c", "--block-size=65536", "-T2", "--check=sha256"),
		"xz without a check":    tool(t, plain, "xz", "-c", "--check=none"),
		"xz of several streams": append(append(tool(t, plain[:100_000], "xz", "-c"), 0, 0, 0, 0, 0, 0, 0, 0), tool(t, plain[100_000:], "xz", "-c", "--check=crc32")...),
		"bzip2":                 tool(t, plain, "bzip2", "-c"),
	} {
		t.Run(name, func(t *testing.T) {
			temp := t.TempDir()
			file := tempFile(t, b)
			c := newClient(t, Options{TempDir: temp})
			for _, ref := range []string{"oci-archive:" + file, "oci-archive:" + file + ":v1", "oci-archive:" + file + "@" + img.Digest.String(), "docker-archive:" + file + ":v1"} {
				r := openRepo(t, c, ref)
				got, err := r.Resolve(ctx, &amd64)
				if err != nil || got.Digest != img.Digest {
					t.Fatalf("%s: %v", ref, err)
				}
				if b, err := r.Blob(ctx, layer); err != nil || hashOf(b) != layer.Digest {
					t.Errorf("%s: %v", ref, err)
				}
				if b, err := readRange(ctx, r, layer.Digest, 1000, 50); err != nil || len(b) != 50 {
					t.Errorf("%s: %v", ref, err)
				}
				if has, err := r.HasBlob(ctx, layer); err != nil || !has {
					t.Errorf("%s: %v, %v", ref, has, err)
				}
				if _, err := r.PushBytes(ctx, nil, "x/y"); !errors.Is(err, errReadOnly) {
					t.Error(err)
				}
				if l, err := r.Referrers(ctx, img); err != nil || len(l) != 0 {
					t.Errorf("%v, %v", l, err)
				}
			}
			_, err := openRepo(t, c, "oci-archive:"+file+":v2").Resolve(ctx, nil)
			if !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "tagged v2, there are: v1") {
				t.Errorf("%v", err)
			}
			if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
				t.Errorf("left in the temporary directory: %v, %v", left, err)
			}
		})
	}
}

// A block image in an archive is found beside its subject too.
func TestOCIArchiveReferrers(t *testing.T) {
	dir := t.TempDir()
	c := newClient(t, Options{})
	r := openRepo(t, c, "oci:"+dir+":v1")
	img, _ := pushImage(t, t.Context(), r, "v1", []byte("layer"), amd64)
	if _, err := r.PushBytes(t.Context(), []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	a := push(t, t.Context(), r, "", artifact(img, "application/vnd.test", nil))
	file := tempFile(t, tool(t, nil, "tar", "-C", dir, "-cf", "-", "."))
	for _, kind := range []string{"oci-archive:", "docker-archive:"} {
		found, err := openRepo(t, c, kind+file).Referrers(t.Context(), img, "application/vnd.test")
		if err != nil || len(found) != 1 || found[0].Digest != a.Digest {
			t.Errorf("%s: %v, %v", kind, found, err)
		}
	}
}

// The archives that today's tools write and compress.
func TestArchiveTools(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	c := newClient(t, Options{})
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	w.WriteHeader(&tar.Header{Name: "hello", Mode: 0o644, Size: 5})
	w.Write([]byte("hello"))
	w.Close()
	img, _ := pushImage(t, ctx, openRepo(t, c, "oci:"+dir+"/l:v1"), "v1", layer.Bytes(), amd64)
	skopeo(t, "copy", "--preserve-digests", "oci:"+dir+"/l:v1", "oci-archive:"+dir+"/o.tar:registry.example/app:v1")
	skopeo(t, "copy", "oci:"+dir+"/l:v1", "docker-archive:"+dir+"/d.tar:registry.example/app:v1")
	if got, err := openRepo(t, c, "oci-archive:"+dir+"/o.tar:registry.example/app:v1").Resolve(ctx, nil); err != nil || got.Digest != img.Digest {
		t.Errorf("%v", err)
	}
	raw, err := os.ReadFile(dir + "/d.tar")
	if err != nil {
		t.Fatal(err)
	}
	var first v1.Hash
	for _, args := range [][]string{{"cat"}, {"gzip", "-c"}, {"zstd", "-c"}, {"xz", "-c"}, {"bzip2", "-c"}} {
		r := openRepo(t, c, "docker-archive:"+tempFile(t, tool(t, raw, args...)))
		got, err := r.Resolve(ctx, nil)
		if err != nil {
			t.Errorf("%v: %v", args, err)
			continue
		}
		if first == (v1.Hash{}) {
			first = got.Digest
		}
		b, err := r.Blob(ctx, got.Manifest.Layers[0])
		if err != nil || !bytes.Equal(b, layer.Bytes()) || got.Digest != first {
			t.Errorf("%v: %d bytes, %v", args, len(b), err)
		}
	}
}

// Archives of docker 25 and later have both a manifest.json and an index.json,
// layers by digest, and names of containerd.
func TestArchiveOfBoth(t *testing.T) {
	ctx := t.Context()
	c := newClient(t, Options{})
	one, two := noise(1000, 1), noise(1000, 2)
	image := func(layer []byte) (entries []entry, d v1.Descriptor, config v1.Descriptor) {
		cfg := savedConfig(t, layer)
		config = describe(cfg, types.OCIConfigJSON)
		m, err := json.Marshal(v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: config, Layers: []v1.Descriptor{describe(layer, types.OCIUncompressedLayer)}})
		if err != nil {
			t.Fatal(err)
		}
		d = describe(m, types.OCIManifestSchema1)
		for _, b := range [][]byte{cfg, m, layer} {
			entries = append(entries, entry{name: blobName(hashOf(b)), body: b})
		}
		return entries, d, config
	}
	appEntries, app, appConfig := image(one)
	dbEntries, db, dbConfig := image(two)
	named := func(d v1.Descriptor, full string) v1.Descriptor {
		d.Annotations = map[string]string{fullRefName: full, refName: full[strings.LastIndexByte(full, ':')+1:]}
		return d
	}
	index, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{
		named(app, "docker.io/library/app:v1"), named(db, "docker.io/library/db:v1")}})
	if err != nil {
		t.Fatal(err)
	}
	saved := fmt.Sprintf(`[{"Config":%q,"RepoTags":["app:v1"],"Layers":[%q]},{"Config":%q,"RepoTags":["db:v1"],"Layers":[%q]}]`,
		blobName(appConfig.Digest), blobName(hashOf(one)), blobName(dbConfig.Digest), blobName(hashOf(two)))
	common := append(append(appEntries, dbEntries...), entry{name: "oci-layout", body: []byte(layoutVersion)}, entry{name: "index.json", body: index})
	both := writeTar(t, append(common, entry{name: "manifest.json", body: []byte(saved)})...)
	alone := writeTar(t, common...)
	for ref, want := range map[string]v1.Hash{
		"docker-archive:" + both + ":app:v1":                    hashOf(one),
		"docker-archive:" + both + ":db:v1":                     hashOf(two),
		"docker-archive:" + alone + ":db:v1":                    hashOf(two),
		"docker-archive:" + alone + ":docker.io/library/app:v1": hashOf(one),
		"oci-archive:" + both + ":db:v1":                        hashOf(two),
		"oci-archive:" + both + ":docker.io/library/app:v1":     hashOf(one),
		"oci-archive:" + both + "@" + db.Digest.String():        hashOf(two),
	} {
		r := openRepo(t, c, ref)
		img, err := r.Resolve(ctx, &amd64)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		if l := img.Manifest.Layers[0]; l.Digest != want {
			t.Errorf("%s: %v", ref, l)
		} else if _, err := r.Blob(ctx, l); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for ref, want := range map[string]string{
		"oci-archive:" + both + ":v1": "2 images are tagged v1, choose one by its full name: docker.io/library/app:v1, docker.io/library/db:v1",
		"oci-archive:" + both:         "has 2 images, choose a tag",
		"docker-archive:" + both:      "has 2 images, choose a name: app:v1, db:v1",
		"oci-archive:" + writeTar(t, entry{name: "manifest.json", body: []byte(saved)}): "write docker-archive:",
		"oci-archive:" + writeTar(t, entry{name: "x"}):                                  "is not an OCI archive",
		"oci:" + both:                             "oci-archive:FILE",
		"oci-archive:" + t.TempDir() + "/none":    "there is no file ",
		"docker-archive:" + t.TempDir() + "/none": "no such file",
	} {
		if _, err := openRepo(t, c, ref).Resolve(ctx, &amd64); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", ref, err, want)
		}
	}
}

// Archives that are hostile or merely odd.
func TestArchiveHostile(t *testing.T) {
	c := newClient(t, Options{})
	layer := []byte("the layer")
	config := savedConfig(t, layer)
	saved := func(config, layer string) []byte {
		return fmt.Appendf(nil, `[{"Config":%q,"Layers":[%q]}]`, config, layer)
	}
	var names, layers []string
	for i := range 5000 {
		names = append(names, fmt.Sprintf(`{"Config":"c%d","RepoTags":["app:v%d"],"Layers":[]}`, i, i))
		layers = append(layers, "l")
	}
	many := `{"rootfs":{"diff_ids":["` + strings.Repeat(hashOf(layer).String()+`","`, 4999) + hashOf(layer).String() + `"]}}`
	manyLayers, err := json.Marshal([]savedImage{{Config: "c", Layers: layers}})
	if err != nil {
		t.Fatal(err)
	}
	good := writeTar(t, entry{name: "c", body: config}, entry{name: "l", body: layer}, entry{name: "manifest.json", body: saved("c", "l")})
	b, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	negative := bytes.Clone(b)
	copy(negative[124:136], "-0000000001\x00")
	absurd := bytes.Clone(b)
	copy(absurd[124:136], "77777777777\x00")
	for _, h := range [][]byte{negative, absurd} {
		sum := 0
		copy(h[148:156], "        ")
		for _, c := range h[:512] {
			sum += int(c)
		}
		copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	}
	for name, x := range map[string]struct{ file, want string }{
		"names that lead out":     {writeTar(t, entry{name: "manifest.json", body: saved("../../../etc/passwd", "l")}), "has no member"},
		"absolute names":          {writeTar(t, entry{name: "manifest.json", body: saved("/etc/passwd", "l")}), "has no member"},
		"a link that leads out":   {writeTar(t, entry{name: "c", link: "../../etc/passwd"}, entry{name: "manifest.json", body: saved("c", "l")}), "has no member"},
		"links to each other":     {writeTar(t, entry{name: "c", link: "d"}, entry{name: "d", link: "c"}, entry{name: "manifest.json", body: saved("c", "l")}), "lead nowhere"},
		"thousands of images":     {writeTar(t, entry{name: "manifest.json", body: []byte("[" + strings.Join(names, ",") + "]")}), "has 5000 images, choose a name: app:v0, app:v1"},
		"thousands of layers":     {writeTar(t, entry{name: "c", body: []byte(many)}, entry{name: "l", body: layer}, entry{name: "manifest.json", body: manyLayers}), "5000 layers, and 4096 are allowed"},
		"layers that are missing": {writeTar(t, entry{name: "c", body: config}, entry{name: "manifest.json", body: []byte(`[{"Config":"c","Layers":[]}]`)}), "has 0 layers and its config says 1"},
		"no JSON":                 {writeTar(t, entry{name: "c", body: []byte("?")}, entry{name: "manifest.json", body: saved("c", "l")}), "parse config"},
		"a config that is huge":   {writeTar(t, entry{name: "c", body: make([]byte, maxManifest+1)}, entry{name: "manifest.json", body: saved("c", "l")}), "is too long"},
		"a size below zero":       {tempFile(t, negative), "not a tar archive, or is damaged"},
		"a size beyond the file":  {tempFile(t, absurd), "not a tar archive, or is damaged"},
		"cut short":               {tempFile(t, b[:600]), "not a tar archive, or is damaged"},
	} {
		for _, compress := range []string{"cat", "gzip"} {
			file := x.file
			if compress == "gzip" {
				raw, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				file = tempFile(t, tool(t, raw, "gzip", "-c"))
			}
			_, err := openRepo(t, c, "docker-archive:"+file).Resolve(t.Context(), nil)
			if err == nil || !strings.Contains(err.Error(), x.want) || len(err.Error()) > 1500 {
				t.Errorf("%s, %s: %.2000v, want %q", name, compress, err, x.want)
			}
		}
	}

	// The last entry of a name counts, as in unpacking.
	twice := writeTar(t, entry{name: "c", body: []byte("?")}, entry{name: "./x/../c", body: config}, entry{name: "l", body: layer}, entry{name: "manifest.json", body: saved("c", "l")})
	if _, err := openRepo(t, c, "docker-archive:"+twice).Resolve(t.Context(), nil); err != nil {
		t.Error(err)
	}
	// A link of any kind.
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []struct {
		tar.Header
		body []byte
	}{
		{tar.Header{Name: "a/l", Size: int64(len(layer))}, layer}, {tar.Header{Name: "b/l", Typeflag: tar.TypeLink, Linkname: "a/l"}, nil},
		{tar.Header{Name: "c/l", Typeflag: tar.TypeSymlink, Linkname: "../b/l"}, nil}, {tar.Header{Name: "c/c.json", Size: int64(len(config))}, config},
		{tar.Header{Name: "manifest.json", Size: int64(len(saved("c/c.json", "c/l")))}, saved("c/c.json", "c/l")},
	} {
		w.WriteHeader(&h.Header)
		w.Write(h.body)
	}
	w.Close()
	r := openRepo(t, c, "docker-archive:"+tempFile(t, buf.Bytes()))
	img, err := r.Resolve(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := r.Blob(t.Context(), img.Manifest.Layers[0]); err != nil || !bytes.Equal(b, layer) {
		t.Errorf("%q, %v", b, err)
	}
}

// tar --sparse writes members whose bytes are not the content.
func TestArchiveSparse(t *testing.T) {
	for _, format := range []string{"--format=gnu", "--format=pax"} {
		dir := t.TempDir()
		if err := os.Truncate(writeFile(t, dir+"/oci-layout", nil), 1<<20); err != nil {
			t.Fatal(err)
		}
		file := tempFile(t, tool(t, nil, "tar", "-C", dir, "--sparse", format, "-cf", "-", "."))
		_, err := openRepo(t, newClient(t, Options{}), "oci-archive:"+file).Resolve(t.Context(), nil)
		if err == nil || !strings.Contains(err.Error(), "without the option --sparse") {
			t.Errorf("%s: %v", format, err)
		}
	}
}

func writeFile(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A compressed archive that is damaged, or needs too much memory or too much disk,
// fails with a clear error.
func TestDecompressBounds(t *testing.T) {
	plain, _, _ := layoutTar(t)
	resolve := func(b []byte, o Options) error {
		_, err := openRepo(t, newClient(t, o), "oci-archive:"+tempFile(t, b)).Resolve(t.Context(), nil)
		return err
	}
	for name, x := range map[string]struct {
		b    []byte
		want string
	}{
		"gzip cut short":  {truncate(tool(t, plain, "gzip", "-c")), "compressed by gzip: unexpected EOF"},
		"zstd cut short":  {truncate(tool(t, plain, "zstd", "-c")), "compressed by zstd"},
		"xz cut short":    {truncate(tool(t, plain, "xz", "-c")), "compressed by xz"},
		"bzip2 cut short": {truncate(tool(t, plain, "bzip2", "-c")), "compressed by bzip2"},
		"xz damaged":      {flip(tool(t, plain, "xz", "-c")), "compressed by xz"},
		"zstd window":     {tool(t, plain, "zstd", "-c", "--ultra", "--long=30", "-1"), "window"},
		"lz4":             {[]byte("\x04\x22\x4d\x18 and so on"), "compressed by lz4, which is not supported: use gzip"},
		"nothing":         {nil, "not an OCI archive"},
		"xz of nothing":   {tool(t, nil, "xz", "-c"), "not an OCI archive"},
		"xz by BCJ":       {tool(t, plain, "xz", "-c", "--x86", "--lzma2=preset=1"), "filter 0x4"},
	} {
		if err := resolve(x.b, Options{}); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", name, err, x.want)
		}
	}
	if err := resolve(tool(t, plain, "gzip", "-c"), Options{TempDir: "/nonexistent"}); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("%v", err)
	}

	// A header of four bytes asks for 1.5 GiB.
	big := tool(t, plain, "xz", "-c", "--lzma2=preset=0,dict=1536MiB")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := resolve(big, Options{}); err == nil || !strings.Contains(err.Error(), "dictionary of 1536 MiB") {
		t.Errorf("%v", err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
		t.Errorf("refusing it allocated %d MiB", n>>20)
	}
}

func truncate(b []byte) []byte { return b[:len(b)*2/3] }

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 0x10
	return b
}

// The size of decompressed archives is limited, and zeros take no disk space.
func TestSparseWriter(t *testing.T) {
	dir := t.TempDir()
	f, err := unnamedFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := &sparseWriter{f: f, dir: dir, left: 100 << 20}
	data := noise(100_000, 1)
	zeros := make([]byte, 1<<20)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	for range 90 {
		if _, err := w.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != int64(len(data))+90<<20 || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes take %d bytes of disk", st.Size, st.Blocks*512)
	}
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v", err)
	}
	for range 20 {
		_, err = w.Write(zeros)
	}
	if err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("%v", err)
	}
	if n := archiveLimit(1 << 62); n <= 0 {
		t.Errorf("a limit of %d", n)
	}
}

// The error of a full disk names the directory and the remedy.
func TestDecompressFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting takes root")
	}
	temp := t.TempDir()
	if err := unix.Mount("tmpfs", temp, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(temp, 0) })
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir+":v1")
	pushImage(t, t.Context(), r, "v1", noise(3<<20, 1), amd64)
	b := tool(t, tool(t, nil, "tar", "-C", dir, "-cf", "-", "."), "gzip", "-c")
	_, err := openRepo(t, newClient(t, Options{TempDir: temp}), "oci-archive:"+tempFile(t, b)).Resolve(t.Context(), nil)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), temp+" is full") || !strings.Contains(err.Error(), "--temp") {
		t.Errorf("%v", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(temp, &st); err != nil || st.Bfree != st.Blocks {
		t.Errorf("%d of %d blocks are free, %v", st.Bfree, st.Blocks, err)
	}
}

// If another kind of file is in the place of an expected file, reading fails at once.
func TestNotRegular(t *testing.T) {
	c := newClient(t, Options{})
	dir := t.TempDir()
	fifo := dir + "/fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := dir + "/link"
	if err := os.Symlink(fifo, link); err != nil {
		t.Fatal(err)
	}
	soon := func(what string, f func() error) {
		t.Helper()
		done := make(chan error, 1)
		go func() { done <- f() }()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: no answer", what)
		}
	}
	for _, path := range []string{fifo, link, "/dev/zero", dir} {
		for _, kind := range []string{"docker-archive:", "oci-archive:"} {
			soon(kind+path, func() error {
				_, err := openRepo(t, c, kind+path).Resolve(context.Background(), nil)
				return err
			})
		}
		r := openRepo(t, c, "oci:"+t.TempDir()+"/l:v1")
		soon("push of "+path, func() error {
			_, err := r.PushBlob(context.Background(), v1.Descriptor{Digest: hashOf(nil), Size: 0}, path, nil)
			return err
		})
	}
	// Each file of a layout.
	replace := func(path string) {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"oci-layout", "index.json", "manifest", "layer"} {
		l := t.TempDir()
		r := openRepo(t, c, "oci:"+l+":v1")
		img, layer := pushImage(t, t.Context(), r, "v1", []byte("the layer"), amd64)
		switch name {
		case "manifest":
			replace(filepath.Join(l, blobName(img.Digest)))
		case "layer":
			replace(filepath.Join(l, blobName(layer.Digest)))
			for what, f := range map[string]func() error{
				"blob":  func() error { _, err := r.Blob(context.Background(), layer); return err },
				"range": func() error { _, err := readRange(context.Background(), r, layer.Digest, 0, 1); return err },
				"has":   func() error { _, err := r.HasBlob(context.Background(), layer); return err },
				"holds": func() error { _, err := r.Holds(context.Background(), layer); return err },
			} {
				soon(what, f)
			}
			continue
		default:
			replace(filepath.Join(l, name))
		}
		soon(name, func() error { _, err := r.Resolve(context.Background(), nil); return err })
	}
	// An invalid manifest does not hide what the others refer to.
	l := t.TempDir()
	r := openRepo(t, c, "oci:"+l+":v1")
	img, _ := pushImage(t, t.Context(), r, "v1", []byte("one"), amd64)
	bad, _ := pushImage(t, t.Context(), r, "v2", []byte("two"), amd64)
	if _, err := r.PushBytes(t.Context(), []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	push(t, t.Context(), r, "", artifact(img, "application/vnd.test", nil))
	replace(filepath.Join(l, blobName(bad.Digest)))
	if found, err := r.Referrers(t.Context(), img); err != nil || len(found) != 1 {
		t.Errorf("%v, %v", found, err)
	}
}

// A user who interrupts need not wait for the decompression to end, and the next caller
// can still read the archive.
func TestDecompressCancelled(t *testing.T) {
	plain, img, _ := layoutTar(t)
	r := openRepo(t, newClient(t, Options{}), "oci-archive:"+tempFile(t, tool(t, plain, "gzip", "-c")))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Resolve(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if got, err := r.Resolve(t.Context(), nil); err != nil || got.Digest != img.Digest {
		t.Errorf("%v", err)
	}
}

// Any input is an archive or an error.
func FuzzArchive(f *testing.F) {
	plain, _, _ := layoutTar(f)
	small := func(b []byte) []byte { return b[:min(len(b), 8<<10)] }
	f.Add(small(plain))
	for _, args := range [][]string{{"gzip", "-c"}, {"zstd", "-c"}, {"xz", "-c"}, {"xz", "-c", "--block-size=512", "--check=none"}, {"bzip2", "-c"}} {
		f.Add(tool(f, small(plain), args...))
	}
	f.Add([]byte("\xfd7zXZ\x00\x00\x04"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, kind, err := decompress(bytes.NewReader(b))
		if err != nil {
			return
		}
		if kind != "" {
			defer r.Close()
			if b, err = io.ReadAll(io.LimitReader(r, 4<<20)); err != nil {
				return
			}
		}
		file, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.Write(b); err != nil {
			t.Fatal(err)
		}
		members, err := scan(t.Context(), file)
		if err != nil {
			return
		}
		for name, m := range members {
			if m.off < 0 || m.size < 0 || m.off+m.size < m.off || m.link == "" && m.why == nil && m.size > 0 && m.off+m.size > int64(len(b)) {
				t.Fatalf("%q at %d+%d of %d bytes", name, m.off, m.size, len(b))
			}
		}
	})
}

// The guard passes all output of xz, byte by byte.
func FuzzXZGuard(f *testing.F) {
	plain, _, _ := layoutTar(f)
	f.Add(tool(f, plain[:4096], "xz", "-c", "--block-size=1024"))
	f.Add([]byte(xzMagic + "\x00\x01\x69\x22\xde\x36\x02\x00\x21\x01\x28\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		z, kind, err := decompress(bytes.NewReader(b))
		if err != nil || kind != "xz" {
			return
		}
		defer z.Close()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		io.Copy(io.Discard, io.LimitReader(z, 1<<20))
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 3*blockmap.MaxWindow {
			t.Fatalf("%d MiB for %d bytes", n>>20, len(b))
		}
	})
}
