package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"thaw/bench"
)

// row is a row of the first table: a load.
type row struct {
	name, rw, bs string
	depth, jobs  int
	fsync        int // after so many writes
}

var rows = []row{
	{name: "4k-read-QD1", rw: "randread", bs: "4k", depth: 1, jobs: 1},
	{name: "4k-read-QD32", rw: "randread", bs: "4k", depth: 32, jobs: 1},
	{name: "4k-read-QD32-4jobs", rw: "randread", bs: "4k", depth: 32, jobs: 4},
	{name: "1M-read-seq", rw: "read", bs: "1M", depth: 4, jobs: 1},
	{name: "4k-write-fsync", rw: "randwrite", bs: "4k", depth: 8, jobs: 1, fsync: 16},
}

// Sides. The number is that of connections.
const (
	thawUBLK = "thaw-ublk"
	thawNBD1 = "thaw-nbd-1"
	thawNBD4 = "thaw-nbd-4"
	nbdkit1  = "nbdkit-1"
	nbdkit4  = "nbdkit-4"
	qemu1    = "qemu-nbd-1"
	qemu4    = "qemu-nbd-4"
	loop     = "loop"
	// thawCommand is the time of the commands thaw attach and thaw detach, where the other
	// sides of thaw are requests to a server.
	thawCommand = "thaw-ublk-command"
)

var allSides = []string{thawUBLK, thawNBD1, thawNBD4, nbdkit1, nbdkit4, qemu1, qemu4, loop}

const (
	iops      = "iops"
	bandwidth = "B/s"
	p99       = "p99-ns"
	detachNS  = "detach-ns"
)

const attachRow = "attach"

// versus are the ratios that the table has.
var versus = [][2]string{{thawUBLK, loop}, {thawUBLK, nbdkit1}, {thawNBD1, nbdkit1}, {thawNBD4, nbdkit4}, {thawNBD4, qemu4}}

func name(row, side string) string { return "Kernel/" + row + "/side=" + side }

// report writes the tables.
func (b *benchmark) report(w io.Writer) error {
	sides := strings.Split(b.sides, ",")
	t := bench.Table{Columns: append([]string{"load"}, sides...)}
	var pairs [][2]string
	for _, p := range versus {
		if slices.Contains(sides, p[0]) && slices.Contains(sides, p[1]) {
			pairs = append(pairs, p)
			t.Columns = append(t.Columns, p[0]+" / "+p[1])
		}
	}
	for _, r := range rows {
		if b.rec.Rounds(name(r.name, sides[0]), iops) == 0 {
			continue
		}
		cells := []string{r.name}
		for _, s := range sides {
			if r.bs == "1M" {
				cells = append(cells, fmt.Sprintf("%.0f MB/s", b.rec.Median(name(r.name, s), bandwidth)/1e6))
			} else {
				cells = append(cells, fmt.Sprintf("%.0f", b.rec.Median(name(r.name, s), iops)))
			}
		}
		for _, p := range pairs {
			cells = append(cells, fmt.Sprintf("%.2f", b.rec.Ratio(name(r.name, p[0]), name(r.name, p[1]), iops)))
		}
		t.Row(cells...)
	}
	if _, err := fmt.Fprintf(w, "\nMedians of %d rounds: requests per second (MB/s where marked).\n\n", b.rounds); err != nil {
		return err
	}
	if _, err := t.WriteTo(w); err != nil {
		return err
	}
	a := bench.Table{Columns: []string{"time", "attach", "detach"}}
	for _, s := range append(sides, thawCommand) {
		if b.rec.Rounds(name(attachRow, s), bench.Wall) == 0 {
			continue
		}
		a.Row(s, milliseconds(b.rec.Median(name(attachRow, s), bench.Wall)), milliseconds(b.rec.Median(name(attachRow, s), detachNS)))
	}
	if _, err := fmt.Fprintf(w, "\nMedians: until the first 4 KiB are read, and until the node is gone.\n\n"); err != nil {
		return err
	}
	_, err := a.WriteTo(w)
	return err
}

func milliseconds(ns float64) string {
	return fmt.Sprintf("%.1f ms", ns/float64(time.Millisecond))
}
