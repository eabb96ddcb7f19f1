package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"thaw/blockmap"
	"thaw/cmd/thaw/internal/host"
	"thaw/cmd/thaw/internal/host/api"
)

func statusCommand(a *app) *cobra.Command {
	var cache string
	var watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what a running server does",
		Long: `status shows what the server that uses a cache directory does: its cache, what it
fetches from registries, its clients, and its devices. Rates are averages of the
last 10 s.

With --watch it does so once a second, until it is interrupted. It fails when the
server ends.`,
		Example: `  thaw status
  thaw status --cache /var/cache/thaw --watch
  thaw status --json | jq .counts.fetched_bytes`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := control(cache)
			if err != nil {
				return err
			}
			defer client.Close()
			if watch {
				return a.watchStatus(c.Context(), client)
			}
			s, err := askStatus(c.Context(), client, a.json)
			if err != nil {
				return err
			}
			return a.printStatus(s)
		},
	}
	f := c.Flags()
	f.StringVar(&cache, "cache", "", controlCacheUsage)
	f.BoolVar(&watch, "watch", false, "show the status once a second")
	f.BoolVar(&a.json, "json", false, "print the result as JSON; with --watch, a line for each second")
	return c
}

// shownStatus is what status shows. --json prints all but the devices, which are list's.
type shownStatus struct {
	Type string `json:"type"`
	host.Status
	devices []host.DeviceInfo
}

func askStatus(ctx context.Context, client *api.Client, json bool) (s *shownStatus, err error) {
	s = &shownStatus{Type: "status"}
	if s.Status, err = client.Status(ctx); err == nil && !json {
		s.devices, err = client.Devices(ctx)
	}
	return s, err
}

func (a *app) printStatus(s *shownStatus) error {
	if a.json {
		return a.printJSON(s)
	}
	width, _, _ := a.stdoutSize()
	_, err := fmt.Fprintln(a.stdout, strings.Join(s.lines(width), "\n"))
	return err
}

const (
	watchEvery = time.Second
	// watchPatience is how long a server may be without an answer: on a machine that is
	// busy, it may take longer than a client waits otherwise.
	watchPatience = 15 * time.Second
)

// watchStatus shows the status again and again. That it is interrupted is no error.
func (a *app) watchStatus(ctx context.Context, client *api.Client) error {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	screen := screenOf(a)
	answered := time.Now()
	var shown *shownStatus
	for first := true; ; first = false {
		s, err := askStatus(ctx, client, a.json)
		silent := ""
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			answered, shown = time.Now(), s
		case first || time.Since(answered) > watchPatience:
			return err
		case errors.Is(err, api.ErrNoServer):
			return errors.New("the server has ended")
		default:
			silent = fmt.Sprintf("the server has not answered for %s", durationString(time.Since(answered)))
		}
		switch {
		case screen != nil && !a.json:
			err = screen.draw(shown, silent)
		case silent != "":
			_, err = fmt.Fprintln(a.stderr, silent)
		default:
			if !first && !a.json {
				fmt.Fprintln(a.stdout)
			}
			err = a.printStatus(shown)
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// statusScreen draws statuses over each other on a terminal.
type statusScreen struct {
	*app
	drawn bool
}

// screenOf is nil where stdout is no terminal that can draw.
func screenOf(a *app) *statusScreen {
	if _, _, ok := a.stdoutSize(); !ok || os.Getenv("TERM") == "dumb" {
		return nil
	}
	return &statusScreen{app: a}
}

func (x *statusScreen) draw(s *shownStatus, note string) error {
	width, height, _ := x.stdoutSize()
	var b strings.Builder
	if !x.drawn {
		b.WriteString("\x1b[2J") // all of the screen
		x.drawn = true
	}
	b.WriteString("\x1b[H") // from its begin
	lines := s.lines(width)
	if note != "" {
		lines = append([]string{note, ""}, lines...)
	}
	// The last line is for the cursor.
	if len(lines) > height-1 {
		left := len(lines) - (height - 2)
		lines = append(lines[:max(height-2, 0)], fmt.Sprintf("… %d more lines; see thaw list", left))
	}
	for _, l := range lines {
		if r := []rune(l); len(r) > width {
			l = string(r[:width-1]) + "…"
		}
		b.WriteString(l + "\x1b[K\n") // and clears the rest of the line
	}
	b.WriteString("\x1b[J") // and what is below
	_, err := x.stdout.Write([]byte(b.String()))
	return err
}

// lines are for people, in width columns if that is possible; 0: any number.
func (s *shownStatus) lines(width int) []string {
	c := &s.Counts
	server := fmt.Sprintf("%s for %s, pid %d", s.State, durationString(time.Duration(s.Uptime*float64(time.Second))), s.PID)
	if s.State != host.Serving {
		server = fmt.Sprintf("%s, up for %s, pid %d", s.State, durationString(time.Duration(s.Uptime*float64(time.Second))), s.PID)
	}
	if s.Version != "" {
		server += ", " + printable(s.Version)
	}
	used := bytesString(c.Cached) + " used"
	if s.Quota > 0 {
		used = fmt.Sprintf("%s of %s used", bytesString(c.Cached), bytesString(s.Quota))
	}
	cache := printable(s.Cache)
	if s.Mode == blockmap.Direct {
		cache += ", by direct I/O"
	}
	lines := []string{
		"server    " + server,
		"cache     " + cache,
		fmt.Sprintf("          %s, %s evicted, %s held in memory, %d damaged", used, bytesString(c.Evicted), bytesString(c.Held), c.Damaged),
		fmt.Sprintf("registry  %s/s, %d requests in flight", bytesString(int64(s.Rates.Fetched)), c.InFlight),
		fmt.Sprintf("          %s in %d requests; %d retries; %d wrong and %d failed chunks", bytesString(c.Bytes), c.Requests, c.Retries, c.Wrong, c.Failed),
	}
	if z := s.Zone; z != nil {
		line := fmt.Sprintf("zone      %s, %s; %s received, %s sent", printable(z.Name), count(z.Members, "member"), bytesString(z.Received), bytesString(z.Sent))
		if z.Alone {
			line = fmt.Sprintf("zone      %s; no other member can be reached", printable(z.Name))
		}
		lines = append(lines, line)
	}
	if c.Overlays > 0 {
		line := fmt.Sprintf("overlays  %d; %s changed, which take %s of disk", c.Overlays, bytesString(c.Changed), bytesString(c.OverlaySpace))
		if c.Poisoned > 0 {
			line += fmt.Sprintf("; %d take no more writes, see thaw list --json", c.Poisoned)
		}
		lines = append(lines, line)
	}
	if n := c.NBD; n != nil {
		clients := fmt.Sprintf("clients   %s/s, %d connected", bytesString(int64(s.Rates.Sent)), n.Conns)
		if v := c.VhostUser; v != nil {
			clients += fmt.Sprintf(" by NBD, %s", count(int(v.Conns), "virtual machine"))
		}
		lines = append(lines, clients,
			fmt.Sprintf("          %s sent; %s; %d errors", bytesString(n.Sent), readsString(n.Hits, n.Misses), n.Errors))
	}
	if n := c.VhostUser; n != nil {
		lines = append(lines, fmt.Sprintf("          %s read by virtual machines; %s; %d errors; %d requests resumed",
			bytesString(n.Read), readsString(n.Hits, n.Misses), n.Errors, n.Resumed))
	}
	var devices []string
	for _, n := range []struct {
		n    int
		what host.State
	}{{s.Devices.Ready, host.Ready}, {s.Devices.Opening, host.Opening}, {s.Devices.Closing, host.Closing}, {s.Devices.Failed, host.Failed}} {
		if n.n > 0 {
			devices = append(devices, fmt.Sprintf("%d %s", n.n, n.what))
		}
	}
	if devices == nil {
		devices = []string{"none"}
	}
	lines = append(lines, "devices   "+strings.Join(devices, ", "))
	if n := s.Devices.Ready - s.Devices.Complete; n > 0 {
		lines = append(lines, fmt.Sprintf("          %d complete; the others lack %s of their registries", s.Devices.Complete, bytesString(s.Devices.Missing)))
	} else if s.Devices.Ready > 0 {
		lines = append(lines, "          all complete: they do not need their registries any more")
	}
	if len(s.devices) > 0 {
		lines = append(append(lines, ""), deviceTable(s.devices, width)...)
	}
	return lines
}

// readsString says how many reads there were.
func readsString(hits, misses int64) string {
	all := hits + misses
	if all == 0 {
		return "0 reads"
	}
	return fmt.Sprintf("%d reads, %d %% of them without waiting", all, 100*hits/all)
}

// stdoutSize is the size of the terminal that stdout is; ok is false where it is none,
// and its width is 0.
func (a *app) stdoutSize() (width, height int, ok bool) {
	f, isFile := a.stdout.w.(*os.File)
	if !isFile || !term.IsTerminal(int(f.Fd())) {
		return 0, 0, false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	if err != nil || width < 20 || height < 5 {
		return 80, 24, true
	}
	return width, height, true
}

// durationString writes d for people: 3 h 12 min.
func durationString(d time.Duration) string {
	s := int64(d.Seconds())
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 60*60:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 24*60*60:
		return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
	}
	return fmt.Sprintf("%d d %d h", s/86400, s/3600%24)
}
