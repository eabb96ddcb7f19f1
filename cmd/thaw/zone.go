package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"thaw/cmd/thaw/internal/host"
)

func zoneCommand(a *app) *cobra.Command {
	var cache string
	c := &cobra.Command{
		Use:   "zone",
		Short: "Show the zone of a running server, and its peers",
		Long: `zone shows what the server that uses a cache directory shares with the other hosts of
its zone: how much it has read from registries and from peers, how much it has sent to
peers, and which part of that was compressed. Chunks travel compressed if the sender got
them lately: it keeps up to 64 MiB of them in memory for its peers. For each peer, zone
shows:

  state     working; resting, after failures; spared, because it said that it is
            busy; or distrusted, because it has sent wrong bytes
  answers   whether it has answered within a second, when zone asked it just now
  uploads   how many requests of all its peers it is answering
  received  what this server has got from it
  sent      what this server has sent to it
  p95       the time that 95 % of the requests to it took at most
  failed    how many requests to it have failed

A server is a member of a zone if it was started with --zone: see thaw serve --help.`,
		Example: `  thaw zone
  thaw zone --cache /var/cache/thaw
  thaw zone --json | jq '.peers[] | select(.state != "working") | .name'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return a.zone(c.Context(), cache) },
	}
	c.Flags().StringVar(&cache, "cache", "", controlCacheUsage)
	c.Flags().BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// shownZone is the result as --json prints it.
type shownZone struct {
	Type string `json:"type"`
	host.ZoneStatus
}

func (a *app) zone(ctx context.Context, cache string) error {
	client, err := control(cache)
	if err != nil {
		return err
	}
	defer client.Close()
	z, err := client.Zone(ctx, true)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(shownZone{"zone", z})
	}
	width, _, _ := a.stdoutSize()
	_, err = fmt.Fprintln(a.stdout, strings.Join(zoneLines(z, width), "\n"))
	return err
}

var peerColumns = []column{
	{"state", false}, {"name", false}, {"address", false}, {"answers", false}, {"uploads", true}, {"received", true}, {"sent", true}, {"p95", true}, {"failed", true},
}

// zoneLines are for people, in width columns if that is possible; 0: any number.
func zoneLines(z host.ZoneStatus, width int) []string {
	security := "with TLS"
	if !z.TLS {
		security = "without TLS"
	}
	lines := []string{
		fmt.Sprintf("zone      %s, %s, %s", z.Zone, count(z.Members, "member"), security),
		fmt.Sprintf("host      %s at %s", z.Name, z.Address),
		fmt.Sprintf("registry  %s read", bytesString(z.Registry)),
		fmt.Sprintf("peers     %s received, %s sent, %s under way", bytesString(z.Received), bytesString(z.Sent), count(z.Uploads, "upload")),
		fmt.Sprintf("          compressed: %s of what was received, %s of what was sent", share(z.ReceivedStored, z.Received), share(z.SentStored, z.Sent)),
		fmt.Sprintf("          in memory for them: %s of compressed chunks, which served %d of %d requests", bytesString(z.Kept), z.Hits, z.Hits+z.Misses),
		fmt.Sprintf("          of their requests %d answered, %d sent to other members, %d for what is not here, %d refused, %d too many, %d failed",
			z.Served, z.Referred, z.Absent, z.Refused, z.Busy, z.Failed),
	}
	if z.Alone {
		lines = append(lines, "          no other member can be reached: this server asks the registry for everything")
		if z.Error != "" {
			lines = append(lines, "          "+printable(z.Error))
		}
	}
	if len(z.Peers) == 0 {
		return lines
	}
	var rows [][]string
	for _, p := range z.Peers {
		address, answers, uploads, p95 := p.Address, "no", "-", "-"
		if address == "" {
			address, answers = "has left", "-"
		}
		if p.Health != nil {
			answers, uploads = "yes", fmt.Sprint(p.Health.Uploads)
		}
		if p.P95 > 0 {
			p95 = (time.Duration(p.P95*1e6) * time.Microsecond).Round(100 * time.Microsecond).String()
		}
		state := string(p.State)
		if !p.Until.IsZero() {
			state += " until " + p.Until.Local().Format(time.TimeOnly)
		}
		rows = append(rows, []string{
			state, printable(p.Name), printable(address), answers, uploads, bytesString(p.Received), bytesString(p.Sent), p95, fmt.Sprint(p.Failed + p.Wrong),
		})
	}
	return append(append(lines, ""), table(peerColumns, rows, width)...)
}

// share is a part of all in percent.
func share(part, all int64) string {
	return fmt.Sprintf("%d %%", min(part*100/max(all, 1), 100))
}

// absoluteSeed makes a file that lists hosts valid for processes with another working
// directory.
func absoluteSeed(s string) (string, error) {
	path, ok := strings.CutPrefix(s, "file:")
	if !ok {
		return s, nil
	}
	path, err := filepath.Abs(path)
	return "file:" + path, err
}
