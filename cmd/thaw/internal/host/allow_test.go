package host

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPatterns(t *testing.T) {
	const digest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"registry.example/team/*", "registry.example/team/app:v1", true},
		{"registry.example/team/*", "registry.example/team/sub/app:v1", false},
		{"registry.example/team/**", "registry.example/team/sub/app:v1", true},
		{"registry.example/team/**", "registry.example/teams/app:v1", false},
		{"registry.example/team/**", "registry.example/team:v1", false},
		{"registry.example/team/a**", "registry.example/team/app:v1", true},
		{"registry.example/team/a**", "registry.example/team/app/x:v1", true},
		{"registry.example/team/a**", "registry.example/team/b:v1", false},
		{"registry.example/t*/a**", "registry.example/team/sub/app:v1", false},
		{"*/team/**", "registry.example/team/x/y:v1", true},
		{"*/team/*", "registry.example/other/team/x:v1", false},
		{"registry.example/team/app:*", "registry.example/team/app:v1", true},
		{"registry.example/team/app:*", "registry.example/team/apple:v1", false},
		{"registry.example/team/ap*", "registry.example/team/apple:v1", true},
		{"**", "registry.example/team/app:v1", true},
		{"**", "registry.example/Not A Name", false},
		{"**", "", false},
		{"**", "oci:/srv/app:v1", false},
		{"**", "docker-archive:/srv/a.tar", false},

		// From host into path, from host into host.
		{"registry.example**", "registry.example/team/app:v1", true},
		{"registry.example**", "registry.example.evil.test/x", false},
		{"registry.example**", "registry.example-evil.test/x", false},
		{"registry.example**", "registry.example:5000/x", false},
		{"registry.example**/**", "registry.example.evil.test/x", false},
		{"registry.example*/**", "registry.example.evil.test/x", false},
		{"registry.example*/**", "registry.example:5000/x", false},
		{"registry.example/**", "registry.example.evil.test/x", false},
		{"registry.*/**", "registry.example/x", true},
		{"registry.*/**", "registry.evil.test/x", false},
		{"*.example/**", "a.example/x", true},
		{"*.example/**", "a.b.example/x", false},
		{"*.example/**", "evil.test/a.example/x", false},
		{"*example/x", "evil.test/example/x", false},
		{"*", "registry.example/x", false},
		{"*/*", "registry.example/x/y", false},
		{"*/*", "registry.example/x", true},

		// Ports, case, literal addresses, Docker Hub.
		{"registry.example:5000/*", "registry.example:5000/x", true},
		{"registry.example:5000/*", "registry.example/x", false},
		{"registry.example:*/*", "registry.example:5000/x", true},
		{"registry.example:*/*", "registry.example/x", false},
		{"localhost/*", "localhost/x", true},
		{"localhost**", "localhost/x/y", true},
		{"Registry.Example/*", "registry.example/x", true},
		{"registry.example/*", "REGISTRY.example/x", true},
		{"[::1]:5000/*", "[::1]:5000/x", true},
		{"[::1]:5000/*", "[::2]:5000/x", false},
		{"docker.io/library/*", "debian:12", true},
		{"debian", "docker.io/library/debian:12", true},
		{"debian", "debian", true},
		{"debian", "registry.example/debian", false},
		{"debian", "team/debian", false},
		{"docker.io/debian", "debian", true},
		{"docker.io/**", "team/app", true},
		{"index.docker.io/team/*", "docker.io/team/app", true},
		{"team/*", "team/app:v1", true},
		{"team/*", "registry.example/team/app:v1", false},

		// Tags and digests.
		{"registry.example/app:v1", "registry.example/app:v1", true},
		{"registry.example/app:v1", "registry.example/app:v2", false},
		{"registry.example/app:v1", "registry.example/app", false},
		{"registry.example/app:latest", "registry.example/app", true},
		{"registry.example/app:v1.*", "registry.example/app:v1.2", true},
		{"registry.example/app:v1**", "registry.example/app:v1.2", true},
		{"registry.example/app:v1", "registry.example/app:v1" + digest, false},
		{"registry.example/app:*", "registry.example/app" + digest, false},
		{"registry.example/app", "registry.example/app" + digest, true},
		{"registry.example/app" + digest, "registry.example/app" + digest, true},
		{"registry.example/app" + digest, "registry.example/app:v1" + digest, true},
		{"registry.example/app" + digest, "registry.example/app", false},
		{"registry.example:5000/app:v1", "registry.example:5000/app:v1", true},

		{"oci:/srv/*", "oci:/srv/app:v1", true},
		{"oci:/srv/*", "oci:/srv/..", false},
		{"oci:/srv/*", "oci:/srv/a/b", false},
		{"oci:/srv/*", "oci:/srv", false},
		{"oci:/srv/**", "oci:/srv/a/b:v1", true},
		{"oci:/srv/**", "oci:/srv/a/../../etc", false},
		{"oci:/srv/**", "oci:/srv2/a", false},
		{"oci:/srv/app", "oci:/srv//app/", true},
		{"oci:/srv/app:v1", "oci:/srv/app:v1", true},
		{"oci:/srv/app:v1", "oci:/srv/app:v2", false},
		{"oci:/srv/app:v1", "oci:/srv/app", false},
		{"oci:/srv/app" + digest, "oci:/srv/app" + digest, true},
		{"registry.example/**", "oci:registry.example/x", false},
	} {
		if got := (Allow{c.pattern}).Match(c.name); got != c.want {
			t.Errorf("%q allows %q: %v", c.pattern, c.name, got)
		}
		if err := (Allow{c.pattern}).Check(); err != nil {
			t.Errorf("%q: %v", c.pattern, err)
		}
	}
	for _, bad := range []string{"a[", "registry.example/a[", "re[/x", "", "registry.example/", "oci:", "oci:/srv/../etc", "registry.example/**/x",
		"registry.example/app@sha256:12"} {
		if (Allow{bad}).Check() == nil || (Allow{bad}).Match("registry.example/a") {
			t.Errorf("the malformed pattern %q is accepted", bad)
		}
	}
}

// A directory counts as where it is, not as how it is called.
func TestPatternsFollowLinks(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"allowed/app", "secret/app"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{
		"allowed/out": "../secret/app", "allowed/up": "..", "allowed/far": filepath.Join(dir, "secret"), "allowed/in": "app",
		"door": "allowed", "allowed/nowhere": "../secret/none", "allowed/round": "round",
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	for _, pattern := range []string{"oci:" + dir + "/allowed/**", "oci:" + dir + "/door/**", "oci:allowed/**", "oci:./door/**"} {
		for name, want := range map[string]bool{
			dir + "/allowed/app": true, dir + "/allowed/in:v1": true, dir + "/door/app": true, "allowed/app": true, "./allowed/app": true,
			dir + "/allowed/out": false, dir + "/allowed/up/secret/app": false, dir + "/allowed/far/app": false, dir + "/secret/app": false,
			dir + "/door/out": false, dir + "/allowed/nowhere": false, dir + "/allowed/round": false, dir + "/allowed": false,
			dir + "/allowed/none": true,
		} {
			if got := (Allow{pattern}).Match("oci:" + name); got != want {
				t.Errorf("%q allows %q: %v", pattern, name, got)
			}
		}
	}
}
