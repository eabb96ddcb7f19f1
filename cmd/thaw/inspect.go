package main

import (
	"cmp"
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
)

func inspectCommand(a *app) *cobra.Command {
	var pin []string
	c := &cobra.Command{
		Use:   "inspect IMAGE...",
		Short: "Show what block images are made of",
		Long: `inspect shows what block images are made of: one stream of the filesystem's
metadata, and one of the content of each layer. For each stream it prints

    chunks    the number of its chunks
    content   its size
    shown     the share of it that no upper layer hides
    stored    its size in the registry
    ratio     the stored size relative to the content
    shared    the share of it in chunks that another stream has, too

Of an image that "thaw commit" has made, it also prints the block image that it is
based on, and how much the streams of its overlays add to that.

With several images, "shared" counts the streams of the images before as well.`,
		Example: `  thaw inspect registry.example/team/app:v1
  thaw inspect registry.example/team/app:v1 registry.example/team/app:v2
  thaw inspect oci:/srv/images:app --json`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.inspect(c.Context(), args, pin) },
	}
	c.Flags().StringArrayVar(&pin, "pin", nil, pinUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the results as JSON, one line for each image")
	return c
}

// inspected is what --json prints.
type inspected struct {
	Type       string            `json:"type"`
	Name       string            `json:"name"`
	Digest     string            `json:"digest"`
	Subject    string            `json:"subject,omitempty"`
	BaseName   string            `json:"base_name,omitempty"`   // of a committed image: the block image that it is based on
	BaseDigest string            `json:"base_digest,omitempty"` // and its digest
	DeviceSize int64             `json:"device_bytes"`
	Content    int64             `json:"content_bytes"`
	Live       int64             `json:"live_bytes"`
	Stored     int64             `json:"stored_bytes"`
	Shared     int64             `json:"shared_bytes"`
	Overlays   int64             `json:"overlay_stored_bytes"` // what its overlays add
	IndexBytes int64             `json:"index_bytes"`
	Chunks     int               `json:"chunks"`
	Runs       int               `json:"runs"`
	Streams    []inspectedStream `json:"streams"`
}

type inspectedStream struct {
	Kind    string `json:"kind"` // metadata, layer or overlay; data if the role is unknown
	DiffID  string `json:"diff_id,omitempty"`
	Blob    string `json:"blob"`
	Chunks  int    `json:"chunks"`
	Content int64  `json:"content_bytes"`
	Live    int64  `json:"live_bytes"`
	Stored  int64  `json:"stored_bytes"`
	Shared  int64  `json:"shared_bytes"`
}

func (a *app) inspect(ctx context.Context, names []string, pin pinFlags) error {
	find, err := a.access(ctx, pin, names...)
	if err != nil {
		return err
	}
	defer find.Close()
	var reporter flatten.Reporter
	for i, name := range names {
		b, err := find.Find(ctx, name)
		if err != nil {
			return err
		}
		in := describe(b, reporter.Report(b.Manifest, b.Index))
		if a.json {
			err = a.printJSON(in)
		} else {
			if i > 0 {
				fmt.Fprintln(a.stdout)
			}
			err = a.printInspected(in)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func describe(b *host.BlockImage, streams []flatten.StreamReport) *inspected {
	in := &inspected{
		Type: "image", Name: b.Name, Digest: b.Digest.String(),
		DeviceSize: int64(b.Index.Blocks) * blockmap.BlockSize, IndexBytes: b.Manifest.Index.Size, Runs: len(b.Index.Runs),
	}
	if s := b.Manifest.Subject; s != nil {
		in.Subject = s.Digest.String()
	}
	// Whoever has pushed the image may claim any base.
	in.BaseName, in.BaseDigest = printable(b.Manifest.Annotations[flatten.AnnotationBaseName]), printable(b.Manifest.Annotations[flatten.AnnotationBaseDigest])
	for _, s := range streams {
		kind := cmp.Or(string(s.Role), "data")
		in.Streams = append(in.Streams, inspectedStream{kind, s.DiffID, "sha256:" + s.Blob.String(), s.Chunks, s.Content, s.Live, s.Stored, s.Shared})
		in.Chunks += s.Chunks
		in.Content += s.Content
		in.Live += s.Live
		in.Stored += s.Stored
		if s.Role == flatten.RoleOverlay {
			in.Overlays += s.Stored
		}
		in.Shared += s.Shared
	}
	return in
}

func (a *app) printInspected(in *inspected) error {
	fmt.Fprintf(a.stdout, "%s\n", in.Name)
	fmt.Fprintf(a.stdout, "digest  %s\n", in.Digest)
	if in.Subject != "" {
		fmt.Fprintf(a.stdout, "of      %s\n", in.Subject)
	}
	if in.BaseName != "" || in.BaseDigest != "" {
		fmt.Fprintf(a.stdout, "base    %s\n", cmp.Or(in.BaseName, in.BaseDigest))
		fmt.Fprintf(a.stdout, "adds    %s in overlays\n", bytesString(in.Overlays))
	}
	fmt.Fprintf(a.stdout, "device  %s, of which %s hold content, in %d runs\n", bytesString(in.DeviceSize), bytesString(in.Live), in.Runs)
	fmt.Fprintf(a.stdout, "index   %s\n\n", bytesString(in.IndexBytes))
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "stream\tchunks\tcontent\tshown\tstored\tratio\tshared\t")
	for _, s := range in.Streams {
		name := s.Kind
		if len(s.DiffID) > 19 {
			name = s.DiffID[7:19]
		}
		row(w, name, s.Chunks, s.Content, s.Live, s.Stored, s.Shared)
	}
	row(w, "all", in.Chunks, in.Content, in.Live, in.Stored, in.Shared)
	return w.Flush()
}

func row(w *tabwriter.Writer, name string, chunks int, content, live, stored, shared int64) {
	share := func(part, of int64) string {
		if of == 0 {
			return "-"
		}
		return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(of))
	}
	fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t\n", name, chunks, bytesString(content), share(live, content),
		bytesString(stored), share(stored, content), share(shared, content))
}
