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
	"thaw/tracefile/plot"
)

func tracePlotCommand(a *app) *cobra.Command {
	var image, out string
	var pin []string
	var o plot.Options
	c := &cobra.Command{
		Use:   "plot FILE",
		Short: "Draw a trace",
		Long: `plot draws a trace, as an SVG or a PNG: above, where on the device was read
when, with what had to be fetched apart from what was there; below, how many
bytes had been read by when. With --image each layer has a colour. Stretches
without content are folded, and what would cover each other is drawn as one.`,
		Example: `  thaw trace plot app.trace -o app.svg
  thaw trace plot app.trace --image registry.example/team/app:v1 -o app.png    # coloured by layer`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			return a.tracePlot(c.Context(), args[0], image, out, o, pin)
		},
	}
	f := c.Flags()
	f.StringVarP(&out, "output", "o", "", "file to write, whose name ends in .svg or .png")
	f.StringVar(&image, "image", "", "the image that it is of, to tell layers apart")
	f.StringArrayVar(&pin, "pin", nil, pinUsage)
	f.IntVar(&o.Width, "width", plot.DefaultWidth, "in pixels")
	f.IntVar(&o.Height, "height", plot.DefaultHeight, "in pixels")
	return c
}

func (a *app) tracePlot(ctx context.Context, path, image, out string, o plot.Options, pin pinFlags) error {
	var write func(*plot.Picture, io.Writer) error
	switch ext := filepath.Ext(out); {
	case out == "":
		return usageError{errors.New("where to? Name a file with -o, such as -o start.svg or -o start.png")}
	case strings.EqualFold(ext, ".svg"):
		write = (*plot.Picture).WriteSVG
	case strings.EqualFold(ext, ".png"):
		write = (*plot.Picture).WritePNG
	default:
		return usageError{fmt.Errorf("%s: pictures are written as .svg or .png, and the name says which", out)}
	}
	for _, n := range []int{o.Width, o.Height} {
		if n < plot.MinSize || n > plot.MaxSize {
			return usageError{fmt.Errorf("a width or height of %d: it is from %d to %d pixels", n, plot.MinSize, plot.MaxSize)}
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
			o.Title = "" // it has a better one
		}
	} else {
		find, err := a.access(ctx, pin, image)
		if err != nil {
			return err
		}
		defer find.close()
		b, err := find.find(ctx, image)
		if err != nil {
			return err
		}
		o.Title, o.Index, o.Names = image, b.index, streamNames(b)
		for i := range b.index.Streams {
			if b.manifest.Role(i) == flatten.RoleMetadata {
				o.Metadata = append(o.Metadata, i)
			}
		}
	}
	p, err := plot.New(t, o)
	if err != nil {
		return err
	}
	// All of it before the file, so that what is there is not lost to an error.
	var b bytes.Buffer
	if err := write(p, &b); err != nil {
		return fmt.Errorf("draw %s: %w", out, err)
	}
	return os.WriteFile(out, b.Bytes(), 0o666)
}

// streamNames are what people call the streams of an image.
func streamNames(b *blockImage) []string {
	var names []string
	for i := range b.index.Streams {
		name := string(b.manifest.Role(i))
		switch b.manifest.Role(i) {
		case flatten.RoleMetadata:
		case flatten.RoleLayer:
			name = fmt.Sprintf("layer %d (%.12s)", i, b.manifest.DiffID(i).Hex) // as inspect has it
		default:
			name = fmt.Sprintf("%s %d", cmp.Or(name, "stream"), i)
		}
		names = append(names, name)
	}
	return names
}
