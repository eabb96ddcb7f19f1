package main

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"

	"thaw/bench"
)

// startPull downloads the whole image, unpacks it, and runs it in the directory.
func startPull(ctx context.Context, _ *benchmark, s *site, dir string, c *clock) (ms []bench.Measure, err error) {
	oci, bundle := filepath.Join(dir, "oci"), filepath.Join(dir, "bundle")
	c.start()
	_, err = bench.Output(exec.CommandContext(ctx, skopeo.Name, "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false",
		"docker://"+s.at(s.wires.registry.Addr().String(), sourceName), "oci:"+oci+":latest"))
	if err != nil {
		return nil, err
	}
	c.mark(pulled)
	if _, err := bench.Output(exec.CommandContext(ctx, umoci.Name, "unpack", "--image", oci+":latest", bundle)); err != nil {
		return nil, err
	}
	c.mark(unpacked)
	root, err := bench.Furnish(filepath.Join(bundle, "rootfs"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	return s.answer(ctx, root, s.load, c)
}
