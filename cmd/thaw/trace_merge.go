package main

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"thaw/tracefile"
)

func traceMergeCommand(a *app) *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "merge TRACE... -o FILE",
		Short: "Merge traces of several starts into one",
		Long: `merge combines traces of the same image into one trace. The merged trace lists first
what most starts read. It records for each block how many starts read it, so that
"thaw trace pack" can leave out what few starts read. It counts as all of the starts
that it was made of.`,
		Example: `  thaw trace merge monday.trace tuesday.trace wednesday.trace thursday.trace -o week.trace
  thaw trace pack registry.example/team/app:v1 week.trace`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			if out == "" {
				return usageError{fmt.Errorf("name the file to write with --output")}
			}
			return a.traceMerge(c.Context(), args, out)
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "write to `FILE`")
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// mergedTrace is what --json prints.
type mergedTrace struct {
	Type   string `json:"type"`
	File   string `json:"file"`
	Starts uint32 `json:"starts"`
	Ranges int    `json:"ranges"`
	Bytes  int64  `json:"bytes"`      // that any of the starts touched
	Rare   int64  `json:"rare_bytes"` // that pack leaves out by default
}

func (a *app) traceMerge(ctx context.Context, paths []string, out string) error {
	var traces []*tracefile.Trace
	for _, path := range paths {
		t, _, err := readTrace(ctx, path)
		if err != nil {
			return err
		}
		if t.Cut != nil {
			fmt.Fprintf(a.stderr, "%s ends early; merge takes the part that is there: %v\n", path, t.Cut)
		}
		traces = append(traces, t)
	}
	m, err := tracefile.Merge(traces...)
	if err != nil {
		return err
	}
	// The file is written last, so that an error does not cost the old one. It may be one
	// of those that were read.
	var b bytes.Buffer
	if err := m.Write(&b); err != nil {
		return err
	}
	if err := os.WriteFile(out, b.Bytes(), 0o666); err != nil {
		return err
	}
	_, rare := m.Common(tracefile.DefaultLeast)
	if a.json {
		return a.printJSON(mergedTrace{"merged", out, m.Starts, len(m.Touches), m.Bytes(), rare})
	}
	_, err = fmt.Fprintf(a.stdout, "%s: %s, %s in %s; fewer than %d %% of the starts touched %s of it\n",
		out, count(int(m.Starts), "start"), bytesString(m.Bytes()), count(len(m.Touches), "range"), tracefile.DefaultLeast, bytesString(rare))
	return err
}
