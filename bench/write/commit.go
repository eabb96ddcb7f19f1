package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"thaw/bench"
	"thaw/blockmap"
)

// commitRow is what was written to the overlay that is committed: all of the content once.
type commitRow struct {
	name  string
	write func(b *benchmark, p []byte, off int64) error // makes the bytes at off of the content
}

var commitRows = []commitRow{
	{"commit-text", func(_ *benchmark, p []byte, off int64) error {
		// As a log has them: it compresses to a seventh or so.
		var lines bytes.Buffer
		rng := rand.New(rand.NewPCG(1, uint64(off)))
		for lines.Len() < len(p) {
			fmt.Fprintf(&lines, "%d: request %d from 10.0.%d.%d took %d us\n", off, rng.Uint32N(10000), rng.Uint32N(8), rng.Uint32N(250), rng.Uint32N(100000))
		}
		copy(p, lines.Bytes())
		return nil
	}},
	{"commit-random", func(_ *benchmark, p []byte, off int64) error {
		rng := rand.New(rand.NewPCG(2, uint64(off)))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return nil
	}},
	{"commit-equal", func(b *benchmark, p []byte, off int64) error { // what the base has
		f, err := os.Open(b.device)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.ReadAt(p, b.offset+off)
		return err
	}},
}

const (
	changedRate   = "changed-B/s"
	uploadedShare = "uploaded-B/changed-B"
)

// measureCommit commits overlays to the layout that has the base.
func (b *benchmark) measureCommit(ctx context.Context) error {
	for _, r := range commitRows {
		if !b.wanted(r.name) {
			continue
		}
		dir, err := os.MkdirTemp(b.dir, "scratch")
		if err != nil {
			return err
		}
		err = b.commitRounds(ctx, r, filepath.Join(dir, "overlay"))
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

func (b *benchmark) commitRounds(ctx context.Context, r commitRow, overlay string) error {
	if err := b.fill(ctx, r, overlay); err != nil {
		return err
	}
	place := strings.TrimSuffix(b.image, ":bench")
	for range b.rounds {
		if b.quiet > 0 {
			if _, err := bench.Quiet(ctx, b.quiet); err != nil {
				return err
			}
		}
		out, err := exec.CommandContext(ctx, b.thaw, "commit", "--json", "--crash-consistent", "--cache", b.cache(), overlay, place+":"+r.name).Output()
		if err != nil {
			return commandError(err)
		}
		var c struct {
			Changed  int64   `json:"changed_bytes"`
			Uploaded int64   `json:"uploaded_bytes"`
			Seconds  float64 `json:"seconds"`
		}
		if err := json.Unmarshal(out, &c); err != nil {
			return err
		}
		if err := b.rec.Add("Write/"+r.name,
			bench.Measure{Value: c.Seconds * 1e9, Unit: bench.Wall},
			bench.Measure{Value: float64(c.Changed) / c.Seconds, Unit: changedRate},
			bench.Measure{Value: float64(c.Uploaded) / float64(c.Changed), Unit: uploadedShare},
		); err != nil {
			return err
		}
	}
	return nil
}

func commandError(err error) error {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return fmt.Errorf("%w: %s", err, e.Stderr)
	}
	return err
}

// fill makes an overlay of the image in which all of the content was written.
func (b *benchmark) fill(ctx context.Context, r commitRow, dir string) error {
	out, err := exec.CommandContext(ctx, b.thaw, "inspect", "--json", b.image).Output()
	if err != nil {
		return commandError(err)
	}
	var in struct {
		Digest string `json:"digest"`
		Size   int64  `json:"device_bytes"`
	}
	if err := json.Unmarshal(out, &in); err != nil {
		return err
	}
	digest, err := blockmap.ParseDigest(strings.TrimPrefix(in.Digest, "sha256:"))
	if err != nil {
		return err
	}
	o, err := blockmap.OpenOverlay(dir, nothing(in.Size), blockmap.OverlayOptions{Image: strings.TrimSuffix(b.image, ":bench") + "@" + in.Digest, Digest: digest})
	if err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < int64(b.sizeMiB)<<20 && err == nil; off += int64(len(p)) {
		if err = r.write(b, p, off); err == nil || errors.Is(err, io.EOF) {
			err = o.WriteAt(ctx, p, b.offset+off)
		}
	}
	return errors.Join(err, o.Close())
}

// nothing is a device of that many bytes whose content nobody reads: whole blocks are
// written without a look at what is below.
type nothing int64

func (n nothing) Size() int64                                { return int64(n) }
func (n nothing) View(blockmap.Extent) (blockmap.View, bool) { return blockmap.View{}, false }
func (n nothing) Load(context.Context, blockmap.Extent) (blockmap.View, bool) {
	return blockmap.View{}, false
}
func (n nothing) Fault(context.Context, blockmap.Extent) error {
	return errors.New("the base is not there")
}
func (n nothing) Status(e blockmap.Extent) blockmap.Status { return blockmap.Status{Extent: e} }
func (n nothing) Prefetch(blockmap.Extent)                 {}

// reportCommit writes the table of commits.
func (b *benchmark) reportCommit(w io.Writer) error {
	t := bench.Table{Columns: []string{"what was written", "time", "changed bytes per second", "uploaded per changed byte"}}
	any := false
	for _, r := range commitRows {
		name := "Write/" + r.name
		if b.rec.Rounds(name, changedRate) == 0 {
			continue
		}
		any = true
		t.Row(strings.TrimPrefix(r.name, "commit-"), fmt.Sprintf("%.2f s", b.rec.Median(name, bench.Wall)/1e9),
			fmt.Sprintf("%.0f MB/s", b.rec.Median(name, changedRate)/1e6), fmt.Sprintf("%.3f", b.rec.Median(name, uploadedShare)))
	}
	if !any {
		return nil
	}
	if _, err := fmt.Fprintf(w, "\nthaw commit of %d MiB to the layout that has the base, medians of %d rounds.\n\n", b.sizeMiB, b.rounds); err != nil {
		return err
	}
	_, err := t.WriteTo(w)
	return err
}
