package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

func listCommand(a *app) *cobra.Command {
	var cache string
	c := &cobra.Command{
		Use:   "list",
		Short: "List the devices, nodes and mounts of a running server",
		Long: `list shows the devices of the server that uses a cache directory: the digest of the
block image, the size of the device, how much of its content is in the cache, its
state, how many clients have it open, and how much of its prefetch is done. If clients
may write to a device, it also shows how much they have changed, and if the server
has sockets for virtual machines, the path of the device's.

It also shows the nodes of the server, which thaw attach and thaw mount have made:
the path of the node, its driver, its state, where it is mounted, and its image. A
node is "recovering" after its server was killed until this server goes on serving
it, and "lost" if that is impossible: thaw mount then heals its mount.

On a terminal, names are shortened to fit. --json prints everything that the server
tells of a device.`,
		Example: `  thaw list
  thaw list --cache /var/cache/thaw
  thaw list --json | jq -r 'select(.state == "ready") | .name'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return a.list(c.Context(), cache) },
	}
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON, a line for each device and for each node")
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
	if errors.Is(err, api.ErrNoServer) {
		return withKeptNodes(err, client.Dir())
	}
	if err != nil {
		return err
	}
	nodes, err := client.Nodes(ctx)
	if err != nil && !api.Unknown(err) { // an older server has none
		return err
	}
	if a.json {
		for _, d := range devices {
			if err := a.printJSON(listedDevice{"device", d}); err != nil {
				return err
			}
		}
		for _, n := range nodes {
			if err := a.printJSON(listedNode{"node", n}); err != nil {
				return err
			}
		}
		return nil
	}
	width, _, _ := a.stdoutSize()
	lines := []string{"the server has no devices"}
	if len(devices) > 0 {
		lines = deviceTable(devices, width)
	}
	if len(nodes) > 0 {
		lines = append(append(lines, ""), nodeTable(nodes, width)...)
	}
	_, err = fmt.Fprintln(a.stdout, strings.Join(lines, "\n"))
	return err
}

// withKeptNodes adds to err, which says that there is no server, which nodes the last server
// had when it was killed.
func withKeptNodes(err error, cache string) error {
	nodes, e := host.KeptNodes(cache)
	if e != nil || len(nodes) == 0 {
		return err
	}
	n := nodes[0]
	heal := "thaw attach " + shellWord(n.Name) + " has a new server go on with it"
	if n.Mount != "" {
		heal = "thaw mount " + shellWord(n.Name) + " " + shellWord(n.Mount) + " heals it, with the flags of before"
	}
	return fmt.Errorf("%w %s: the last one was killed with %s, such as %s: %s", api.ErrNoServer, cache, count(len(nodes), "node"), n.Node, heal)
}

// listedNode is a line of --json.
type listedNode struct {
	Type string `json:"type"`
	host.NodeInfo
}

// column is a column of a table.
type column struct {
	title string
	right bool // aligned
}

// Columns of the tables. The name has what the others leave.
var (
	deviceColumns = []column{{"id", true}, {"name", false}, {"digest", false}, {"size", true}, {"resident", true}, {"state", false}, {"users", true}, {"prefetch", false}, {"changed", false}, {"socket", false}}
	nodeColumns   = []column{{"node", false}, {"image", false}, {"driver", false}, {"access", false}, {"state", false}, {"mount", false}}
)

const (
	nameColumn = 1 // of both tables
	leastName  = 12
)

// nodeTable is deviceTable for nodes.
func nodeTable(nodes []host.NodeInfo, width int) []string {
	var rows [][]string
	for _, n := range nodes {
		access := "read-only"
		if n.Writable {
			access = "writable"
		}
		rows = append(rows, []string{
			cmp.Or(n.Node, "-"), printable(n.Name), cmp.Or(string(n.Driver), "-"), access, string(n.State), cmp.Or(printable(n.Mount), "-"),
		})
	}
	return table(nodeColumns, rows, width)
}

// deviceTable returns the lines of the table of devices.
func deviceTable(devices []host.DeviceInfo, width int) []string {
	writable := slices.ContainsFunc(devices, func(d host.DeviceInfo) bool { return d.Overlay != nil })
	sockets := slices.ContainsFunc(devices, func(d host.DeviceInfo) bool { return d.Socket != "" })
	// Columns in which no device has anything are left out.
	shown := func(column string) bool { return (column != "changed" || writable) && (column != "socket" || sockets) }
	var columns []column
	for _, c := range deviceColumns {
		if shown(c.title) {
			columns = append(columns, c)
		}
	}
	var rows [][]string
	for _, d := range devices {
		all := []string{
			d.ID, printable(d.Name), shortDigest(d.Digest), knownSize(d, d.Size), knownSize(d, d.Resident), string(d.State), fmt.Sprint(d.Users), prefetched(d), changed(d.Overlay),
			cmp.Or(printable(d.Socket), "-"),
		}
		var row []string
		for i, cell := range all {
			if shown(deviceColumns[i].title) {
				row = append(row, cell)
			}
		}
		rows = append(rows, row)
	}
	return table(columns, rows, width)
}

// table returns the lines of a table that is width columns wide if that is possible; 0: as
// wide as it must be.
func table(columns []column, rows [][]string, width int) (lines []string) {
	var titles []string
	for _, c := range columns {
		titles = append(titles, c.title)
	}
	rows = slices.Insert(rows, 0, titles)
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
