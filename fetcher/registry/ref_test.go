package registry

import (
	"strings"
	"testing"
)

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseRef(t *testing.T) {
	for _, x := range []struct{ in, want, place, key string }{
		{"registry.example/team/app:v1", "", "registry.example/team/app", "v1"},
		{"registry.example:5000/app@" + someDigest, "", "registry.example:5000/app", someDigest},
		{"registry.example/app:v1@" + someDigest, "", "registry.example/app", someDigest},
		{"registry.example/app", "registry.example/app:latest", "registry.example/app", "latest"},
		{"localhost/app:v1", "", "localhost/app", "v1"},
		{"[::1]:5000/app:v1", "", "[::1]:5000/app", "v1"},
		{"127.0.0.1:5000/a/b_c/d-e.f:V_1.2-x", "", "127.0.0.1:5000/a/b_c/d-e.f", "V_1.2-x"},
		{"debian", "index.docker.io/library/debian:latest", "index.docker.io/library/debian", "latest"},
		{"debian:12", "index.docker.io/library/debian:12", "index.docker.io/library/debian", "12"},
		{"docker.io/debian", "index.docker.io/library/debian:latest", "index.docker.io/library/debian", "latest"},
		{"team/app", "index.docker.io/team/app:latest", "index.docker.io/team/app", "latest"},
		{"oci:dir", "", "oci:dir", ""},
		{"oci:/a/b:v1", "", "oci:/a/b", "v1"},
		{"oci:/a/b:registry.example/app:v1", "", "oci:/a/b", "registry.example/app:v1"},
		{"oci:../x@" + someDigest, "", "oci:../x", someDigest},
		{"oci:x:v1@" + someDigest, "", "oci:x", someDigest},
		{"oci:/user@host/x", "", "oci:/user@host/x", ""},
		{"docker-archive:/a/b.tar", "", "docker-archive:/a/b.tar", ""},
		{"docker-archive:b.tar:app:v1", "", "docker-archive:b.tar", "app:v1"},
		{"oci-archive:/a/b.tar", "", "oci-archive:/a/b.tar", ""},
		{"oci-archive:b.tar:registry.example/app:v1", "", "oci-archive:b.tar", "registry.example/app:v1"},
		{"oci-archive:b.tar@" + someDigest, "", "oci-archive:b.tar", someDigest},
	} {
		r, err := ParseRef(x.in)
		if err != nil {
			t.Errorf("%s: %v", x.in, err)
			continue
		}
		if x.want == "" {
			x.want = x.in
		}
		if r.String() != x.want || r.Place() != x.place || r.key() != x.key {
			t.Errorf("%s: %s in %s by %s, want %s in %s by %s", x.in, r, r.Place(), r.key(), x.want, x.place, x.key)
		}
		if again, err := ParseRef(r.String()); err != nil || again != r {
			t.Errorf("%s: again %+v, %v", x.in, again, err)
		}
	}
	for _, x := range []struct{ in, want string }{
		{"", "it is empty"},
		{"https://registry.example/app", "write it without https://, as registry.example/app"},
		{"Registry.example/App", "not the name of a repository"},
		{"App", `"App" is not the name of a repository`}, // and not library/App, which nobody has written
		{"./dir", "it is a path"},
		{"../dir:tag", "it is a path"},
		{"/var/lib/image.tar", "it is a path"},
		{"registry.example/app:", "is not a tag"},
		{"registry.example/app:-x", "is not a tag"},
		{"registry.example/app:" + strings.Repeat("x", 129), "is not a tag"},
		{"registry.example/" + strings.Repeat("x", 256), "longer than 255"},
		{"registry.example/app@sha256:12", "is not a digest"},
		{"registry.example/app@sha512:" + strings.Repeat("0", 128), "is not a digest"},
		{"registry.example/", "name of the repository is missing"},
		{"registry.example//app", "not the name of a repository"},
		{"registry.example/../app", "not the name of a repository"},
		{"registry.example/a?b", "not the name of a repository"},
		{"us er@registry.example/app", "is not a host"},
		{"registry.example:port/app", "is not a host"},
		{"a/b\nc", "control characters"},
		{"oci:", "directory is missing"},
		{"oci::v1", "directory is missing"},
		{"oci:x:", "is not a tag"},
		{"oci:x:a b", "is not a tag"},
		{"docker-archive:", "file is missing"},
		{"oci-archive:", "file is missing"},
		{"oci-archive:x:", "is not a tag"},
		{"oci-archive:x@sha256:12", "is not a digest"},
		{"docker-archive:x:", "name after the colon"},
	} {
		r, err := ParseRef(x.in)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%q: %+v, %v, want %q", x.in, r, err, x.want)
		}
	}
}

func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"registry.example:5000/team/app:v1@" + someDigest, "debian", "oci:dir:tag@" + someDigest, "oci-archive:f.tar:tag@" + someDigest,
		"oci:a@b/c", "docker-archive:x:y:z", "[::1]:5/a", "docker.io/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRef(s)
		if err != nil {
			return
		}
		again, err := ParseRef(r.String())
		if err != nil || again != r {
			t.Errorf("%q is %+v, and %q is %+v, %v", s, r, r.String(), again, err)
		}
		c := New(Options{})
		defer c.Close()
		repo, err := c.Open(r)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		// No part of a name leads to another host or another operation.
		if m, ok := repo.reader.(*remote); ok {
			u := m.origin.url("manifests", r.key())
			if u.Host != r.Registry || u.Path != "/v2/"+r.Repository+"/manifests/"+r.key() || u.String() != u.Scheme+"://"+u.Host+u.Path {
				t.Errorf("%q: %s", s, u)
			}
		}
	})
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-9/*", "bytes */7", "bytes 9-5/10", "bytes 0-9/9",
		"bytes 0-99999999999999999999/*", "bytes -1-2/3", "items 0-1/2", "bytes +0-1/2", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, err := parseContentRange(s)
		if err == nil && (first < 0 || last < first || size != -1 && size <= last) {
			t.Errorf("%q: %d-%d/%d", s, first, last, size)
		}
	})
}

func TestContentRange(t *testing.T) {
	if a, b, c, err := parseContentRange("bytes 5-9/10"); a != 5 || b != 9 || c != 10 || err != nil {
		t.Error(a, b, c, err)
	}
	if a, b, c, err := parseContentRange("Bytes 0-0/*"); a != 0 || b != 0 || c != -1 || err != nil {
		t.Error(a, b, c, err)
	}
	for _, s := range []string{"", "bytes", "bytes 1-2", "bytes */5", "bytes 2-1/5", "bytes 1-5/5", "bytes 1-x/5", "bytes +1-2/5", "bytes 1-2/-5"} {
		if _, _, _, err := parseContentRange(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
