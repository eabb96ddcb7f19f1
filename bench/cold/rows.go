package main

import (
	"fmt"
	"slices"
	"strings"

	"thaw/bench"
)

// row is a way to start an image.
type row struct {
	name     string
	base     string // of a variant: the row that it varies
	needs    []bench.Program
	timeline bool // whether to record what the link carries
	asked    bool // it is measured only if -rows names it
	// start prepares the host, starts the clock, and stops it at the answer.
	start starter
}

// The rows' names.
const (
	localWarm       = "local-warm"
	localCold       = "local-cold"
	resident        = "resident"
	fullPull        = "full-pull"
	stargzRow       = "stargz"
	stargzOptimized = "stargz-optimized"
	nbdkitCurl      = "nbdkit-curl"
	thawPlain       = "thaw"
	thawTrace       = "thaw-trace"
	thawBundle      = "thaw-bundle"

	overNBD = "-nbdfuse" // ends the name of a row that mounts by nbdfuse, and not by thaw mount
)

var (
	nbdfuse  = bench.Program{Name: "nbdfuse", Package: "libnbd-bin", Version: []string{"--version"}}
	nbdcopy  = bench.Program{Name: "nbdcopy", Package: "libnbd-bin"}
	fuse3    = bench.Program{Name: "fusermount3", Package: "fuse3"}
	losetup  = bench.Program{Name: "losetup", Package: "mount"}
	registry = bench.Program{Name: "docker-registry", Package: "docker-registry", Version: []string{"--version"}}
	skopeo   = bench.Program{Name: "skopeo", Package: "skopeo", Version: []string{"--version"}}
	umoci    = bench.Program{Name: "umoci", Package: "umoci", Version: []string{"--version"}}
	nbdkit   = bench.Program{Name: "nbdkit", Package: "nbdkit", Version: []string{"--version"}}
)

// rows returns all rows, in the order of the table.
func rows() []row {
	return []row{
		{name: localWarm, start: startWarm},
		{name: localCold, start: startCold},
		{name: resident, start: startResident(byNode)},
		{name: fullPull, needs: []bench.Program{skopeo, umoci}, start: startPull},
		{name: stargzRow, start: startStargz(stargzRow), timeline: true},
		{name: stargzOptimized, start: startStargz(stargzOptimized), timeline: true},
		{name: nbdkitCurl, needs: []bench.Program{nbdkit}, start: startNBDKit, timeline: true},
		{name: thawPlain, start: startThaw(byNode, plainName), timeline: true},
		{name: thawTrace, start: startThaw(byNode, traceName, "--trace", "auto"), timeline: true},
		{name: thawBundle, start: startThaw(byNode, bundleName, "--trace", "auto"), timeline: true},
		{name: resident + overNBD, start: startResident(byNBDFUSE), asked: true},
		{name: thawPlain + overNBD, start: startThaw(byNBDFUSE, plainName), asked: true},
		{name: thawTrace + overNBD, start: startThaw(byNBDFUSE, traceName, "--trace", "auto"), asked: true},
		{name: thawBundle + overNBD, start: startThaw(byNBDFUSE, bundleName, "--trace", "auto"), asked: true},
	}
}

// bases are the rows that a variant can be based on, with their images.
var bases = map[string]string{thawPlain: plainName, thawTrace: traceName, thawBundle: bundleName}

// variant is a row of thaw with further arguments.
type variant struct {
	name, base string
	args       []string
}

func parseVariant(s string) (variant, error) {
	name, rest, _ := strings.Cut(s, "=")
	words := strings.Fields(rest)
	if name == "" || strings.ContainsAny(name, "/ ") || len(words) < 2 || bases[words[0]] == "" {
		return variant{}, fmt.Errorf("variant %q is not NAME=ROW ARGS, as in limited=thaw-trace --prefetch-rate 10M", s)
	}
	return variant{name, words[0], words[1:]}, nil
}

// chooseRows returns the rows that the options name, and all variants.
func chooseRows(o options) ([]row, error) {
	chosen := rows()
	if o.rows == "" {
		chosen = slices.DeleteFunc(chosen, func(r row) bool { return r.asked })
	} else {
		wanted := strings.Split(o.rows, ",")
		for _, w := range wanted {
			if !slices.ContainsFunc(chosen, func(r row) bool { return r.name == w }) {
				return nil, fmt.Errorf("unknown row %q; -help lists the flags, and the package's doc the rows", w)
			}
		}
		chosen = slices.DeleteFunc(chosen, func(r row) bool { return !slices.Contains(wanted, r.name) })
	}
	for _, v := range o.variants {
		args := v.args
		if v.base != thawPlain {
			args = append([]string{"--trace", "auto"}, args...)
		}
		chosen = append(chosen, row{name: v.name, base: v.base, start: startThaw(byNode, bases[v.base], args...), timeline: true})
	}
	return chosen, nil
}

// needsOf returns the programs that rows need, and those for preparing them.
func needsOf(rows []row) []bench.Program {
	needs := []bench.Program{registry, nbdfuse, nbdcopy, fuse3, losetup}
	for _, r := range rows {
		needs = append(needs, r.needs...)
	}
	return needs
}

// wants reports whether a chosen row, or the base of one, has that name.
func (b *benchmark) wants(name string) bool {
	return slices.ContainsFunc(b.chosen, func(r row) bool { return r.name == name }) ||
		slices.ContainsFunc(b.variants, func(v variant) bool { return v.base == name })
}
