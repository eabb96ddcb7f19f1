package tracefile

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// exportRead is the longest read of an export, the readahead of Linux. What was
// merged is read in such steps again.
const exportRead = 128 << 10

// WriteFio writes the trace as a version 3 iolog of fio (since 3.31; "Trace file
// format v3" in its HOWTO), which replays the reads at their times, or one
// after the other with --replay_no_stall=1:
//
//	fio --name=replay --ioengine=psync --direct=1 --readonly --read_iolog=FILE
//
// file is the device that the log names; --replay_redirect=DEVICE has fio read
// another one. The log has one line a read, in microseconds and bytes.
func (t *Trace) WriteFio(w io.Writer, file string) error {
	if file == "" || len(file) > 255 || strings.ContainsFunc(file, func(r rune) bool { return r <= ' ' || r == ':' }) {
		return fmt.Errorf("fio cannot have a file named %q in its log: no spaces, no colons, at most 255 bytes", file)
	}
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "fio version 3 iolog\n0 %s add\n0 %s open\n", file, file)
	var last time.Duration
	for _, x := range t.byTime() {
		last = x.At
		for off, n := range x.reads() {
			fmt.Fprintf(b, "%d %s read %d %d\n", x.At.Microseconds(), file, off, n)
		}
	}
	fmt.Fprintf(b, "%d %s close\n", last.Microseconds(), file)
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write fio iolog: %w", err)
	}
	return nil
}

// WriteBlkparse writes the trace as text in blkparse's own format, one queued
// read a line in sectors of 512 bytes, the device being 0,0. In the place of
// the process is hit or miss.
func (t *Trace) WriteBlkparse(w io.Writer) error {
	b := bufio.NewWriter(w)
	seq := 0
	for _, x := range t.byTime() {
		who := "hit"
		if x.Miss {
			who = "miss"
		}
		for off, n := range x.reads() {
			seq++
			fmt.Fprintf(b, "%3d,%-3d %2d %8d %5d.%09d %5d %2s %3s %d + %d [%s]\n",
				0, 0, 0, seq, x.At/time.Second, x.At%time.Second, 0, "Q", "R", off/512, n/512, who)
		}
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write blkparse text: %w", err)
	}
	return nil
}

// byTime are the touches in order of time, which a merged trace does not keep.
func (t *Trace) byTime() []Touch {
	sorted := slices.Clone(t.Touches)
	slices.SortStableFunc(sorted, func(a, b Touch) int { return cmp.Compare(a.At, b.At) })
	return sorted
}

// reads are the offset and length in bytes of each read that a touch is made of.
func (t Touch) reads() func(yield func(off, n int64) bool) {
	return func(yield func(off, n int64) bool) {
		e := t.Extent()
		for off := e.Start; off < e.End; off += exportRead {
			if !yield(off, min(exportRead, e.End-off)) {
				return
			}
		}
	}
}
