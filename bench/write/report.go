package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"thaw/bench"
)

// copyOnWrite are the peers that keep the image as it is, as thaw does. nbdkit's cow filter
// answers a flush without a sync of anything, so it is no peer where flushes count.
var copyOnWrite = []string{"nbdkit-cow", "qemu-nbd-qcow2"}

// report writes the tables.
func (b *benchmark) report(w io.Writer) error {
	columns := []string{"load"}
	for _, s := range sides {
		columns = append(columns, s.title)
	}
	t := bench.Table{Columns: append(columns, "thaw / best copy-on-write peer", "file / thaw", "thaw / nbdkit file")}
	for _, r := range rows {
		name := "Write/" + r.name + "/server="
		if b.rec.Rounds(name+"thaw", iops) == 0 {
			continue
		}
		row := []string{r.name}
		for _, s := range sides {
			row = append(row, b.cell(name+s.name, r))
		}
		best := ""
		for _, p := range copyOnWrite {
			if r.job.Fsync > 0 && p == "nbdkit-cow" {
				continue
			}
			if b.rec.Rounds(name+p, iops) > 0 && (best == "" || b.rec.Median(name+p, iops) > b.rec.Median(name+best, iops)) {
				best = p
			}
		}
		t.Row(append(row, b.ratio(name+"thaw", name+best, " ("+best+")"), b.ratio(name+"file", name+"thaw", ""), b.ratio(name+"thaw", name+"nbdkit-file", ""))...)
	}
	if _, err := fmt.Fprintf(w, "\nMedians of %d rounds: requests per second (MB/s where marked), and the server's CPU time per request in us.\n\n", b.rounds); err != nil {
		return err
	}
	if _, err := t.WriteTo(w); err != nil {
		return err
	}
	return errors.Join(b.reportFirst(w), b.reportCommit(w))
}

// reportFirst writes the table of first and second writes.
func (b *benchmark) reportFirst(w io.Writer) error {
	t := bench.Table{Columns: []string{"load", "side", "first write", "second write", "first / second, time"}}
	any := false
	for _, r := range firstRows {
		for _, s := range firstSides {
			name := "Write/first/" + r.name + "/server=" + s.name + "/pass="
			if b.rec.Rounds(name+"first", iops) == 0 {
				continue
			}
			any = true
			us := func(pass string) string { return fmt.Sprintf("%.1f us", b.rec.Median(name+pass, bench.Wall)/1e3) }
			t.Row(r.name, s.title, us("first"), us("second"), b.ratio2(name+"first", name+"second"))
		}
	}
	if !any {
		return nil
	}
	if _, err := fmt.Fprintf(w, "\nEach block once, and then again. Time per request, medians of %d rounds.\n\n", b.rounds); err != nil {
		return err
	}
	_, err := t.WriteTo(w)
	return err
}

func (b *benchmark) ratio2(a, o string) string {
	return fmt.Sprintf("%.2f", b.rec.Ratio(a, o, bench.Wall))
}

// ratio of requests per second, or nothing where a side was not measured.
func (b *benchmark) ratio(a, o, note string) string {
	if b.rec.Rounds(a, iops) == 0 || strings.HasSuffix(o, "=") || b.rec.Rounds(o, iops) == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f%s", b.rec.Ratio(a, o, iops), note)
}

func (b *benchmark) cell(name string, r row) string {
	if b.rec.Rounds(name, iops) == 0 {
		return ""
	}
	text := fmt.Sprintf("%.0f", b.rec.Median(name, iops))
	if r.job.BS == "1M" {
		text = fmt.Sprintf("%.0f MB/s", b.rec.Median(name, bandwidth)/1e6)
	}
	if cpu := b.rec.Median(name, cpuPerIO) / 1e3; cpu > 0 {
		text += fmt.Sprintf(", %.1f", cpu)
	}
	return text
}
