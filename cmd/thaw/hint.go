package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"thaw/fetcher/registry"
)

// hint is what a person can do about err, or nothing where err says it. args are
// those of the command that failed, temp is its --temp.
func hint(err error, args []string, temp string) string {
	if h := tempHint(err, temp); h != "" {
		return h
	}
	text := err.Error()
	for _, arg := range args {
		ref, refErr := registry.ParseRef(arg)
		switch {
		case refErr != nil && strings.Contains(text, refErr.Error()):
			return fileHint(text, arg)
		case refErr != nil || ref.Registry == "" || !strings.Contains(text, ref.String()):
			continue
		case !registry.Absent(err) && !errors.Is(err, registry.ErrUnavailable):
			continue
		}
		if h := fileHint(text, arg); h != "" {
			return h
		}
		switch first, _, _ := strings.Cut(arg, "/"); {
		case !registry.Absent(err):
		case ref.Registry == "index.docker.io" && !strings.HasSuffix(first, "docker.io"):
			return "a name without a host is one of Docker Hub: write HOST/" + arg + " for another registry"
		case errors.Is(err, registry.ErrNotFound):
			return "check the name and the tag"
		case !strings.Contains(text, "docker login"):
			host := " " + ref.Registry
			if ref.Registry == "index.docker.io" {
				host = "" // what docker login defaults to
			}
			return "check the name, or run docker login" + host + " with an account that has access"
		}
	}
	return ""
}

// fileHint says how to name a file or directory, if arg is the path of one.
func fileHint(text, arg string) string {
	fi, err := os.Stat(arg)
	switch {
	case err != nil || strings.Contains(text, "oci:"):
		return ""
	case fi.IsDir():
		return fmt.Sprintf("%s is a directory: write oci:%s for an OCI layout", arg, arg)
	}
	return fmt.Sprintf("%s is a file: write docker-archive:%s for what docker save wrote, or oci-archive:%s for a tar of an OCI layout", arg, arg, arg)
}

// tempHint names --temp where err is about a file below the directory of temporary
// files.
func tempHint(err error, temp string) string {
	e, ok := errors.AsType[*fs.PathError](err)
	if !ok || strings.Contains(err.Error(), "--temp") {
		return ""
	}
	dir := filepath.Clean(cmp.Or(temp, os.TempDir()))
	if e.Path != dir && !strings.HasPrefix(filepath.Clean(e.Path), dir+"/thaw-") {
		return ""
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Sprintf("%s is full: name a directory with more room by --temp, or by TMPDIR", dir)
	}
	if e.Path == dir || e.Op == "mkdir" {
		return "name another directory by --temp, or by TMPDIR"
	}
	return ""
}
