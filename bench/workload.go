package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Workload is an OCI layout that scripts/workloads has made. Its image is tagged
// latest, and its program prints one line with its answer.
type Workload struct {
	Name, Dir string
	Answer    string // a part of that line
}

// Start is the program of every workload's image.
const Start = "/app/run"

// answers are parts of what the programs of scripts/workloads print.
var answers = map[string]string{
	"flask":    "hello from flask",
	"sklearn":  "score 0.9",
	"torch":    "class ",
	"chromium": "hello from chromium",
}

// Ref is the name of the image for umoci and skopeo.
func (w Workload) Ref() string { return w.Dir + ":latest" }

// Check returns an error unless the program printed its answer.
func (w Workload) Check(printed string) error {
	if printed == "" || !strings.Contains(printed, w.Answer) {
		return fmt.Errorf("%s printed %q, which does not contain %q", Start, printed, w.Answer)
	}
	return nil
}

// FindWorkloads returns the layouts in a directory: all, or those that only names,
// separated by commas.
func FindWorkloads(dir, only string) ([]Workload, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	if only != "" {
		names = strings.Split(only, ",")
	} else {
		found, err := filepath.Glob(filepath.Join(dir, "*", "oci-layout"))
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			names = append(names, filepath.Base(filepath.Dir(f)))
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no OCI layouts in %s: run scripts/workloads %s", dir, dir)
	}
	var workloads []Workload
	for _, n := range names {
		w := Workload{Name: n, Dir: filepath.Join(dir, n), Answer: answers[n]}
		if _, err := os.Stat(filepath.Join(w.Dir, "oci-layout")); err != nil {
			return nil, fmt.Errorf("no image %s: %w", n, err)
		}
		workloads = append(workloads, w)
	}
	return workloads, nil
}

// Push copies the image with a tag from a layout to a registry, unchanged.
func Push(ctx context.Context, oci, tag, to string) (v1.Image, error) {
	ref, err := name.ParseReference(to, name.Insecure)
	if err != nil {
		return nil, err
	}
	ix, err := layout.ImageIndexFromPath(oci)
	if err != nil {
		return nil, err
	}
	m, err := ix.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range m.Manifests {
		if d.Annotations["org.opencontainers.image.ref.name"] != tag {
			continue
		}
		img, err := ix.Image(d.Digest)
		if err != nil {
			return nil, err
		}
		return img, remote.Write(ref, img, remote.WithContext(ctx))
	}
	return nil, fmt.Errorf("no image tagged %s in %s", tag, oci)
}

// ReadAll reads the files of a directory into the page cache, and returns their
// size.
func ReadAll(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(io.Discard, f)
		total += n
		return err
	})
	return total, err
}
