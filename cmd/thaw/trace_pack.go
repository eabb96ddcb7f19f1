package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
	"thaw/tracefile"
)

func tracePackCommand(a *app) *cobra.Command {
	var pin []string
	var least int
	c := &cobra.Command{
		Use:   "pack IMAGE [TRACE...]",
		Short: "Store what a start reads as one blob beside the image",
		Long: `pack makes a bundle: one blob beside the image with what the traces touch, in leaves
of 64 KiB and in the order in which a start reads them. With "thaw serve --trace auto" a
start is then one download from beginning to end.

The traces are the files given, or else those that are stored beside the image. If
they are of four starts or more, pack leaves out what fewer than --least percent of
the starts touched. Run pack again when there are better traces: serve uses the
newest bundle.`,
		Example: `  thaw trace pack registry.example/team/app:v1
  thaw trace pack registry.example/team/app:v1 start.trace`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			if least < 0 || least > 100 {
				return usageError{fmt.Errorf("--least %d: it must be a percentage, 0 to 100", least)}
			}
			return a.tracePack(c.Context(), args[0], args[1:], least, pin)
		},
	}
	c.Flags().IntVar(&least, "least", tracefile.DefaultLeast, "leave out what fewer than this `PERCENT` of at least four starts touched")
	c.Flags().StringVar(&a.temp, "temp", "", "keep the bundle in `DIR` until it is pushed (default: $TMPDIR, or /tmp)")
	c.Flags().StringArrayVar(&pin, "pin", nil, pinUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// packed is the result that --json prints.
type packed struct {
	Type    string  `json:"type"`
	Target  string  `json:"target"`
	Starts  uint32  `json:"starts"` // that the traces are of
	Chunks  int     `json:"chunks"` // of which the bundle has leaves
	Leaves  int     `json:"leaves"`
	Wanted  int64   `json:"wanted_bytes"`  // that the traces touch, without the rare ones
	Rare    int64   `json:"rare_bytes"`    // that fewer starts than --least touched
	Content int64   `json:"content_bytes"` // of the leaves
	Head    int64   `json:"head_bytes"`    // of the bundle's head
	Bytes   int64   `json:"bytes"`         // of the bundle
	Seconds float64 `json:"seconds"`
}

func (a *app) tracePack(ctx context.Context, image string, paths []string, least int, pin pinFlags) error {
	began := time.Now()
	find, err := a.access(ctx, pin, image)
	if err != nil {
		return err
	}
	defer find.Close()
	b, err := find.Find(ctx, image)
	if err != nil {
		return err
	}
	var traces []*tracefile.Trace
	for _, path := range paths {
		t, _, err := readTrace(ctx, path)
		if err != nil {
			return err
		}
		traces = append(traces, t)
	}
	if len(paths) == 0 {
		found, err := b.Beside(ctx)
		if err != nil {
			return err
		}
		if traces = b.StoredTraces(ctx, found.Traces, find.Log); len(traces) == 0 {
			return fmt.Errorf("no traces are stored beside %s: record a start with `thaw serve %s --trace auto --trace-push`, or name a trace file", image, image)
		}
	}
	p, err := packTraces(ctx, b, traces, host.PackOptions{Temp: a.temp, Least: least})
	if err != nil {
		return fmt.Errorf("pack %s: %w", image, err)
	}
	p.Seconds = time.Since(began).Seconds()
	if a.json {
		return a.printJSON(p)
	}
	fmt.Fprintln(a.stdout, p.Target)
	p.print(a.stdout)
	return nil
}

func (p *packed) print(w io.Writer) {
	fmt.Fprintf(w, "bundle   %s of %s for %s: %s for the %s that was touched, stored as %s\n",
		leafCount(p.Leaves), count(p.Chunks, "chunk"), count(int(p.Starts), "start"), bytesString(p.Content), bytesString(p.Wanted), bytesString(p.Bytes))
	if p.Rare > 0 {
		fmt.Fprintf(w, "left out %s, which few of the starts touched\n", bytesString(p.Rare))
	}
}

func leafCount(n int) string {
	if n == 1 {
		return "1 leaf"
	}
	return fmt.Sprintf("%d leaves", n)
}

// packTraces makes a bundle of traces of an image, and stores it beside the image.
func packTraces(ctx context.Context, b *host.BlockImage, traces []*tracefile.Trace, o host.PackOptions) (*packed, error) {
	p, err := b.Pack(ctx, traces, o)
	if err != nil {
		return nil, err
	}
	return &packed{
		Type: "packed", Target: p.Reference, Starts: p.Starts, Chunks: p.Chunks, Leaves: p.Leaves,
		Wanted: p.Wanted, Rare: p.Rare, Content: p.Content, Head: p.Head, Bytes: p.Bytes,
	}, nil
}
