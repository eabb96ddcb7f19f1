package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// keychain makes Credentials of a keychain, as a program does.
func keychain(k authn.Keychain) Credentials {
	return func(ctx context.Context, registry, repository string) (Login, error) {
		a, err := authn.Resolve(ctx, k, resource{registry, repository})
		if err != nil {
			return Login{}, err
		}
		c, err := authn.Authorization(ctx, a)
		if err != nil {
			return Login{}, err
		}
		return Login{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken}, nil
	}
}

type resource struct{ registry, repository string }

func (r resource) String() string      { return r.registry + "/" + r.repository }
func (r resource) RegistryStr() string { return r.registry }

// The docker config, with a credential helper that it names, at a registry whose
// password changes during reads.
func TestDockerConfig(t *testing.T) {
	ctx := context.Background()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", home)
	t.Setenv("PATH", home+":"+os.Getenv("PATH"))
	write := func(name, s string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(home, name), []byte(s), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	file := htpasswd(t, "one")
	addr := dockerRegistry(t, "auth: {htpasswd: {realm: test, path: "+file+"}}")
	for _, x := range []struct {
		name string
		set  func(password string)
	}{
		{"config", func(password string) {
			auth := base64.StdEncoding.EncodeToString([]byte("alice:" + password))
			write("config.json", fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, addr, auth))
		}},
		{"helper", func(password string) {
			write("config.json", fmt.Sprintf(`{"credHelpers":{%q:"thaw-test"}}`, addr))
			write("docker-credential-thaw-test", fmt.Sprintf("#!/bin/sh\ncat >/dev/null\n"+
				`echo '{"ServerURL":"%s","Username":"alice","Secret":"%s"}'`+"\n", addr, password))
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			setPassword(t, file, "one")
			x.set("one")
			r := openRepo(t, newClient(t, Options{Credentials: keychain(authn.DefaultKeychain)}), addr+"/app:v1")
			layer := noise(10_000, 1)
			_, l := pushImage(t, ctx, r, "v1", layer, amd64)
			setPassword(t, file, "another")
			if _, err := readRange(ctx, r, l.Digest, 0, 10); !errors.Is(err, ErrUnauthorized) {
				t.Errorf("with the old password: %v", err)
			}
			x.set("another")
			if b, err := readRange(ctx, r, l.Digest, 0, 10); err != nil || !bytes.Equal(b, layer[:10]) {
				t.Errorf("with the new password: %v", err)
			}
		})
	}
}
