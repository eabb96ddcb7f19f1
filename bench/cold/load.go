package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"thaw/bench"
)

// load is what is done with an image once it is mounted.
type load struct {
	name string
	// run does it, and returns what it prints.
	run func(ctx context.Context, root *bench.Root) (out string, u bench.Usage, err error)
	// rows are the rows that have the load; nil: all have.
	rows []string
}

// start runs the image's program, which is what bench/cold is about.
var start = load{name: "start", run: func(ctx context.Context, root *bench.Root) (string, bench.Usage, error) {
	return root.Run(ctx, bench.Start)
}}

// everything reads every file of the image once, one after the other, as find lists
// them. It is what a lazy pull is worst at: a program that reads most of its image. A
// trace would list all of the image, so the rows with one are left out.
var everything = load{
	name: "everything",
	run: func(ctx context.Context, root *bench.Root) (string, bench.Usage, error) {
		cmd := exec.CommandContext(ctx, "sh", "-c", `find "$1" -xdev -type f -exec cat {} + | wc -c`, "sh", root.Dir)
		var out strings.Builder
		cmd.Stdout = &out
		u, err := bench.Run(cmd)
		return strings.TrimSpace(out.String()), u, err
	},
	rows: []string{localCold, fullPull, nbdkitCurl, thawPlain},
}

var loads = []load{start, everything}

func parseLoads(s string) (chosen []load, err error) {
	for name := range strings.SplitSeq(s, ",") {
		i := slices.IndexFunc(loads, func(l load) bool { return l.name == name })
		if i < 0 {
			return nil, fmt.Errorf("unknown load %q: start or everything", name)
		}
		chosen = append(chosen, loads[i])
	}
	return chosen, nil
}

// has reports whether a row has the load. Variants have it if their base does.
func (l load) has(r row) bool {
	return l.rows == nil || slices.Contains(l.rows, r.name) || slices.Contains(l.rows, r.base)
}

// imageName names an image under the load in the results.
func (l load) imageName(image string) string {
	if l.name == start.name {
		return image
	}
	return image + "-" + l.name
}

// expect finds out what a load that reads files prints, from the flat image.
func (b *benchmark) expect(ctx context.Context, p *prepared, l load) (err error) {
	if l.name == start.name {
		return nil // the program's answer is known
	}
	root, err := bench.MountFile(ctx, p.flat, p.dir, b.readAhead)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close(), os.Remove(filepath.Join(p.dir, "root"))) }()
	p.read, _, err = l.run(ctx, root)
	return err
}

// check returns an error unless the load printed what it should.
func (p *prepared) check(l load, out string) error {
	if l.name == start.name {
		return p.Check(out)
	}
	if out != p.read {
		return fmt.Errorf("the files have %s bytes, and %s were read", p.read, out)
	}
	return nil
}
