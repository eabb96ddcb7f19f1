package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func manCommand(*app) *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages",
		Long: `man writes a manual page for each command to the directory DIR, which it creates
if it does not exist. The pages have the date of the commit that thaw was built
from, or that of the environment variable SOURCE_DATE_EPOCH.`,
		Example: `  thaw man /usr/local/share/man/man1
  man thaw-serve`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return writeMan(c.Root(), args[0]) },
	}
}

func writeMan(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	v := thisVersion()
	h := &doc.GenManHeader{Section: "1", Source: "thaw " + v.Version, Manual: "thaw"}
	if t, err := time.Parse(time.RFC3339, v.CommitTime); err == nil {
		h.Date = &t
	}
	root.DisableAutoGenTag = true // the day on which they were written
	if err := doc.GenManTree(root, h, dir); err != nil {
		return fmt.Errorf("write manual pages to %s: %w", dir, err)
	}
	return nil
}
