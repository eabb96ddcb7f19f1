package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"thaw/bench"
)

// insideVerb makes this program what the guest runs.
const insideVerb = "inside"

const (
	dataDir  = "/data" // a disk
	image    = "oci:" + dataDir + "/image:bench"
	cache    = dataDir + "/cache"
	flatFile = dataDir + "/flat" // the device's bytes, for the peers to read

	// writtenMiB are written to, and were written before the first round.
	writtenMiB = 16
)

// inside measures all rows, and says the rounds on the console.
func inside(ctx context.Context, args []string) error {
	var o options
	f := flag.NewFlagSet(insideVerb, flag.ContinueOnError)
	o.flags(f)
	if err := f.Parse(args); err != nil {
		return err
	}
	g := &inGuest{options: o, rec: bench.NewRecorder(console{})}
	defer g.close()
	for _, s := range strings.Split(o.sides, ",") {
		if !slices.Contains(allSides, s) {
			return fmt.Errorf("unknown side %q: want some of %s", s, strings.Join(allSides, ","))
		}
		g.sides = append(g.sides, &nodes{side: s})
	}
	if err := g.begin(ctx); err != nil {
		return err
	}
	for _, r := range rows {
		if !o.wanted(r.name) {
			continue
		}
		if err := g.alternate(ctx, func(ctx context.Context, n *nodes) error { return g.load(ctx, r, n) }); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	if !o.wanted(attachRow) {
		return nil
	}
	err := g.alternate(ctx, func(ctx context.Context, n *nodes) error {
		if err := g.timeAttach(ctx, n.side); err != nil || n.side != thawUBLK {
			return err
		}
		return g.timeAttach(ctx, thawCommand)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", attachRow, err)
	}
	return nil
}

// console writes lines that the host hears.
type console struct{}

func (console) Write(p []byte) (int, error) {
	for line := range bytes.Lines(p) {
		if _, err := fmt.Printf("guest 0 %s\n", bytes.TrimSpace(line)); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

type inGuest struct {
	options
	rec     *bench.Recorder
	sides   []*nodes
	servers []*exec.Cmd
	spare   int // number of the next nbd device for nbd-client
}

// nodes are those of a side: one to read, and one to write.
type nodes struct{ side, read, write string }

func (g *inGuest) alternate(ctx context.Context, do func(context.Context, *nodes) error) error {
	sides := make([]func(context.Context, int) error, len(g.sides))
	for i, n := range g.sides {
		sides[i] = func(ctx context.Context, _ int) error {
			if err := do(ctx, n); err != nil {
				return fmt.Errorf("%s: %w", n.side, err)
			}
			return nil
		}
	}
	return bench.Alternate(ctx, g.rounds, sides...)
}

// begin starts the servers and makes the nodes.
func (g *inGuest) begin(ctx context.Context) error {
	// The flat file, and all of thaw's cache, come from a node that stays: thaw's server
	// ends with the last one.
	node, err := thawAttach(ctx, "--driver", "ublk")
	if err != nil {
		return err
	}
	if g.offset, err = copyDevice(node, flatFile); err != nil {
		return err
	}
	g.offset -= int64(g.sizeMiB) << 20
	g.spare = 7 // the kernel gives thaw the lowest ones, and timeAttach uses this one
	for _, n := range g.sides {
		if n.read, err = g.attach(ctx, n.side, false); err == nil {
			n.write, err = g.attach(ctx, n.side, true)
		}
		if err == nil && g.wanted("4k-write-fsync") {
			_, err = g.fio(ctx, bench.FioJob{BS: "1M", RW: "write", Depth: 1, Offset: g.offset, Size: writtenMiB << 20}, n.write)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", n.side, err)
		}
	}
	return nil
}

func (g *inGuest) close() {
	for _, s := range g.servers {
		s.Process.Kill()
		s.Wait()
	}
}

// thawAttach runs thaw attach, and returns the node.
func thawAttach(ctx context.Context, args ...string) (string, error) {
	return bench.Output(exec.CommandContext(ctx, "thaw", append([]string{"attach", image, "--cache", cache}, args...)...))
}

// copyDevice copies a node to a sparse file, and returns where its content ends.
func copyDevice(node, file string) (end int64, err error) {
	in, err := os.Open(node)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.Create(file)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	p, zero := make([]byte, 1<<20), make([]byte, 4096)
	var at int64
	for ; ; at += int64(len(p)) {
		n, err := io.ReadFull(in, p)
		for i := 0; i+4096 <= n; i += 4096 {
			if bytes.Equal(p[i:i+4096], zero) {
				continue
			}
			end = at + int64(i) + 4096
			if _, err := out.WriteAt(p[i:i+4096], at+int64(i)); err != nil {
				return 0, err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return end, out.Truncate(at + int64(n))
		}
		if err != nil {
			return 0, err
		}
	}
}

// attach makes a node of a side that lasts as long as the guest. The first call for a peer
// and a mode starts its server.
func (g *inGuest) attach(ctx context.Context, side string, writable bool) (string, error) {
	if driver, queues, ok := thawSide(side); ok {
		args := []string{"--driver", driver}
		if queues > 0 {
			args = append(args, "--queues", fmt.Sprint(queues))
		}
		if writable {
			args = append(args, "--overlay", filepath.Join(dataDir, "overlay-"+side))
		}
		return thawAttach(ctx, args...)
	}
	file := flatFile
	if writable {
		file = filepath.Join(dataDir, "written-"+side)
		f, err := os.Create(file)
		if err == nil {
			err = errors.Join(f.Truncate(g.offset+writtenMiB<<20), f.Close())
		}
		if err != nil {
			return "", err
		}
	}
	if side == loop {
		node := "/dev/loop0"
		if writable {
			node = "/dev/loop1"
		}
		return node, setLoop(ctx, node, file, writable)
	}
	if err := g.startPeer(ctx, side, file, writable); err != nil {
		return "", err
	}
	g.spare++
	node := fmt.Sprint("/dev/nbd", g.spare)
	return node, nbdClient(ctx, side, peerSocket(side, writable), node)
}

// setLoop makes a loop device of a file, in the page cache as all are.
func setLoop(ctx context.Context, node, file string, writable bool) error {
	args := []string{node, file}
	if !writable {
		args = append([]string{"-r"}, args...)
	}
	_, err := bench.Output(exec.CommandContext(ctx, "losetup", args...))
	return err
}

// thawSide is the driver of a side of thaw, and its connections or queues; 0 for the default.
func thawSide(side string) (driver string, queues int, ok bool) {
	switch side {
	case thawUBLK:
		return "ublk", 0, true
	case thawNBD1:
		return "nbd", 1, true
	case thawNBD4:
		return "nbd", 4, true
	}
	return "", 0, false
}

func peerSocket(side string, writable bool) string {
	return fmt.Sprintf("/tmp/%s-%t.sock", side, writable)
}

// startPeer starts the server of a peer for a file.
func (g *inGuest) startPeer(ctx context.Context, side, file string, writable bool) error {
	sock := peerSocket(side, writable)
	args := []string{"nbdkit", "-f", "--unix", sock, "file", file}
	if strings.HasPrefix(side, "qemu") {
		args = []string{"qemu-nbd", "-f", "raw", "--aio=io_uring", "-t", "-e", "16", "-k", sock, file}
	}
	if !writable {
		args = slices.Insert(args, 1, "-r")
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	g.servers = append(g.servers, cmd)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return errors.New("its server does not listen within 20 s")
		}
	}
}

// nbdClient connects a device of the kernel to a server, as the side says.
func nbdClient(ctx context.Context, side, sock, node string) error {
	connections := side[len(side)-1:]
	_, err := bench.Output(exec.CommandContext(ctx, "nbd-client", "-unix", sock, node, "-C", connections))
	return err
}

func (g *inGuest) fio(ctx context.Context, j bench.FioJob, node string) (*bench.FioResult, error) {
	return bench.Fio(ctx, append(j.Args(), "--ioengine=libaio", "--direct=1", "--filename="+node)...)
}

// load is one run of fio.
func (g *inGuest) load(ctx context.Context, r row, n *nodes) error {
	j := bench.FioJob{BS: r.bs, RW: r.rw, Depth: r.depth, Jobs: r.jobs, Offset: g.offset, Size: int64(g.sizeMiB) << 20, Runtime: g.runtime, Fsync: r.fsync}
	node := n.read
	if strings.Contains(r.rw, "write") {
		node, j.Size = n.write, writtenMiB<<20
	} else {
		j.More = []string{"--readonly"}
	}
	res, err := g.fio(ctx, j, node)
	if err != nil {
		return err
	}
	return g.rec.Add(name(r.name, n.side),
		bench.Measure{Value: 1e9 / max(res.IOPS, 1), Unit: bench.Wall}, bench.Measure{Value: res.IOPS, Unit: iops},
		bench.Measure{Value: res.Bandwidth, Unit: bandwidth}, bench.Measure{Value: res.P99, Unit: p99})
}

// timeAttach attaches a node like the one that a side has to read, reads from it, and
// detaches it. All servers are running.
func (g *inGuest) timeAttach(ctx context.Context, side string) error {
	began := time.Now()
	node, detach, err := g.makeNode(ctx, side)
	if err != nil {
		return err
	}
	if err := readFirst(node); err != nil {
		return errors.Join(err, detach())
	}
	attached := time.Since(began)
	began = time.Now()
	if err := detach(); err != nil {
		return err
	}
	return g.rec.Add(name(attachRow, side), bench.Measure{Value: float64(attached), Unit: bench.Wall}, bench.Measure{Value: float64(time.Since(began)), Unit: detachNS})
}

func (g *inGuest) makeNode(ctx context.Context, side string) (node string, detach func() error, err error) {
	command := func(args ...string) func() error {
		return func() error {
			_, err := bench.Output(exec.CommandContext(ctx, args[0], args[1:]...))
			return err
		}
	}
	if side == thawCommand {
		node, err = thawAttach(ctx, "--driver", "ublk")
		return node, command("thaw", "detach", node, "--cache", cache), err
	}
	if driver, queues, ok := thawSide(side); ok {
		return requestNode(ctx, driver, queues)
	}
	if side == loop {
		const free = "/dev/loop7"
		return free, command("losetup", "-d", free), setLoop(ctx, free, flatFile, false)
	}
	const free = "/dev/nbd7"
	return free, command("nbd-client", "-d", free), nbdClient(ctx, side, peerSocket(side, false), free)
}

// readFirst reads 4 KiB of a node from its server.
func readFirst(node string) error {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: node, Err: err}
	}
	defer unix.Close(fd)
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(p) }()
	if _, err := unix.Pread(fd, p, 0); err != nil {
		return &os.PathError{Op: "read", Path: node, Err: err}
	}
	return nil
}

// requestNode has thaw's server attach a node, by the control API, as the command does.
func requestNode(ctx context.Context, driver string, queues int) (node string, detach func() error, err error) {
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(cache, "control.sock"))
	}}}
	ask := func(method, path string, in, out any) error {
		body, err := json.Marshal(in)
		if err != nil {
			return err
		}
		r, err := http.NewRequestWithContext(ctx, method, "http://thaw"+path, bytes.NewReader(body))
		if err != nil {
			return err
		}
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode >= 300 {
			return errors.Join(err, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text))
		}
		if out == nil {
			return nil
		}
		return json.Unmarshal(text, out)
	}
	var n struct{ ID, Node string }
	err = ask("POST", "/v1/nodes", map[string]any{"image": image, "driver": driver, "queues": queues}, &n)
	return n.Node, func() error {
		defer client.CloseIdleConnections()
		return ask("DELETE", "/v1/nodes/"+n.ID, nil, nil)
	}, err
}
