package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
)

func overlayCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "overlay",
		Short: "List, examine and remove what was written to devices",
		Long: `overlay works on overlays: the directories in which "thaw serve --overlay DIR" and
--overlay-each DIR keep what clients have written.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("there is no command %q", "overlay "+args[0])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(overlayLsCommand(a), overlayInspectCommand(a), overlayDiffCommand(a), overlayRmCommand(a))
	return c
}

// shownOverlay is an overlay as --json prints it.
type shownOverlay struct {
	Type    string `json:"type"`
	Overlay string `json:"overlay"` // its directory
	Image   string `json:"image"`   // the block image that it was made on, by digest
	Digest  string `json:"digest"`
	Size    int64  `json:"device_bytes"`
	Data    int64  `json:"data_bytes"` // in changed blocks with data
	Zero    int64  `json:"zero_bytes"` // in changed blocks that read as zeros
	Space   int64  `json:"space_bytes"`
	Levels  int    `json:"levels"` // 2 while it is committed, or until it is opened after that was cut off
	InUse   bool   `json:"in_use"`
}

func readOverlay(dir string) (shownOverlay, error) {
	in, err := blockmap.ReadOverlay(blockmap.OS, dir)
	return shownOverlay{"overlay", dir, in.Image, "sha256:" + in.Digest.String(), in.Size, in.Data, in.Zero, in.Space, in.Levels, in.InUse}, err
}

func overlayLsCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "ls [DIR...]",
		Short: "List overlays and how much they change",
		Long: `ls lists overlays. Each DIR is an overlay, or a directory of overlays, as that of
"thaw serve --overlay-each". It defaults to the working directory. For each overlay
ls shows how many bytes of the device it changes, the space that it takes on disk,
whether a server has it open, and the block image that it was made on. It asks no
registry and no server.`,
		Example: `  thaw overlay ls /var/lib/overlays
  thaw overlay ls /var/lib/overlays --json | jq -r 'select(.in_use | not) | .overlay'`,
		RunE: func(_ *cobra.Command, dirs []string) error { return a.overlayLs(dirs) },
	}
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON, a line for each overlay")
	c.ValidArgsFunction = directories
	return c
}

func (a *app) overlayLs(dirs []string) error {
	if len(dirs) == 0 {
		dirs = []string{"."}
	}
	var all []shownOverlay
	var failed error
	for _, dir := range dirs {
		found, err := overlaysIn(dir)
		all = append(all, found...)
		failed = errors.Join(failed, err)
	}
	if a.json {
		for _, o := range all {
			if err := a.printJSON(o); err != nil {
				return err
			}
		}
		return failed
	}
	if len(all) == 0 && failed == nil {
		_, err := fmt.Fprintln(a.stdout, "there are no overlays in "+strings.Join(dirs, " "))
		return err
	}
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
	if len(all) > 0 {
		fmt.Fprintln(w, "overlay\tchanged\tspace\tin use\timage")
	}
	for _, o := range all {
		use := "no"
		if o.InUse {
			use = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", printable(o.Overlay), bytesString(o.Data+o.Zero), bytesString(o.Space), use, printable(o.Image))
	}
	return errors.Join(w.Flush(), failed)
}

// overlaysIn returns the overlay in dir, or the overlays in directories of dir.
func overlaysIn(dir string) (all []shownOverlay, err error) {
	o, err := readOverlay(dir)
	if err == nil {
		return []shownOverlay{o}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	entries, dirErr := os.ReadDir(dir)
	if dirErr != nil {
		return nil, dirErr
	}
	err = nil
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		switch o, oneErr := readOverlay(filepath.Join(dir, e.Name())); {
		case oneErr == nil:
			all = append(all, o)
		case !errors.Is(oneErr, fs.ErrNotExist):
			err = errors.Join(err, oneErr)
		}
	}
	return all, err
}

func overlayInspectCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect DIR",
		Short: "Show what an overlay is of, and how much it changes",
		Long: `inspect shows one overlay: the block image that it was made on, how many blocks it
has changed, the space that it takes on disk, and whether a server has it open. It
asks no registry and no server.`,
		Example: `  thaw overlay inspect /var/lib/vm7`,
		Args:    args(cobra.ExactArgs(1)),
		RunE:    func(_ *cobra.Command, args []string) error { return a.overlayInspect(args[0]) },
	}
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	c.ValidArgsFunction = directories
	return c
}

func (a *app) overlayInspect(dir string) error {
	o, err := readOverlay(dir)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(o)
	}
	share := func(n int64) string {
		return fmt.Sprintf("%s (%.1f %% of the device)", bytesString(n), 100*float64(n)/float64(max(o.Size, 1)))
	}
	fmt.Fprintf(a.stdout, "%s\n", printable(o.Overlay))
	fmt.Fprintf(a.stdout, "image   %s\n", printable(o.Image))
	fmt.Fprintf(a.stdout, "device  %s\n", bytesString(o.Size))
	fmt.Fprintf(a.stdout, "data    %s\n", share(o.Data))
	fmt.Fprintf(a.stdout, "zeros   %s\n", share(o.Zero))
	fmt.Fprintf(a.stdout, "space   %s\n", bytesString(o.Space))
	use := "by no server"
	if o.InUse {
		use = "by a server"
	}
	if o.Levels > 1 {
		use += "; it has two levels, which are merged after a commit, or when it is opened"
	}
	_, err = fmt.Fprintf(a.stdout, "used    %s\n", use)
	return err
}

func overlayDiffCommand(a *app) *cobra.Command {
	var cache string
	var exact bool
	c := &cobra.Command{
		Use:   "diff DIR",
		Short: "Name the files that an overlay changes",
		Long: `diff names the files that were changed in an overlay, as ext4 says, and estimates how
large a commit would be. Each line has a letter, the size of the file, and its path:

    A   added
    M   modified; m if only its owner, mode, times or attributes were
    D   deleted; the size is what it was
    R   renamed, with the path that it had

A filesystem that was not unmounted is shown as the next mount will make it. diff
reads the directories and inodes of the base through the cache, and no contents. The
lines go to stdout, the summary to stderr.

The estimate compresses a sample of what was written; --exact compares and compresses
all of it.`,
		Example: `  thaw overlay diff /var/lib/vm7
  thaw overlay diff /var/lib/vm7 --json | jq -r 'select(.change == "A") | .path'`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return a.overlayDiff(c.Context(), args[0], cache, exact) },
	}
	c.Flags().StringVar(&cache, "cache", "", "read the base through the cache in `DIR` (default: "+cacheUsage+")")
	c.Flags().BoolVar(&exact, "exact", false, "compress all that was written for the estimate, not a sample")
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON: a line for each file, and one for the sum")
	c.ValidArgsFunction = directories
	return c
}

// changedFile is a file as --json prints it.
type changedFile struct {
	Type     string `json:"type"`
	Change   string `json:"change"` // A, M, D or R
	Path     string `json:"path"`
	From     string `json:"from,omitempty"`
	Mode     string `json:"mode"` // octal, as st_mode
	Before   int64  `json:"before_bytes"`
	After    int64  `json:"after_bytes"`
	Written  int64  `json:"written_bytes"` // of its blocks
	Metadata bool   `json:"metadata_only"`
}

// diffSum is the sum as --json prints it.
type diffSum struct {
	Type       string           `json:"type"`
	Overlay    string           `json:"overlay"`
	Added      int              `json:"added"`
	Modified   int              `json:"modified"`
	Deleted    int              `json:"deleted"`
	Renamed    int              `json:"renamed"`
	Filesystem string           `json:"filesystem"` // none, clean or dirty
	Changed    int64            `json:"changed_bytes"`
	Uses       map[string]int64 `json:"changed_bytes_by_use"` // of the blocks, now
	Content    int64            `json:"commit_content_bytes"`
	Stored     int64            `json:"commit_stored_bytes"`
	Exact      bool             `json:"exact"`
}

func (a *app) overlayDiff(ctx context.Context, dir, cache string, exact bool) (err error) {
	c, end, err := a.openClosed(ctx, dir, cache)
	if errors.Is(err, errInUse) {
		return fmt.Errorf("%w: stop the server first", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	sum := diffSum{Type: "sum", Overlay: dir, Uses: make(map[string]int64)}
	files, err := a.diffFiles(ctx, c, &sum)
	if err != nil {
		return err
	}
	e, err := c.Estimate(ctx, exact)
	if err != nil {
		return err
	}
	sum.Changed, sum.Content, sum.Stored, sum.Exact = e.Changed, e.Content, e.Stored, e.Exact
	if a.json {
		for _, d := range files {
			if err := a.printJSON(changedFile{
				"file", string(d.Change), d.Path, d.From, fmt.Sprintf("%06o", d.Mode), d.Before, d.After, d.Written, d.Metadata,
			}); err != nil {
				return err
			}
		}
		return a.printJSON(sum)
	}
	for _, d := range files {
		letter, size := string(d.Change), d.After
		if d.Metadata {
			letter = "m"
		}
		if d.Change == ext4.Deleted {
			size = d.Before
		}
		line := fmt.Sprintf("%s %9s  %s", letter, bytesString(size), printable(d.Path))
		if d.From != "" {
			line += " <- " + printable(d.From)
		}
		if _, err := fmt.Fprintln(a.stdout, line); err != nil {
			return err
		}
	}
	return sum.print(a)
}

// diffFiles compares the filesystem with that of the base.
func (a *app) diffFiles(ctx context.Context, c *host.ClosedOverlay, sum *diffSum) ([]ext4.Difference, error) {
	after := flatten.ReaderAt(ctx, c.Overlay)
	st, err := ext4.ReadState(after)
	if errors.Is(err, ext4.ErrNotExt4) {
		sum.Filesystem = "none"
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sum.Filesystem = "clean"
	if st.Dirty() {
		sum.Filesystem = "dirty"
	}
	var changes []blockmap.Extent
	for x := range c.Changes() {
		if n := len(changes); n > 0 && changes[n-1].End == x.Start {
			changes[n-1].End = x.End
			continue
		}
		changes = append(changes, x.Extent)
	}
	files, err := ext4.Diff(flatten.ReaderAt(ctx, c.BaseDevice()), after, c.Size(), changedIn(changes))
	if err != nil {
		return nil, err
	}
	for _, d := range files {
		switch d.Change {
		case ext4.Added:
			sum.Added++
		case ext4.Modified:
			sum.Modified++
		case ext4.Deleted:
			sum.Deleted++
		case ext4.Renamed:
			sum.Renamed++
		}
	}
	owned, err := ext4.Owners(after, c.Size(), changes)
	if err != nil {
		return nil, err
	}
	for _, o := range owned {
		sum.Uses[string(o.Use)] += o.Len()
	}
	return files, nil
}

// changedIn counts the blocks of a range that are in changes, which are sorted.
func changedIn(changes []blockmap.Extent) func(start, count uint32) uint32 {
	return func(start, count uint32) (n uint32) {
		e := blockmap.Range(int64(start)*blockmap.BlockSize, int64(count)*blockmap.BlockSize)
		i := sort.Search(len(changes), func(i int) bool { return changes[i].End > e.Start })
		for ; i < len(changes) && changes[i].Start < e.End; i++ {
			n += uint32(changes[i].Intersect(e).Len() / blockmap.BlockSize)
		}
		return n
	}
}

// print writes the sum on stderr.
func (s *diffSum) print(a *app) error {
	if s.Filesystem == "none" {
		fmt.Fprintln(a.stderr, "the device has no ext4 filesystem, so no files are known")
	} else {
		fmt.Fprintf(a.stderr, "%s added, %d modified, %d deleted, %d renamed\n", count(s.Added, "file"), s.Modified, s.Deleted, s.Renamed)
	}
	if s.Filesystem == "dirty" {
		fmt.Fprintln(a.stderr, "the filesystem was not unmounted: this is what the next mount will make of it")
	}
	var uses []string
	for _, use := range slices.Sorted(maps.Keys(s.Uses)) {
		uses = append(uses, fmt.Sprintf("%s of %s", bytesString(s.Uses[use]), use))
	}
	line := bytesString(s.Changed) + " changed"
	if len(uses) > 0 {
		line += ": " + strings.Join(uses, ", ")
	}
	about := "about "
	if s.Exact {
		about = ""
	}
	_, err := fmt.Fprintf(a.stderr, "%s\na commit would store %s%s as %s%s\n", line, about, bytesString(s.Content), about, bytesString(s.Stored))
	return err
}

func overlayRmCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "rm DIR...",
		Short: "Remove overlays, and what was written to them",
		Long: `rm removes overlays. What was written to them and not committed is lost. It refuses
an overlay that a server has open, and a directory that is not an overlay.`,
		Example: `  thaw overlay rm /var/lib/vm7`,
		Args:    args(cobra.MinimumNArgs(1)),
		RunE:    func(_ *cobra.Command, dirs []string) error { return a.overlayRm(dirs) },
	}
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON, a line for each overlay")
	c.ValidArgsFunction = directories
	return c
}

func (a *app) overlayRm(dirs []string) (failed error) {
	for _, dir := range dirs {
		o, _ := readOverlay(dir) // a damaged one can be removed, too
		err := blockmap.RemoveOverlay(blockmap.OS, dir)
		if errors.Is(err, blockmap.ErrLocked) {
			err = fmt.Errorf("%w: stop the server that has it first", err)
		}
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		if a.json {
			o.Type = "removed"
			err = a.printJSON(o)
		} else {
			_, err = fmt.Fprintf(a.stdout, "removed %s, with %s of changes\n", printable(dir), bytesString(o.Data+o.Zero))
		}
		if err != nil {
			return err
		}
	}
	return failed
}
