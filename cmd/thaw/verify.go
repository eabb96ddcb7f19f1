package main

import (
	"context"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"thaw/blockmap/flatten"
)

func verifyCommand(a *app) *cobra.Command {
	var pin []string
	c := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Download a block image and check all of it",
		Long: `verify downloads all of a block image and checks it: the digests of the
manifest, the index, the blobs and the chunks, what the index says, and the
structure of the ext4 filesystem. It prints one line if all is right, and fails
with the first fault that it finds.`,
		Example: `  thaw verify registry.example/team/app:v1`,
		Args:    args(cobra.ExactArgs(1)),
		RunE:    func(c *cobra.Command, args []string) error { return a.verify(c.Context(), args[0], pin) },
	}
	c.Flags().StringVar(&a.temp, "temp", "", "keep the filesystem's metadata in `DIR` meanwhile (default: $TMPDIR, or /tmp)")
	c.Flags().StringArrayVar(&pin, "pin", nil, pinUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// verified is what --json prints.
type verified struct {
	Type    string  `json:"type"`
	Name    string  `json:"name"`
	Digest  string  `json:"digest"`
	Chunks  int     `json:"chunks"`
	Stored  int64   `json:"stored_bytes"`
	Content int64   `json:"content_bytes"`
	Seconds float64 `json:"seconds"`
}

func (a *app) verify(ctx context.Context, name string, pin pinFlags) error {
	began := time.Now()
	find, err := a.access(ctx, pin, name)
	if err != nil {
		return err
	}
	defer find.Close()
	b, err := find.Find(ctx, name)
	if err != nil {
		return err
	}
	open := func(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) { return b.Repo.OpenBlob(ctx, d) }
	policy, err := b.Manifest.Policy()
	if err != nil {
		return fmt.Errorf("verify %s: %w", name, err)
	}
	if err := flatten.Verify(ctx, b.Manifest, b.Index, open, policy, a.temp); err != nil {
		return fmt.Errorf("verify %s: %w", name, err)
	}
	in := describe(b, new(flatten.Reporter).Report(b.Manifest, b.Index))
	v := verified{"verified", name, in.Digest, in.Chunks, in.Stored, in.Content, time.Since(began).Seconds()}
	if a.json {
		return a.printJSON(v)
	}
	_, err = fmt.Fprintf(a.stdout, "%s is whole: %d chunks, %s stored, %s of content, and a sound filesystem (%.1f s)\n",
		name, v.Chunks, bytesString(v.Stored), bytesString(v.Content), v.Seconds)
	return err
}
