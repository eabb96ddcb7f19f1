package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func skopeo(t *testing.T, args ...string) []byte {
	t.Helper()
	bin, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("skopeo is not installed")
	}
	var stderr bytes.Buffer
	cmd := exec.Command(bin, append([]string{"--insecure-policy"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("skopeo %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return out
}

// Other tools read the layouts that thaw writes, and thaw reads theirs.
func TestSkopeo(t *testing.T) {
	ctx := context.Background()
	c := newClient(t, Options{})
	dir := t.TempDir() + "/layout"
	r := openRepo(t, c, "oci:"+dir+":v1")
	layer := noise(200_000, 1)
	img, l := pushImage(t, ctx, r, "v1", layer, amd64)
	pushImage(t, ctx, r, "v2", []byte("another"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	push(t, ctx, r, "", artifact(img, "application/vnd.test", nil))

	digest := func(out []byte) string {
		var v struct{ Digest string }
		if err := json.Unmarshal(out, &v); err != nil {
			t.Fatal(err)
		}
		return v.Digest
	}
	if got := digest(skopeo(t, "inspect", "oci:"+dir+":v1")); got != img.Digest.String() {
		t.Errorf("skopeo sees %s, want %s", got, img.Digest)
	}
	addr := dockerRegistry(t, "")
	skopeo(t, "copy", "--preserve-digests", "--dest-tls-verify=false", "oci:"+dir+":v1", "docker://"+addr+"/app:v1")
	remote := openRepo(t, c, addr+"/app:v1")
	if got, err := remote.Resolve(ctx, nil); err != nil || got.Digest != img.Digest {
		t.Errorf("in the registry: %v, %v", got, err)
	}
	if b, err := remote.Blob(ctx, l); err != nil || !bytes.Equal(b, layer) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	pushed, _ := pushImage(t, ctx, remote, "mine", []byte("pushed by thaw"), amd64)
	if got := digest(skopeo(t, "inspect", "--tls-verify=false", "docker://"+addr+"/app:mine")); got != pushed.Digest.String() {
		t.Errorf("skopeo sees %s in the registry, want %s", got, pushed.Digest)
	}
	// Push into the same layout, and read a layout that skopeo has made.
	skopeo(t, "copy", "--preserve-digests", "--src-tls-verify=false", "docker://"+addr+"/app:mine", "oci:"+dir+":mine")
	for tag, want := range map[string]v1.Hash{"mine": pushed.Digest, "v1": img.Digest} {
		if d, err := r.Lookup(ctx, r.Ref().WithTag(tag)); err != nil || d.Digest != want {
			t.Errorf("%s: %v, %v", tag, d, err)
		}
	}
	theirs := t.TempDir() + "/theirs"
	skopeo(t, "copy", "--preserve-digests", "--src-tls-verify=false", "docker://"+addr+"/app:v1", "oci:"+theirs)
	if got, err := openRepo(t, c, "oci:"+theirs).Resolve(ctx, &amd64); err != nil || got.Digest != img.Digest {
		t.Errorf("%v, %v", got, err)
	}
}

func TestLayoutErrors(t *testing.T) {
	ctx := context.Background()
	c := newClient(t, Options{})
	dir := t.TempDir()
	open := func(ref string) *Repo { return openRepo(t, c, ref) }
	sentence := func(err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	_, err := open("oci:"+dir+"/none").Resolve(ctx, nil)
	sentence(err, "there is no directory")
	if !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	_, err = open("oci:"+dir).Resolve(ctx, nil)
	sentence(err, "is not an OCI layout")

	r := open("oci:" + dir + "/l")
	img, _ := pushImage(t, ctx, r, "", []byte("one"), amd64)
	if got, err := r.Resolve(ctx, nil); err != nil || got.Digest != img.Digest {
		t.Errorf("the only image: %v", err)
	}
	_, err = open("oci:"+dir+"/l:v9").Resolve(ctx, nil)
	sentence(err, "no image is tagged v9, there are no tags")
	pushImage(t, ctx, r, "v2", []byte("two"), amd64)
	_, err = r.Resolve(ctx, nil)
	sentence(err, "has 2 images, choose a tag: there are: v2")

	// Damage.
	path := func(h v1.Hash) string { return filepath.Join(dir, "l", "blobs", "sha256", h.Hex) }
	r2 := open("oci:" + dir + "/l:v2")
	d, err := r2.Lookup(ctx, r2.Ref())
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(path(d.Digest), append(good[:len(good)-1:len(good)-1], ' '))
	if _, err := r2.Resolve(ctx, nil); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
	if _, err := open("oci:"+dir+"/l@"+d.Digest.String()).Resolve(ctx, nil); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
	write(path(d.Digest), good[:10])
	if _, err := r2.Resolve(ctx, nil); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
	if _, err := r2.Manifest(ctx, d); err == nil {
		t.Error("a truncated manifest is taken")
	}
	write(filepath.Join(dir, "l", "index.json"), []byte("{"))
	_, err = r.Resolve(ctx, nil)
	sentence(err, "index.json")
	_, err = r.PushManifest(ctx, good, d.MediaType, "v3")
	sentence(err, "index.json")
	write(filepath.Join(dir, "l", "index.json"), bytes.Repeat([]byte(" "), maxManifest+1))
	_, err = r.Resolve(ctx, nil)
	sentence(err, "more than")
	write(filepath.Join(dir, "l", "oci-layout"), []byte(`{"imageLayoutVersion":"9.0"}`))
	_, err = r.Resolve(ctx, nil)
	sentence(err, "unsupported version")
}

// Concurrent pushes lose nothing, and a reader always sees a whole index.
func TestLayoutConcurrent(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir() + "/l"
	base := openRepo(t, newClient(t, Options{}), "oci:"+dir+":base")
	img, _ := pushImage(t, ctx, base, "base", []byte("base"), amd64)
	if _, err := base.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	const n = 12
	var wg, readers sync.WaitGroup
	done := make(chan struct{})
	readers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if _, err := base.Resolve(ctx, nil); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	for i := range n {
		r := openRepo(t, newClient(t, Options{}), "oci:"+dir) // as another process would
		wg.Go(func() {
			pushImage(t, ctx, r, fmt.Sprintf("v%d", i), []byte(fmt.Sprint(i)), amd64)
			push(t, ctx, r, "", artifact(img, "application/vnd.test", map[string]string{"i": fmt.Sprint(i)}))
		})
	}
	wg.Wait()
	close(done)
	readers.Wait()
	found, err := base.Referrers(ctx, img, "application/vnd.test")
	if err != nil || len(found) != n {
		t.Errorf("%d referrers of %d, %v", len(found), n, err)
	}
	for i := range n {
		if _, err := base.Lookup(ctx, base.Ref().WithTag(fmt.Sprintf("v%d", i))); err != nil {
			t.Error(err)
		}
	}
	checkLayout(t, dir)
}

// checkLayout checks every file of a layout: blobs match their names, and no temporary
// file is left.
func checkLayout(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		switch name := e.Name(); {
		case filepath.Base(filepath.Dir(p)) == "sha256":
			if hashOf(b).Hex != name {
				t.Errorf("blob %s is %s", name, hashOf(b))
			}
		case !slices.Contains([]string{"oci-layout", "index.json", "index.json.lock"}, name):
			t.Errorf("%s was left behind", p)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLayoutPush(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir+"/l")
	data := noise(1<<20, 1)
	d := describe(data, "application/octet-stream")

	wrong := tempFile(t, noise(1<<20, 2))
	if _, err := r.PushBlob(ctx, d, wrong, nil); !errors.Is(err, ErrDigest) {
		t.Errorf("wrong bytes: %v", err)
	}
	if _, err := r.PushBlob(ctx, d, tempFile(t, data[1:]), nil); err == nil {
		t.Error("a short file is taken")
	}
	if _, err := r.PushBlob(ctx, d, dir+"/none", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.PushBlob(ended, d, tempFile(t, data), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	checkLayout(t, dir+"/l")

	file := tempFile(t, data)
	var last int64
	if sent, err := r.PushBlob(ctx, d, file, func(n int64) { last = n }); err != nil || !sent || last != d.Size {
		t.Errorf("%v, %v, %d", sent, err, last)
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("the file itself is gone: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if b, err := r.Blob(ctx, d); err != nil || !bytes.Equal(b, data) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	// A symlink is followed, not linked.
	other := noise(1000, 3)
	link := dir + "/link"
	if err := os.Symlink(tempFile(t, other), link); err != nil {
		t.Fatal(err)
	}
	if _, err := r.PushBlob(ctx, describe(other, "x/y"), link, nil); err != nil {
		t.Error(err)
	}
	// A blob that another program has half written is replaced.
	half := noise(1000, 4)
	if err := os.WriteFile(filepath.Join(dir, "l/blobs/sha256", hashOf(half).Hex), half[:500], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.PushBytes(ctx, half, "x/y"); err != nil {
		t.Error(err)
	}
	checkLayout(t, dir+"/l")
}

// A writer waits for the lock, but not longer than its context.
func TestLayoutLock(t *testing.T) {
	dir := t.TempDir()
	l := &layout{dir: dir}
	unlock, err := l.lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := l.lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	unlock()
	if unlock, err = l.lock(context.Background()); err != nil {
		t.Fatal(err)
	}
	unlock()
}

// thaw keeps entries of index.json that other programs wrote, with all their fields.
func TestEnter(t *testing.T) {
	h := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	entry := func(c, tag, kind string) json.RawMessage {
		s := `{"mediaType":"m","digest":"` + h(c) + `","size":1`
		if kind != "" {
			s += `,"artifactType":"` + kind + `"`
		}
		if tag != "" {
			s += `,"annotations":{"` + refName + `":"` + tag + `"}`
		}
		return json.RawMessage(s + "}")
	}
	list := func(entries []json.RawMessage) string {
		var s []string
		for _, raw := range entries {
			var d v1.Descriptor
			if json.Unmarshal(raw, &d) != nil || d.Digest.Hex == "" {
				s = append(s, string(raw))
				continue
			}
			s = append(s, d.Digest.Hex[:1]+d.Annotations[refName])
		}
		return strings.Join(s, " ")
	}
	before := []json.RawMessage{entry("a", "v1", ""), entry("b", "", ""), entry("c", "v2", "kind"), json.RawMessage(`{"foreign":1}`)}
	for _, x := range []struct{ digest, tag, want string }{
		{"d", "", `av1 b cv2 {"foreign":1} d`},
		{"d", "v1", `b cv2 {"foreign":1} dv1`},
		{"d", "v2", `av1 b c {"foreign":1} dv2`},
		{"a", "v2", `av1 b c {"foreign":1} av2`},
		{"a", "", `av1 b cv2 {"foreign":1}`},
		{"b", "", `av1 cv2 {"foreign":1} b`},
		{"b", "v3", `av1 cv2 {"foreign":1} bv3`},
		{"a", "v1", `b cv2 {"foreign":1} av1`},
	} {
		d, err := v1.NewHash(h(x.digest))
		if err != nil {
			t.Fatal(err)
		}
		got, err := enter(slices.Clone(before), v1.Descriptor{MediaType: "m", Digest: d, Size: 1}, x.tag)
		if err != nil || list(got) != x.want {
			t.Errorf("%s as %q: %s, %v, want %s", x.digest, x.tag, list(got), err, x.want)
		}
	}
}

// A layout may hold much more than the one image: block images, converted layers,
// unreadable entries, and other names of the same image.
func TestLayoutOnlyImage(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir)
	img, _ := pushImage(t, ctx, r, "v1", []byte("the image"), amd64)
	raw, err := r.Manifest(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.PushManifest(ctx, raw, img.MediaType, "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"", "block"} {
		push(t, ctx, r, tag, artifact(img, "application/vnd.test.image", map[string]string{"tag": tag}))
	}
	layer := artifact(img, "application/vnd.test.layer", nil)
	layer.Subject = nil
	converted := push(t, ctx, r, "converted-layer", layer)
	damaged := layer
	damaged.Annotations = map[string]string{"x": "y"}
	d := push(t, ctx, r, "damaged", damaged)
	if err := os.Truncate(filepath.Join(dir, blobName(d.Digest)), 10); err != nil {
		t.Fatal(err)
	}
	// Entries that no program can use.
	path := filepath.Join(dir, "index.json")
	edit := func(change func(index map[string]any, entries []any) []any) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var index map[string]any
		if err := json.Unmarshal(b, &index); err != nil {
			t.Fatal(err)
		}
		index["manifests"] = change(index, index["manifests"].([]any))
		if b, err = json.Marshal(index); err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, b)
	}
	edit(func(_ map[string]any, entries []any) []any {
		return append([]any{nil, 7, "x", map[string]any{"digest": 1}, map[string]any{"digest": "sha512:" + strings.Repeat("0", 128), "size": 1, "mediaType": string(types.OCIManifestSchema1),
			"annotations": map[string]string{refName: "long"}},
			map[string]any{"digest": "sha256:" + strings.Repeat("0", 64), "size": -1, "mediaType": string(types.OCIManifestSchema1)},
			map[string]any{"digest": "sha256:" + strings.Repeat("0", 64), "size": 5, "mediaType": string(types.OCIManifestSchema1), "platform": map[string]string{"os": "unknown", "architecture": "unknown"}},
		}, entries...)
	})
	for _, tag := range []string{"", ":v1", ":latest"} {
		if got, err := openRepo(t, r.client, "oci:"+dir+tag).Resolve(ctx, &amd64); err != nil || got.Digest != img.Digest {
			t.Errorf("%q: %v", tag, err)
		}
	}
	if found, err := r.Referrers(ctx, img); err != nil || len(found) != 2 {
		t.Errorf("%v, %v", found, err)
	}
	if got, err := openRepo(t, r.client, "oci:"+dir+":converted-layer").Resolve(ctx, &amd64); err != nil || got.Digest != converted.Digest {
		t.Errorf("%v", err)
	}
	if _, err := openRepo(t, r.client, "oci:"+dir+":long").Resolve(ctx, &amd64); err == nil || !strings.Contains(err.Error(), "tagged long cannot be used") {
		t.Errorf("%v", err)
	}
	// A push leaves them unchanged.
	pushImage(t, ctx, r, "v2", []byte("another"), amd64)
	b, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(b), "sha512:") {
		t.Errorf("%s, %v", b, err)
	}
	if _, err := r.Resolve(ctx, &amd64); err == nil || !strings.Contains(err.Error(), "has 2 images, choose a tag: there are: ") || !strings.Contains(err.Error(), "v1, v2") {
		t.Errorf("%v", err)
	}
}

// index.json is an index: a name in it may stand for one image per platform.
func TestLayoutPlatforms(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir)
	var index v1.IndexManifest
	index.SchemaVersion = 2
	for _, s := range []string{"linux/arm64", "linux/amd64"} {
		d, _ := pushImage(t, ctx, r, "", []byte(s), *platform(t, s))
		d.Platform = platform(t, s)
		index.Manifests = append(index.Manifests, d)
	}
	write := func() {
		t.Helper()
		b, err := json.Marshal(index)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, "index.json"), b)
	}
	for _, tag := range []string{"", "multi"} {
		for i := range index.Manifests {
			if tag != "" {
				index.Manifests[i].Annotations = map[string]string{refName: tag}
			}
		}
		write()
		name := "oci:" + dir
		if tag != "" {
			name += ":" + tag
		}
		for i, s := range []string{"linux/arm64", "linux/amd64"} {
			if got, err := openRepo(t, r.client, name).Resolve(ctx, platform(t, s)); err != nil || got.Digest != index.Manifests[i].Digest {
				t.Errorf("%s: %v", s, err)
			}
		}
		if _, err := openRepo(t, r.client, name).Resolve(ctx, platform(t, "linux/s390x")); err == nil || !strings.Contains(err.Error(), "there are: linux/amd64, linux/arm64") {
			t.Errorf("%v", err)
		}
	}
	// If two images of one platform have the same tag, it means the first one, as in
	// other tools.
	index.Manifests[1].Platform = index.Manifests[0].Platform
	write()
	if got, err := openRepo(t, r.client, "oci:"+dir+":multi").Resolve(ctx, platform(t, "linux/arm64")); err != nil || got.Digest != index.Manifests[0].Digest {
		t.Errorf("%v", err)
	}
}

// A blob with wrong content is reported as absent, and is written again.
func TestLayoutDamagedBlob(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	r := openRepo(t, newClient(t, Options{}), "oci:"+dir)
	data := noise(200_000, 1)
	d, err := r.PushBytes(ctx, data, "x/y")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, blobName(d.Digest))
	for name, damage := range map[string]func() error{
		"altered": func() error { return os.WriteFile(path, flip(data), 0o600) },
		"short":   func() error { return os.Truncate(path, 100) },
		"long":    func() error { return os.Truncate(path, 300_000) },
		"gone":    func() error { return os.Remove(path) },
	} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		writeFile(t, path, data)
		if has, err := r.Holds(ctx, d); err != nil || !has {
			t.Errorf("%s: %v, %v", name, has, err)
		}
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if has, err := r.Holds(ctx, d); err != nil || has {
			t.Errorf("%s: %v, %v", name, has, err)
		}
		sent, err := r.PushBlob(ctx, d, tempFile(t, data), nil)
		if err != nil || !sent {
			t.Errorf("%s: %v, %v", name, sent, err)
		}
		if b, err := r.Blob(ctx, d); err != nil || !bytes.Equal(b, data) {
			t.Errorf("%s: %v", name, err)
		}
		if sent, err := r.PushBlob(ctx, d, tempFile(t, data), nil); err != nil || sent {
			t.Errorf("%s: sent again: %v, %v", name, sent, err)
		}
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.Holds(ended, d); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func FuzzLayoutIndex(f *testing.F) {
	f.Add([]byte(`{"manifests":[`+entryOf("1", "linux/arm64", `,"annotations":{"`+refName+`":"v1"}`)+`,null,{"digest":"sha512:0","annotations":{"`+refName+`":"v2"}}]}`), "v1")
	f.Fuzz(func(t *testing.T, raw []byte, tag string) {
		entries, unusable, err := parseLayoutIndex(raw)
		if err != nil {
			return
		}
		for _, d := range entries {
			if checkDescriptor(d) != nil {
				t.Fatalf("%v", d)
			}
		}
		v := view{directory(t.TempDir())}
		found, err := v.find(t.Context(), entries, unusable, tag)
		if (err == nil) != (len(found) > 0) {
			t.Fatalf("%v, %v", found, err)
		}
	})
}
