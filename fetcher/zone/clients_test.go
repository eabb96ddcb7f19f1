package zone

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"thaw/blockmap"
)

// getSigned is get that is told of each sign of life.
func getSigned(t testing.TB, url string, sign func()) (code int, body []byte) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		if code == http.StatusProcessing {
			sign()
		}
		return nil
	}})
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Error(err)
		return 0, nil
	}
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Error(err)
		return 0, nil
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return resp.StatusCode, body
}

func address(a string) memberlist.Address { return memberlist.Address{Addr: a} }

// cutFiles cuts the data files of a cache short.
func cutFiles(t testing.TB, s *testStore) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "streams", "*", "data"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, f := range files {
		if err := os.Truncate(f, 4096); err != nil {
			t.Fatal(err)
		}
	}
}

func discard(ctx context.Context, c *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		return fmt.Errorf("it answers %s", resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// A foreign client gets chunks over HTTP/1.1, and with a certificate over HTTP/2.
func TestCurl(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	curl := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--max-time", "50", "-w", "\n%{http_version} %{http_code}"}, args...)...).Output()
		return string(out), err
	}
	s := newTestStore(t, blockmap.CacheOptions{})
	plain := open(t, Options{Store: s})
	want := string(s.part(0, last))
	if out, err := curl(plain.chunksURL(s, 0, last, "")); err != nil || out != want+"\n1.1 200" {
		t.Errorf("HTTP/1.1: %v, %d bytes: %.100q", err, len(out), out)
	}
	if out, err := curl("-I", plain.chunksURL(s, 0, last, "")); err != nil || !strings.Contains(out, "405") {
		t.Errorf("HEAD: %v, %.100q", err, out)
	}

	ca := newAuthority(t)
	z := open(t, secure(ca.credentials("host-1.example"), Options{Store: s}))
	cert, key := ca.issue("peer-1")
	url := strings.Replace(z.chunksURL(s, 0, last, ""), "http://"+z.Addr(), "https://host-1.example:"+port(z), 1)
	to := []string{"--cacert", ca.ca(), "--connect-to", "host-1.example:" + port(z) + ":" + z.Addr(), "--tlsv1.3"}
	with := append([]string{"--cert", cert, "--key", key}, to...)
	if out, err := curl(append(with, "--http2", url)...); err != nil || out != want+"\n2 200" {
		t.Errorf("HTTP/2: %v, %d bytes: %.100q", err, len(out), out)
	}
	if out, err := curl(append(with, "--http1.1", url)...); err != nil || out != want+"\n1.1 200" {
		t.Errorf("HTTP/1.1 with TLS: %v, %d bytes: %.100q", err, len(out), out)
	}
	if out, err := curl(append(with, "--tls-max", "1.2", url)...); err == nil {
		t.Errorf("TLS 1.2: %.100q", out)
	}
	if out, err := curl(append(to, url)...); err == nil {
		t.Errorf("without a certificate: %.100q", out)
	}
	if out, err := curl(append(with, strings.Replace(url, "from=peer-1", "from=peer-2", 1))...); err != nil || !strings.HasSuffix(out, "2 403") {
		t.Errorf("by another's name: %v, %.100q", err, out)
	}
}

func port(z *Zone) string { return z.Addr()[strings.LastIndexByte(z.Addr(), ':')+1:] }
