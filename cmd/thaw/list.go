package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
)

func listCommand(a *app) *cobra.Command {
	var cache string
	c := &cobra.Command{
		Use:   "list",
		Short: "List the devices of a running server",
		Long: `list shows the devices of the server that uses a cache directory: the digest of the
block image, the size of the device, how much of its content is in the cache, its
state, how many clients have it open, and how much of its prefetch is done. If clients
may write to a device, it also shows how much they have changed.

On a terminal, names are shortened to fit. --json prints everything that the server
tells of a device.`,
		Example: `  thaw list
  thaw list --cache /var/cache/thaw
  thaw list --json | jq -r 'select(.state == "ready") | .name'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return a.list(c.Context(), cache) },
	}
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON, a line for each device")
	return c
}

// listedDevice is a line of --json.
type listedDevice struct {
	Type string `json:"type"`
	host.DeviceInfo
}

func (a *app) list(ctx context.Context, cache string) error {
	client, err := control(cache)
	if err != nil {
		return err
	}
	defer client.Close()
	devices, err := client.Devices(ctx)
	if err != nil {
		return err
	}
	if a.json {
		for _, d := range devices {
			if err := a.printJSON(listedDevice{"device", d}); err != nil {
				return err
			}
		}
		return nil
	}
	width, _, _ := a.stdoutSize()
	if len(devices) == 0 {
		_, err := fmt.Fprintln(a.stdout, "the server has no devices")
		return err
	}
	_, err = fmt.Fprintln(a.stdout, strings.Join(deviceTable(devices, width), "\n"))
	return err
}

// Columns of the table of devices. The name has what the others leave.
var deviceColumns = []struct {
	title string
	right bool // aligned
}{{"id", true}, {"name", false}, {"digest", false}, {"size", true}, {"resident", true}, {"state", false}, {"users", true}, {"prefetch", false}, {"changed", false}}

const (
	nameColumn = 1
	leastName  = 12
)

// deviceTable returns the lines of a table that is width columns wide if that is
// possible; 0: as wide as it must be.
func deviceTable(devices []host.DeviceInfo, width int) (lines []string) {
	columns := deviceColumns
	if !slices.ContainsFunc(devices, func(d host.DeviceInfo) bool { return d.Overlay != nil }) {
		columns = columns[:len(columns)-1] // nobody has changed anything
	}
	rows := make([][]string, 1, len(devices)+1)
	for _, c := range columns {
		rows[0] = append(rows[0], c.title)
	}
	for _, d := range devices {
		row := []string{
			d.ID, printable(d.Name), shortDigest(d.Digest), knownSize(d, d.Size), knownSize(d, d.Resident), string(d.State), fmt.Sprint(d.Users), prefetched(d), changed(d.Overlay),
		}
		rows = append(rows, row[:len(columns)])
	}
	wide := make([]int, len(columns))
	all := 2 * (len(wide) - 1)
	for i := range wide {
		for _, r := range rows {
			wide[i] = max(wide[i], utf8.RuneCountInString(r[i]))
		}
		all += wide[i]
	}
	if over := all - width; width > 0 && over > 0 {
		wide[nameColumn] = max(wide[nameColumn]-over, min(leastName, wide[nameColumn]))
	}
	for _, r := range rows {
		var b strings.Builder
		r[nameColumn] = shorten(r[nameColumn], wide[nameColumn])
		for i, cell := range r {
			pad := strings.Repeat(" ", wide[i]-utf8.RuneCountInString(cell))
			if i > 0 {
				b.WriteString("  ")
			}
			if columns[i].right {
				b.WriteString(pad + cell)
			} else {
				b.WriteString(cell + pad)
			}
		}
		lines = append(lines, strings.TrimRight(b.String(), " "))
	}
	return lines
}

// shorten drops the begin of a name: its end tells images apart.
func shorten(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return "…" + string(r[len(r)-most+1:])
	}
	return s
}

// printable replaces what would move the cursor, or worse: clients name devices.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, s)
}

func shortDigest(d string) string {
	if _, hex, ok := strings.Cut(d, ":"); ok {
		return fmt.Sprintf("%.12s", hex)
	}
	return "-"
}

// knownSize is "-" until the device is ready.
func knownSize(d host.DeviceInfo, n int64) string {
	if d.Digest == "" {
		return "-"
	}
	return bytesString(n)
}

// changed is how much clients have changed.
func changed(o *host.OverlayInfo) string {
	switch {
	case o == nil:
		return "-"
	case o.Error != "":
		return "poisoned"
	case o.Limit > 0:
		return fmt.Sprintf("%s, %s of %s", bytesString(o.Data+o.Zero), bytesString(o.Data), bytesString(o.Limit))
	}
	return bytesString(o.Data + o.Zero)
}

func prefetched(d host.DeviceInfo) string {
	p := d.Prefetch
	if p == nil || p.State == "none" {
		return "-"
	}
	share := "0 %"
	if p.Chunks > 0 {
		share = fmt.Sprintf("%d %%", 100*p.DoneChunks/p.Chunks)
	}
	switch {
	case p.State == "running":
		return share
	case p.State == "ended" && p.DoneChunks >= p.Chunks:
		return "done"
	case p.State == "ended":
		return "ended " + share
	}
	return p.State
}
