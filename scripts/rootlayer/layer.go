package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/scripts/rootinit/bootconfig"
)

// contents are what the layer has.
type contents struct {
	init    string // a file: the first process
	busybox string // a file; "" is none
	boot    bootconfig.Config
}

// A layer is a file with the blob of a layer.
type layer struct {
	path         string
	digest, diff v1.Hash // of the blob, and of the tar that is in it
	size         int64
}

// hosts is what container engines give a container, without its own name.
const hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

// write writes the layer to a file. The same contents make the same bytes.
func (c *contents) write(path string) (*layer, error) {
	program, err := os.ReadFile(c.init)
	if err != nil {
		return nil, err
	}
	config, err := json.MarshalIndent(c.boot, "", "\t")
	if err != nil {
		return nil, err
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	blob, plain := sha256.New(), sha256.New()
	z := gzip.NewWriter(io.MultiWriter(f, blob))
	t := tar.NewWriter(io.MultiWriter(z, plain))
	add := func(h tar.Header, data []byte) {
		if err != nil {
			return
		}
		h.Size, h.Format = int64(len(data)), tar.FormatUSTAR
		if err = t.WriteHeader(&h); err == nil {
			_, err = t.Write(data)
		}
	}
	// The first process mounts something on each of these. A root that is read-only needs them all.
	for _, d := range []struct {
		name string
		mode int64
	}{{"dev/", 0o755}, {"proc/", 0o555}, {"run/", 0o755}, {"sys/", 0o555}, {"tmp/", 0o1777}} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d.name, Mode: d.mode}, nil)
	}
	file := func(name string, mode int64, data []byte) {
		add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, data)
	}
	// A container engine replaces these two when it starts a container; here, the first process does.
	file("etc/hosts", 0o644, []byte(hosts))
	file("etc/resolv.conf", 0o644, nil)
	file(bootconfig.File, 0o644, append(config, '\n'))
	file("sbin/init", 0o755, program)
	for _, name := range []string{"halt", "poweroff", "reboot"} {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "sbin/" + name, Linkname: "init", Mode: 0o777}, nil)
	}
	if c.busybox != "" && err == nil {
		var busybox []byte
		if busybox, err = static(c.busybox); err == nil {
			file("bin/busybox", 0o755, busybox)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	sum := func(b []byte) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(b)} }
	return &layer{path: path, size: info.Size(), digest: sum(blob.Sum(nil)), diff: sum(plain.Sum(nil))}, f.Close()
}

// static reads a program that needs no libraries: the image may have none, or others.
func static(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s is no program: %w", path, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is linked to libraries: give a static one, such as that of Debian's busybox-static", path)
		}
	}
	return b, nil
}
