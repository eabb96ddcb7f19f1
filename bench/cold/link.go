package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"thaw/bench"
)

// link is a link's name and properties.
type link struct {
	name string
	rtt  time.Duration
	rate int64 // bits a second
}

var (
	slow = link{"slow", 20 * time.Millisecond, 200e6}
	fast = link{"fast", 2 * time.Millisecond, 2e9}
)

// String formats the link for headings.
func (l link) String() string {
	rate := fmt.Sprintf("%d Mbit/s", l.rate/1e6)
	if l.rate >= 1e9 {
		rate = strconv.FormatFloat(float64(l.rate)/1e9, 'g', 3, 64) + " Gbit/s"
	}
	return fmt.Sprintf("%s ms, %s", strconv.FormatFloat(float64(l.rtt)/1e6, 'g', 4, 64), rate)
}

// carries returns the shortest time in which n bytes can arrive, with two round
// trips: one to find them, and one until the first of them arrives.
func (l link) carries(n float64) time.Duration {
	return time.Duration(n*8/float64(l.rate)*float64(time.Second)) + 2*l.rtt
}

func parseLinks(s string) ([]link, error) {
	var links []link
	for part := range strings.SplitSeq(s, ",") {
		switch part {
		case slow.name:
			links = append(links, slow)
			continue
		case fast.name:
			links = append(links, fast)
			continue
		}
		name, value, _ := strings.Cut(part, "=")
		rtt, mbits, ok := strings.Cut(value, ":")
		d, err := time.ParseDuration(rtt)
		n, err2 := strconv.ParseInt(mbits, 10, 64)
		if !ok || name == "" || strings.ContainsAny(name, "/ ") || errors.Join(err, err2) != nil || d < 0 || n <= 0 || n > 1e6 {
			return nil, fmt.Errorf("link %q is none of slow, fast, or NAME=RTT:MBITS, as in lan=1ms:1000", part)
		}
		links = append(links, link{name, d, n * 1e6})
	}
	return links, nil
}

// wires are the links to both servers that a host uses: the registry, and the
// HTTP server of the flat image.
type wires struct {
	link
	registry, files *bench.Link
}

func openWires(l link, registry, files string) (*wires, error) {
	w := &wires{link: l}
	var err error
	if w.registry, err = bench.ListenLink(registry, l.rtt, l.rate); err != nil {
		return nil, err
	}
	if w.files, err = bench.ListenLink(files, l.rtt, l.rate); err != nil {
		return nil, errors.Join(err, w.registry.Close())
	}
	return w, nil
}

func (w *wires) stats() bench.LinkStats {
	if w == nil {
		return bench.LinkStats{}
	}
	r, f := w.registry.Stats(), w.files.Stats()
	return bench.LinkStats{Connections: r.Connections + f.Connections, Requests: r.Requests + f.Requests, Up: r.Up + f.Up, Down: r.Down + f.Down}
}

// settle waits until the connections of the rounds so far have ended, which would count
// with the next one.
func (w *wires) settle(ctx context.Context) error {
	return errors.Join(w.registry.Settle(ctx), w.files.Settle(ctx))
}

func (w *wires) close() error { return errors.Join(w.registry.Close(), w.files.Close()) }
