package main

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Clients open what they name, if it is allowed; others learn nothing.
func TestOpenByReference(t *testing.T) {
	t.Parallel()
	need(t, "qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
	reg := startRegistry(t, "", t.TempDir(), "")
	one, two, secret := reg.addr+"/team/one:v1", reg.addr+"/team/two:v1", reg.addr+"/other/app:v1"
	for i, ref := range []string{one, two, secret} {
		push(t, ref, imageOf(t, layerOf(t, files(uint64(i), "a", 5)...)))
		must(t, "build", "--size", "64M", ref)
	}
	plain := reg.addr + "/team/plain:v1"
	push(t, plain, imageOf(t, layerOf(t, files(9, "a", 2)...)))
	sock := socket(t)
	s := serving(t, "--allow", reg.addr+"/team/*", "--listen", "unix:"+sock, "--cache", t.TempDir())
	uri := func(ref string) string { return "nbd+unix:///" + ref + "?socket=" + sock }
	if out := tool(t, "qemu-img", "info", uri(one)); !strings.Contains(out, "64 MiB") {
		t.Error(out)
	}
	tool(t, "nbdcopy", uri(two), "null:")
	for _, ref := range []string{secret, reg.addr + "/team/none:v1", plain, "oci:/etc", reg.addr + "/team/../other", ""} {
		// ERR_UNKNOWN is "No such file or directory" to libnbd.
		out, err := exec.Command("nbdinfo", uri(ref)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "No such file or directory") {
			t.Errorf("%q: %v\n%s", ref, err, out)
		}
	}
	if !s.said("make one with: thaw build " + plain) {
		t.Errorf("the log does not say what to do for an image that has no block image:\n%s", s.stderr.String())
	}
	// LIST shows what is open.
	hold := exec.Command("qemu-io", "-r", "-f", "raw", uri(one))
	in, err := hold.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "read 0 512\n"); err != nil {
		t.Fatal(err)
	}
	for r := bufio.NewReader(out); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, "read 512/512") {
			break
		}
	}
	list := tool(t, "nbdinfo", "--list", "--no-content", "nbd+unix:///?socket="+sock)
	if !strings.Contains(list, one) || strings.Contains(list, two) {
		t.Errorf("one is open, and two is not any more:\n%s", list)
	}
	in.Close()
	hold.Wait()
}

// certificate makes a key and a certificate of name, signed by the authority
// or, without one, itself an authority.
func certificate(t *testing.T, dir, file, name string, key crypto.Signer, ca *x509.Certificate, caKey crypto.Signer) *x509.Certificate {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: ca == nil,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, parentKey := ca, caKey
	if ca == nil {
		parent, parentKey = c, key
		c.ExtKeyUsage = nil
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for suffix, block := range map[string]*pem.Block{"-cert.pem": {Type: "CERTIFICATE", Bytes: der}, "-key.pem": {Type: "PRIVATE KEY", Bytes: b}} {
		if err := os.WriteFile(filepath.Join(dir, file+suffix), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func newECDSA(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Over TLS, clients that show a certificate of the right name are served;
// others are not, and nobody without TLS.
func TestTLS(t *testing.T) {
	need(t, "nbdinfo")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", imageOf(t, layerOf(t, files(1, "a", 3)...)))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	caKey, serverKey := newECDSA(t), newECDSA(t)
	ca := certificate(t, dir, "ca", "test authority", caKey, nil, nil)
	certificate(t, dir, "server", "localhost", serverKey, ca, caKey)
	client := func(name string, key crypto.Signer) string {
		d := t.TempDir()
		certificate(t, d, "client", name, key, ca, caKey)
		b, err := os.ReadFile(dir + "/ca-cert.pem")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d+"/ca-cert.pem", b, 0o600); err != nil {
			t.Fatal(err)
		}
		return d
	}
	s := serving(t, image, "--listen", "tcp:127.0.0.1:0", "--cache", dir+"/cache", "--tls-cert", dir+"/server-cert.pem",
		"--tls-key", dir+"/server-key.pem", "--tls-client-ca", dir+"/ca-cert.pem", "--client", "host-7.example")
	addr := strings.TrimPrefix(s.ready.Listen[0], "tcp:")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	// Both kinds of key: to GnuTLS they are not alike.
	for _, key := range []crypto.Signer{newECDSA(t), rsaKey} {
		if out := tool(t, "nbdinfo", "nbds://"+addr+"/?tls-certificates="+client("host-7.example", key)); !strings.Contains(out, "TLS") {
			t.Error(out)
		}
	}
	for what, uri := range map[string]string{
		"another name": "nbds://" + addr + "/?tls-certificates=" + client("host-8.example", newECDSA(t)),
		"no TLS":       "nbd://" + addr + "/",
	} {
		if out, err := exec.Command("nbdinfo", uri).CombinedOutput(); err == nil {
			t.Errorf("a client with %s is served:\n%s", what, out)
		}
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--tls-key", "x"}, "TLS needs a --tls-cert"},
		{[]string{"--client", "x"}, "TLS needs a --tls-cert"},
		{[]string{"--tls-cert", dir + "/server-cert.pem", "--tls-key", dir + "/server-key.pem", "--client", "x"}, "needs a --tls-client-ca"},
		{[]string{"--tls-cert", dir + "/none.pem", "--tls-key", dir + "/none.pem"}, "none.pem"},
		{[]string{"--tls-cert", dir + "/server-cert.pem", "--tls-key", dir + "/server-key.pem", "--tls-client-ca", dir + "/server-key.pem"}, "no certificate"},
		{[]string{"--tls-cert", dir + "/server-cert.pem", "--tls-key", dir + "/server-key.pem", "--tls-optional", "--listen", "tcp:0.0.0.0:0"}, "--allow-plaintext"},
		{[]string{"--allow", "a["}, "--allow"},
	} {
		if _, stderr, code := thaw(t, append([]string{"serve", image, "--cache", dir + "/other"}, c.args...)...); code == exitOK || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, %s", c.args, code, stderr)
		}
	}
}
