package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/tracefile/plot"
)

func tracePlotCommand(a *app) *cobra.Command {
	var image, out string
	var pin []string
	var o plot.Options
	c := &cobra.Command{
		Use:   "plot FILE",
		Short: "Draw a trace",
		Long: `plot draws a trace as an SVG or a PNG. The upper chart shows which parts of the
device were read at what time; reads that had to be fetched stand out. The lower
chart shows how many bytes had been read by what time. With --image each layer has
a colour of its own. Stretches of the device that were not read are folded, and
marks that would cover each other are drawn as one.`,
		Example: `  thaw trace plot app.trace -o app.svg
  thaw trace plot app.trace --image registry.example/team/app:v1 -o app.png    # coloured by layer`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			return a.tracePlot(c.Context(), args[0], image, out, o, pin)
		},
	}
	f := c.Flags()
	f.StringVarP(&out, "output", "o", "", "write the picture to `FILE`, whose name ends in .svg or .png")
	f.StringVar(&image, "image", "", "the trace was recorded of `IMAGE`: give each layer a colour")
	f.StringArrayVar(&pin, "pin", nil, pinUsage)
	f.IntVar(&o.Width, "width", plot.DefaultWidth, "width of the picture: `N` pixels")
	f.IntVar(&o.Height, "height", plot.DefaultHeight, "height of the picture: `N` pixels")
	return c
}

func (a *app) tracePlot(ctx context.Context, path, image, out string, o plot.Options, pin pinFlags) error {
	var write func(*plot.Picture, io.Writer) error
	switch ext := filepath.Ext(out); {
	case out == "":
		return usageError{errors.New("name the file to write with -o, such as -o start.svg or -o start.png")}
	case strings.EqualFold(ext, ".svg"):
		write = (*plot.Picture).WriteSVG
	case strings.EqualFold(ext, ".png"):
		write = (*plot.Picture).WritePNG
	default:
		return usageError{fmt.Errorf("%s: the name of a picture must end in .svg or .png", out)}
	}
	for _, n := range []int{o.Width, o.Height} {
		if n < plot.MinSize || n > plot.MaxSize {
			return usageError{fmt.Errorf("a width or height of %d: it must be %d to %d pixels", n, plot.MinSize, plot.MaxSize)}
		}
	}
	t, _, err := readTrace(ctx, path)
	if err != nil {
		return err
	}
	if image == "" {
		if len(pin) > 0 {
			return errPinWithoutImage
		}
		o.Title = filepath.Base(path)
		if path == "-" {
			o.Title = "" // plot has a better title than "-"
		}
	} else {
		find, err := a.access(ctx, pin, image)
		if err != nil {
			return err
		}
		defer find.Close()
		b, err := find.Find(ctx, image)
		if err != nil {
			return err
		}
		o.Title, o.Index, o.Names = image, b.Index, streamNames(b)
		for i := range b.Index.Streams {
			if b.Manifest.Role(i) == flatten.RoleMetadata {
				o.Metadata = append(o.Metadata, i)
			}
		}
	}
	p, err := plot.New(t, o)
	if err != nil {
		return err
	}
	// The file is written last, so that an error does not cost the old one.
	var b bytes.Buffer
	if err := write(p, &b); err != nil {
		return fmt.Errorf("draw %s: %w", out, err)
	}
	return os.WriteFile(out, b.Bytes(), 0o666)
}

// streamNames names the streams of an image in a plot.
func streamNames(b *host.BlockImage) []string {
	var names []string
	for i := range b.Index.Streams {
		name := string(b.Manifest.Role(i))
		switch b.Manifest.Role(i) {
		case flatten.RoleMetadata:
		case flatten.RoleLayer:
			name = fmt.Sprintf("layer %d (%.12s)", i, b.Manifest.DiffID(i).Hex) // as inspect has it
		default:
			name = fmt.Sprintf("%s %d", cmp.Or(name, "stream"), i)
		}
		names = append(names, name)
	}
	return names
}
