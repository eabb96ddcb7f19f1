package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/tracefile"
)

func traceCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "trace",
		Short: "Show recorded starts, and store them beside their images",
		Long: `A trace lists the blocks that a start has read, and when. "thaw serve --record FILE"
records one. "thaw serve --trace auto" prefetches from the traces that are stored
beside an image, and records a trace if there are none.`,
		Example: `  thaw serve registry.example/team/app:v1 --record app.trace
  thaw trace show app.trace
  thaw trace push registry.example/team/app:v1 app.trace
  thaw trace pack registry.example/team/app:v1
  thaw serve registry.example/team/app:v1 --trace auto`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("there is no command %q of trace", args[0])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(traceShowCommand(a), tracePlotCommand(a), traceExportCommand(a), tracePushCommand(a), traceMergeCommand(a), tracePackCommand(a), traceStopCommand(a))
	return c
}

func traceShowCommand(a *app) *cobra.Command {
	var image string
	var pin []string
	c := &cobra.Command{
		Use:   "show FILE",
		Short: "Summarize a trace",
		Example: `  thaw trace show app.trace
  thaw trace show app.trace --image registry.example/team/app:v1    # and what lies in which layer`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.traceShow(c.Context(), args[0], image, pin) },
	}
	c.Flags().StringVar(&image, "image", "", "the trace was recorded of `IMAGE`: show what lies in which layer")
	c.Flags().StringArrayVar(&pin, "pin", nil, pinUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

func (a *app) traceShow(ctx context.Context, path, image string, pin pinFlags) error {
	t, _, err := readTrace(ctx, path)
	if err != nil {
		return err
	}
	var b *host.BlockImage
	var s *tracefile.Summary
	if image == "" && len(pin) > 0 {
		return errPinWithoutImage
	}
	if image == "" {
		s, err = t.Summarize(nil)
	} else {
		find, accessErr := a.access(ctx, pin, image)
		if accessErr != nil {
			return accessErr
		}
		defer find.Close()
		if b, err = find.Find(ctx, image); err != nil {
			return err
		}
		s, err = t.Summarize(b.Index)
	}
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(shownTrace{"trace", s})
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1e3) }
	fmt.Fprintf(a.stdout, "starts   %d, index sha256:%.12s…\n", s.Starts, s.Index)
	fmt.Fprintf(a.stdout, "touched  %s of a device of %s, in %s; %s had to be fetched\n",
		bytesString(s.Bytes), bytesString(s.Device), count(s.Ranges, "range"), bytesString(s.Misses))
	fmt.Fprintf(a.stdout, "time     %s to the last first touch; recording: %s after %s\n", ms(s.Duration), s.Ended, ms(s.Recorded))
	if s.Dropped > 0 {
		fmt.Fprintf(a.stdout, "dropped  %s were read too fast to be recorded\n", bytesString(s.Dropped))
	}
	if s.Cut != "" {
		fmt.Fprintf(a.stdout, "cut      %s\n", s.Cut)
	}
	for _, p := range s.Times {
		fmt.Fprintf(a.stdout, "%6d %% of it by %s\n", p.Percent, ms(p.At))
	}
	for _, l := range s.Streams {
		name := fmt.Sprintf("stream %d", l.Stream)
		if l.Stream == tracefile.Hole {
			fmt.Fprintf(a.stdout, "%-10s %s, which no stream has: they are zeros\n", "holes", bytesString(l.Bytes))
			continue
		} else if b.Manifest.Role(l.Stream) == flatten.RoleMetadata {
			name = "metadata"
		}
		fmt.Fprintf(a.stdout, "%-10s %s of %s, in %s, stored as %s\n", name, bytesString(l.Bytes), bytesString(l.Size), count(l.Chunks, "chunk"), bytesString(l.Stored))
	}
	return nil
}

// shownTrace is what --json prints.
type shownTrace struct {
	Type string `json:"type"`
	*tracefile.Summary
}

func traceExportCommand(a *app) *cobra.Command {
	var format, out, device string
	c := &cobra.Command{
		Use:   "export FILE",
		Short: "Convert a trace for other programs",
		Long: `export writes a trace as an iolog, which fio replays against any device, or as text
in the form of blkparse.`,
		Example: `  thaw trace export app.trace --format fio --device /dev/nbd0 -o app.log
  fio --name=start --ioengine=psync --direct=1 --readonly --read_iolog=app.log`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			t, _, err := readTrace(c.Context(), args[0])
			if err != nil {
				return err
			}
			if out == "" {
				return exportTrace(t, a.stdout, format, device)
			}
			// The file is written last, so that an error does not cost the old one.
			var b bytes.Buffer
			if err := exportTrace(t, &b, format, device); err != nil {
				return err
			}
			return os.WriteFile(out, b.Bytes(), 0o666)
		},
	}
	c.Flags().StringVar(&format, "format", "fio", "write `FORMAT`: fio or blkparse")
	c.Flags().StringVarP(&out, "output", "o", "", "write to `FILE` (default: stdout)")
	c.Flags().StringVar(&device, "device", "/dev/nbd0", "`PATH` of the device that a fio log names")
	return c
}

func exportTrace(t *tracefile.Trace, w io.Writer, format, device string) error {
	switch format {
	case "fio":
		return t.WriteFio(w, device)
	case "blkparse":
		return t.WriteBlkparse(w)
	}
	return usageError{fmt.Errorf("--format %q: it must be fio or blkparse", format)}
}

func tracePushCommand(a *app) *cobra.Command {
	var pin []string
	c := &cobra.Command{
		Use:     "push IMAGE FILE",
		Short:   "Store a trace beside its image",
		Example: `  thaw trace push registry.example/team/app:v1 app.trace`,
		Args:    args(cobra.ExactArgs(2)),
		RunE:    func(c *cobra.Command, args []string) error { return a.tracePush(c.Context(), args[0], args[1], pin) },
	}
	c.Flags().StringArrayVar(&pin, "pin", nil, pinUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// pushedTrace is what --json prints.
type pushedTrace struct {
	Type   string `json:"type"`
	Target string `json:"target"`
	Digest string `json:"digest"`
}

func (a *app) tracePush(ctx context.Context, image, path string, pin pinFlags) error {
	t, file, err := readTrace(ctx, path)
	if err != nil {
		return err
	}
	find, err := a.access(ctx, pin, image)
	if err != nil {
		return err
	}
	defer find.Close()
	b, err := find.Find(ctx, image)
	if err != nil {
		return err
	}
	if t.Index != b.IndexDigest() {
		return fmt.Errorf("push %s: %w: it was recorded of the index sha256:%v, but %s has the index %s", path, tracefile.ErrOtherImage, t.Index, image, b.Manifest.Index.Digest)
	}
	d, err := b.PushTrace(ctx, file, false)
	if err != nil {
		return err
	}
	target := b.Repo.Ref().WithDigest(d.Digest).String()
	if a.json {
		return a.printJSON(pushedTrace{"pushed", target, d.Digest.String()})
	}
	_, err = fmt.Fprintln(a.stdout, target)
	return err
}

func traceStopCommand(a *app) *cobra.Command {
	var cache, device string
	c := &cobra.Command{
		Use:     "stop",
		Short:   "End the recordings of a running server",
		Example: `  thaw trace stop --cache /var/cache/thaw`,
		Args:    args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := control(cache)
			if err != nil {
				return err
			}
			defer client.Close()
			if device != "" {
				if device, err = deviceID(c.Context(), client, device); err != nil {
					return err
				}
			}
			stopped, err := client.StopTraces(c.Context(), device)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(stoppedRecordings{"stopped", stopped})
			}
			_, err = fmt.Fprintf(a.stdout, "%s ended\n", count(stopped, "recording"))
			return err
		},
	}
	c.Flags().StringVar(&device, "device", "", "end the recording of `DEVICE` only: its ID or its name, as in thaw list")
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// stoppedRecordings is what --json prints.
type stoppedRecordings struct {
	Type       string `json:"type"`
	Recordings int    `json:"recordings"`
}
