package stargz

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"thaw/bench"
)

// control runs containerd's client with stargz's commands, and returns its
// stdout.
func (h *Host) control(ctx context.Context, args ...string) (string, error) {
	return bench.Output(h.enter(ctx, "ctr-remote", append([]string{"--address", h.file("containerd.sock"), "--namespace", h.namespace}, args...)...))
}

// Convert converts an image of the registry to eStargz, and pushes the result.
// It marks no file for prefetching.
func (h *Host) Convert(ctx context.Context, from, to string) error {
	return h.convert(ctx, from, to, "image", "convert", "--oci", "--estargz", from, to)
}

// Optimize is Convert after one run of a program: the files that the run reads
// come first in their layers, and are prefetched when those are mounted. It is
// to stargz what a trace is to thaw.
func (h *Host) Optimize(ctx context.Context, from, to string, program ...string) error {
	words, err := json.Marshal(program)
	if err != nil {
		return err
	}
	// The run is over when the program ends; the period, in seconds, only bounds it.
	return h.convert(ctx, from, to, "image", "optimize", "--oci", "--net-host", "--period", "120",
		"--env", environment[0], "--env", environment[1], "--entrypoint", string(words), "--args", "[]", from, to)
}

func (h *Host) convert(ctx context.Context, from, to string, command ...string) error {
	for _, command := range [][]string{
		{"content", "fetch", "--plain-http", from},
		command,
		{"images", "push", "--plain-http", to},
	} {
		if _, err := h.control(ctx, command...); err != nil {
			return fmt.Errorf("convert %s to eStargz: %w", from, err)
		}
	}
	return nil
}

// Pull makes an image ready to run: it mounts the layers without their contents.
func (h *Host) Pull(ctx context.Context, ref string) error {
	_, err := h.control(ctx, "images", "rpull", "--plain-http", ref)
	return err
}

// environment is that of [bench.Root.Run], without PATH, which the image sets.
var environment = []string{"HOME=/tmp", "LANG=C.UTF-8"}

// Exec runs a program of an image that was pulled, and returns its stdout. The
// container has the host's network and a /tmp in memory.
func (h *Host) Exec(ctx context.Context, ref string, program ...string) (out string, err error) {
	h.runs++
	id := fmt.Sprintf("run-%d", h.runs)
	args := []string{"run", "--rm", "--snapshotter", "stargz", "--net-host"}
	for _, at := range []string{"/tmp", "/var/tmp"} {
		args = append(args, "--mount", "type=tmpfs,src=tmpfs,dst="+at+",options=mode=1777")
	}
	for _, e := range environment {
		args = append(args, "--env", e)
	}
	out, err = h.control(ctx, append(append(args, ref, id), program...)...)
	if err != nil {
		// A client that was killed leaves its container. Otherwise these fail, and
		// the first error says why.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_, _ = h.control(ctx, "tasks", "rm", "--force", id)
		_, _ = h.control(ctx, "containers", "rm", id)
	}
	return out, err
}
