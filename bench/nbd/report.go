package main

import (
	"errors"
	"fmt"
	"io"
	"math"

	"thaw/bench"
)

// peers in the order of the table. The aims refer to the first one.
var peers = []string{"nbdkit-file", "nbdkit-memory", "qemu-nbd", "go-nbd"}

// report writes the tables.
func (b *benchmark) report(w io.Writer) error {
	t := bench.Table{Columns: []string{"load", "thaw", "nbdkit file", "nbdkit memory", "qemu-nbd", "go-nbd",
		"thaw / nbdkit file", "thaw / best peer", "CPU per request, thaw / nbdkit file"}}
	for _, transport := range []string{"unix", "tcp"} {
		for _, r := range rows {
			name := "NBD/" + transport + "/" + r.name + "/server="
			if b.rec.Rounds(name+"thaw", iops) == 0 {
				continue
			}
			row := []string{transport + " " + r.name, b.cell(name+"thaw", r)}
			best := ""
			for _, p := range peers {
				if b.rec.Rounds(name+p, iops) == 0 {
					row = append(row, "")
					continue
				}
				row = append(row, b.cell(name+p, r))
				if best == "" || b.rec.Median(name+p, iops) > b.rec.Median(name+best, iops) {
					best = p
				}
			}
			row = append(row,
				fmt.Sprintf("%.2f", b.rec.Ratio(name+"thaw", name+peers[0], iops)),
				fmt.Sprintf("%.2f (%s)", b.rec.Ratio(name+"thaw", name+best, iops), best),
				ratio(b.rec.Ratio(name+"thaw", name+peers[0], cpuPerIO)))
			t.Row(row...)
		}
	}
	if _, err := fmt.Fprintf(w, "\nMedians of %d rounds: requests per second (MB/s where marked), and the server's CPU time per request in us.\n\n", b.rounds); err != nil {
		return err
	}
	if _, err := t.WriteTo(w); err != nil {
		return err
	}
	for _, transport := range []string{"unix", "tcp"} {
		for _, r := range rows {
			name := "NBD/" + transport + "/" + r.name + "/server="
			if b.rec.Rounds(name+recording, iops) == 0 {
				continue
			}
			if _, err := fmt.Fprintf(w, "\n%s %s while thaw records a start: %.0f requests per second, %.3f times those without recording, at %.2f times the CPU per request.\n", transport, r.name,
				b.rec.Median(name+recording, iops), b.rec.Ratio(name+recording, name+"thaw", iops), b.rec.Ratio(name+recording, name+"thaw", cpuPerIO)); err != nil {
				return err
			}
		}
	}
	alone, mixed := "NBD/mixed/hits-alone/server=thaw", "NBD/mixed/hits-mixed/server=thaw"
	if b.rec.Rounds(alone, p99) == 0 {
		return b.reportDisk(w)
	}
	_, err := fmt.Fprintf(w, "\nHits on one connection at QD32, p99: alone %.0f us, mixed with 5 ms misses %.0f us, ratio %.2f.\n",
		b.rec.Median(alone, p99)/1e3, b.rec.Median(mixed, p99)/1e3, b.rec.Ratio(mixed, alone, p99))
	return errors.Join(err, b.reportDisk(w))
}

func (b *benchmark) cell(name string, r row) string {
	cpu := b.rec.Median(name, cpuPerIO) / 1e3
	if r.job.BS == "1M" {
		return fmt.Sprintf("%.0f MB/s, %.0f", b.rec.Median(name, bandwidth)/1e6, cpu)
	}
	return fmt.Sprintf("%.0f, %.1f", b.rec.Median(name, iops), cpu)
}

func ratio(r float64) string {
	if math.IsInf(r, 0) || math.IsNaN(r) {
		return "-" // less CPU time than the kernel's resolution
	}
	return fmt.Sprintf("%.2f", r)
}
