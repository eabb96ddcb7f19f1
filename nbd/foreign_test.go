package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// Foreign clients. Each test skips if its tool is missing; on Debian the tools are in
// libnbd-bin, python3-libnbd, qemu-utils, fio, nbd-client.

// tool returns a function that runs the tool and fails the test if the tool fails.
func tool(t testing.TB, name string) func(args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
	return func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.Dir = t.TempDir()
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
}

func uri(path string) string { return "nbd+unix:///disk?socket=" + path }

// foreign serves a device of a few MiB with holes. Half of it is absent, and each miss
// takes a short time.
func foreign(t testing.TB) (*blocktest.Memory, string) {
	dev := newPatternDevice(4 << 20)
	dev.Punch(blockmap.Range(300*blockmap.BlockSize, 200*blockmap.BlockSize))
	dev.Evict(blockmap.Range(1<<20, 2<<20))
	dev.OnFault = func(context.Context, blockmap.Extent) error {
		time.Sleep(time.Millisecond)
		return nil
	}
	t.Cleanup(func() { dev.NoPins(t) })
	return dev, serveDevice(t, Export{Device: dev, Description: "a test"})
}

func TestNbdinfo(t *testing.T) {
	nbdinfo := tool(t, "nbdinfo")
	dev, path := foreign(t)

	var info struct {
		Exports []map[string]any
	}
	if err := json.Unmarshal([]byte(nbdinfo("--json", uri(path))), &info); err != nil || len(info.Exports) != 1 {
		t.Fatalf("%v: %v", info, err)
	}
	e := info.Exports[0]
	for k, want := range map[string]any{
		"export-name": "disk", "description": "a test", "export-size": float64(dev.Size()),
		"is_read_only": false, "can_multi_conn": true, "can_df": true, "can_cache": true, "can_flush": true,
		"can_fua": true, "can_trim": true, "can_zero": true, "can_fast_zero": true,
		"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(maxPayload),
	} {
		if e[k] != want {
			t.Errorf("%s is %v, want %v", k, e[k], want)
		}
	}
	if out := nbdinfo("--list", "nbd+unix:///?socket="+path); !strings.Contains(out, `export="disk"`) || !strings.Contains(out, "x-thaw:resident") {
		t.Errorf("--list: %s", out)
	}

	// The maps, extent by extent.
	for name, is := range map[string]func(st blockmap.Status) bool{
		"base:allocation": func(st blockmap.Status) bool { return st.Zero },
		"x-thaw:resident": func(st blockmap.Status) bool { return st.Zero || st.Resident },
	} {
		var got []struct{ Offset, Length, Type int64 }
		if err := json.Unmarshal([]byte(nbdinfo("--json", "--map="+name, uri(path))), &got); err != nil {
			t.Fatal(err)
		}
		end := int64(0)
		for _, x := range got {
			for off := x.Offset; off < x.Offset+x.Length; off += 4096 {
				if is(dev.Status(blockmap.Range(off, 4096))) != (x.Type != 0) {
					t.Fatalf("%s: block at %d is of type %d", name, off, x.Type)
				}
			}
			end = x.Offset + x.Length
		}
		if end != dev.Size() {
			t.Errorf("%s: ends at %d", name, end)
		}
	}
}

func TestNbdcopy(t *testing.T) {
	nbdcopy := tool(t, "nbdcopy")
	dev, path := foreign(t)
	file := filepath.Join(t.TempDir(), "copy")
	nbdcopy(uri(path), file)
	same(t, file, dev)

	// And back, into an empty device, over several connections.
	dst := blocktest.NewMemory(dev.Size())
	to := serveDevice(t, Export{Device: dst})
	nbdcopy("--connections=4", "--flush", file, uri(to))
	same(t, file, dst)
	if dirty := dst.Dirty(); dirty != 0 {
		t.Errorf("%d writes are not flushed", dirty)
	}
	// From server to server.
	dst = blocktest.NewMemory(dev.Size())
	to = serveDevice(t, Export{Device: dst})
	nbdcopy("--destination-is-zero", uri(path), uri(to))
	same(t, file, dst)
}

// same fails t unless the file has the content of the device.
func same(t testing.TB, file string, dev *blocktest.Memory) {
	t.Helper()
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, dev.Content(blockmap.Range(0, dev.Size()))) {
		t.Error("the copy differs")
	}
}

func TestNbdsh(t *testing.T) {
	// Debian's bindings belong to Debian's python.
	python := tool(t, "/usr/bin/python3")
	if exec.Command("/usr/bin/python3", "-c", "import nbd").Run() != nil {
		t.Skip("python3-libnbd is not installed")
	}
	dev, path := foreign(t)
	out := python("-c", `
import nbd, sys, errno
uri = sys.argv[1]
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("x-thaw:resident")
h.connect_uri(uri)
assert h.get_size() == 4 << 20
assert h.can_meta_context("x-thaw:resident")

# errors and the life after them
for f, want in ((lambda: h.pread(1, 4 << 20), "EINVAL"), (lambda: h.trim(2, (4 << 20) - 1), "EINVAL")):
    h.set_strict_mode(0)
    try:
        f()
        assert False
    except nbd.Error as e:
        assert e.errno == want, e
try:
    h.pwrite(b"xx", (4 << 20) - 1)
    assert False
except nbd.Error as e:
    assert e.errno == "ENOSPC", e

# many at once, out of order
bufs = []
for i in range(256):
    b = nbd.Buffer(16384)
    bufs.append((h.aio_pread(b, i * 16384), b))
while h.aio_in_flight() > 0:
    h.poll(-1)
data = b""
for c, b in bufs:
    assert h.aio_command_completed(c)
    data += bytes(b.to_bytearray())
assert h.pread(4 << 20, 0) == data
open("data", "wb").write(data)

# chunks and DF
kinds = []
def chunk(buf, off, st, err):
    kinds.append(st)
h.pread_structured(8 * 4096, 0, chunk)
assert kinds == [nbd.READ_DATA, nbd.READ_HOLE] * 2, kinds
kinds.clear()
h.pread_structured(8 * 4096, 0, chunk, nbd.CMD_FLAG_DF)
assert kinds == [nbd.READ_DATA], kinds

# writing commands
h.pwrite(b"a" * 65536, 4096, nbd.CMD_FLAG_FUA)
h.zero(8192, 8192, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4096, 16384, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 4096) == b"a" * 4096 + bytes(12288) + b"a" * 49152
try:
    h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    assert False
except nbd.Error as e:
    assert e.errno in ("EOPNOTSUPP", "ENOTSUP"), e
h.trim(4096, 4096)
h.cache(1 << 20, 0)
h.flush()

# block status
got = {}
def extent(metacontext, offset, e, err):
    got[metacontext] = e
h.block_status(4 << 20, 0, extent)
assert set(got) == {"base:allocation", "x-thaw:resident"}
assert sum(got["base:allocation"][::2]) == 4 << 20
h.block_status(4 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(got["base:allocation"]) == 2
h.shutdown()

# EXPORT_NAME and simple replies
h = nbd.NBD()
h.set_handshake_flags(0)
h.set_request_structured_replies(False)
h.set_export_name("disk")
h.connect_uri(uri)
assert h.get_size() == 4 << 20 and not h.get_structured_replies_negotiated()
assert h.pread(4096, 4096) == bytes(4096)
h.shutdown()

# a name that is not there, then another on the same connection
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.set_export_name("nothing")
try:
    h.opt_go()
    assert False
except nbd.Error as e:
    assert e.errno == "ENOENT", e
h.set_export_name("disk")
names = []
h.opt_list(lambda n, d: names.append(n))
assert names == ["disk"], names
h.opt_info()
h.opt_go()
assert h.pread(1, 0)
h.shutdown()
print("done", end="")
`, uri(path))
	if out != "done" {
		t.Error(out)
	}
	if st := dev.Status(blockmap.Range(4096, 4096)); !st.Zero {
		t.Error("TRIM left no hole")
	}
}

func TestQemuImg(t *testing.T) {
	qemu := tool(t, "qemu-img")
	dev, path := foreign(t)
	var info map[string]any
	if err := json.Unmarshal([]byte(qemu("info", "--output=json", uri(path))), &info); err != nil || info["virtual-size"] != float64(dev.Size()) {
		t.Errorf("info: %v, %v", info, err)
	}
	file := filepath.Join(t.TempDir(), "copy")
	qemu("convert", "-f", "raw", "-O", "raw", uri(path), file)
	same(t, file, dev)
	qemu("compare", "-f", "raw", "-F", "raw", uri(path), file)
	if out := qemu("map", "--output=json", "-f", "raw", uri(path)); !strings.Contains(out, `"zero": true`) {
		t.Errorf("map: %s", out)
	}

	dst := blocktest.NewMemory(dev.Size())
	to := serveDevice(t, Export{Device: dst})
	qemu("convert", "-n", "-f", "raw", "-O", "raw", file, uri(to))
	same(t, file, dst)
	qemu("bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "4k", "-w", "--flush-interval=100", uri(to))
	qemu("bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "64k", uri(to))
}

func TestQemuIO(t *testing.T) {
	qemu := tool(t, "qemu-io")
	dev, path := foreign(t)
	out := qemu("-f", "raw",
		"-c", "write -P 0x5a 4096 128k", "-c", "read -P 0x5a 4096 128k",
		"-c", "write -f -P 0xa5 1000 3000", "-c", "read -P 0xa5 1000 3000",
		"-c", "write -z 8192 64k", "-c", "read -P 0 8192 64k",
		"-c", "write -z -u 8192 64k", "-c", "discard 0 64k",
		"-c", "aio_write -P 1 1M 1M", "-c", "aio_write -P 2 2M 1M", "-c", "aio_flush",
		"-c", "read -P 1 1M 1M", "-c", "read -P 2 2M 1M", "-c", "flush", uri(path))
	if regexp.MustCompile(`(?i)fail|error`).MatchString(out) {
		t.Error(out)
	}
	if dev.Dirty() != 0 {
		t.Error("dirty after flush")
	}

	ro := serveDevice(t, Export{Device: readOnly{dev}})
	cmd := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 1M 1M", uri(ro))
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("fail")) {
		t.Errorf("read-only: %v %s", err, out)
	}
	cmd = exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", uri(ro))
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("writing to a read-only export: %s", out)
	}
}

func TestFio(t *testing.T) {
	fio := tool(t, "fio")
	dev, path := foreign(t)
	for _, args := range [][]string{
		{"--rw=randwrite", "--bsrange=512-128k", "--iodepth=32"},
		{"--rw=randrw", "--bs=4k", "--iodepth=32", "--fsync=50"},
		{"--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"},
		{"--rw=randwrite", "--bs=4k", "--iodepth=16", "--numjobs=4", "--size=1m", "--offset_increment=1m"},
	} {
		args = append([]string{"--name=verify", "--ioengine=nbd", "--thread", "--uri=" + uri(path),
			"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--size=4m", "--output-format=terse"}, args...)
		fio(args...)
		dev.Evict(blockmap.Range(0, dev.Size()))
	}
}

func TestNbdClientList(t *testing.T) {
	list := tool(t, "nbd-client")
	_, path := foreign(t)
	if out := list("-l", "-unix", path); !strings.Contains(out, "disk") {
		t.Error(out)
	}
}

// TLS with client certificates, as libnbd and qemu use it over TCP.
func TestForeignTLS(t *testing.T) {
	nbdinfo := tool(t, "nbdinfo")
	p := newPKI(t)
	p.issue(t, "client", "host-7")
	dev := newPatternDevice(1 << 20)
	srv := &Server{TLSFunc: p.serverFunc(t), RequireTLS: true, Exports: Static{{Name: "disk", Device: dev, Clients: []string{"host-7"}}}}
	l, err := Listen(t.Context(), "tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, l)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	u := "nbds://localhost:" + port + "/disk?tls-certificates=" + p.dir
	if out := nbdinfo(u); !strings.Contains(out, "with TLS") {
		t.Error(out)
	}
	file := filepath.Join(t.TempDir(), "copy")
	tool(t, "nbdcopy")(u, file)
	same(t, file, dev)
	tool(t, "qemu-img")("compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+p.dir,
		"--image-opts", "driver=nbd,host=localhost,port="+port+",export=disk,tls-creds=tls0", "driver=raw,file.driver=file,file.filename="+file)
	if out, err := exec.Command("nbdinfo", "nbd://localhost:"+port+"/disk").CombinedOutput(); err == nil {
		t.Errorf("without TLS: %s", out)
	}
}
