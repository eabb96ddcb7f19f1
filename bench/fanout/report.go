package main

import (
	"fmt"
	"io"
	"math"
	"strings"

	"thaw/bench"
)

// aim is a bound for a figure.
type aim struct {
	what       string
	got, bound float64
}

func (a aim) String() string {
	word := "missed"
	if a.got <= a.bound {
		word = "met"
	}
	return fmt.Sprintf("aim %s: %s %.4g, at most %.4g", word, a.what, a.got, a.bound)
}

// report writes the tables of the parts that have run, says which aims are met, and draws the
// plots.
func (b *benchmark) report(w io.Writer) error {
	for _, x := range []struct {
		title string
		table *bench.Table
		any   bool
	}{
		{"Devices on one host", b.hostTable(), b.has("Devices/") || b.has("Sharing/")},
		{"Hosts that start at once", b.hostsTable("Hosts/"), b.has("Hosts/")},
		{"A host of a zone that is", b.hostsTable("Fault/"), b.has("Fault/")},
		{"Simulated", b.simulatedTable(), len(b.simulated) > 0},
		{"The simulator and what was measured", b.agreementTable(), len(b.agreements) > 0},
	} {
		if !x.any {
			continue
		}
		if _, err := fmt.Fprintf(w, "\n%s\n\n", x.title); err != nil {
			return err
		}
		if _, err := x.table.WriteTo(w); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	for _, a := range b.aims() {
		if math.IsNaN(a.got) {
			continue
		}
		if _, err := fmt.Fprintln(w, a); err != nil {
			return err
		}
	}
	if b.plots == "" {
		return nil
	}
	return b.draw(b.plots)
}

func (b *benchmark) names(prefix string) (found []string) {
	for _, n := range b.rec.Names() {
		if strings.HasPrefix(n, prefix) {
			found = append(found, n)
		}
	}
	return found
}

func (b *benchmark) has(prefix string) bool { return len(b.names(prefix)) > 0 }

// part returns a part of a name: of a/x=1/y=2 and y that is 2.
func part(name, key string) string {
	for p := range strings.SplitSeq(name, "/") {
		if v, ok := strings.CutPrefix(p, key+"="); ok {
			return v
		}
	}
	return ""
}

func (b *benchmark) hostTable() *bench.Table {
	t := &bench.Table{Columns: []string{"what", "devices", "time", "of one", "resident", "from the registry", "of distinct", "requests", "memory", "memory per device"}}
	for _, n := range append(b.names("Devices/"), b.names("Sharing/")...) {
		one := b.one(n)
		count := part(n, "devices") + part(n, "images")
		t.Row(strings.Split(n, "/")[0]+" "+part(n, "way"), count, bench.Seconds(b.rec.Median(n, bench.Wall)), fmt.Sprintf("%.2f", b.rec.Ratio(n, one, bench.Wall)),
			bench.Seconds(b.rec.Median(n, residentUnit)), bench.Bytes(b.rec.Median(n, registryUnit)), fmt.Sprintf("%.3f", b.amplified(n)),
			fmt.Sprintf("%.0f", b.rec.Median(n, requestsUnit)), bench.Bytes(b.rec.Median(n, memoryUnit)), bench.Bytes(b.perDevice(n)))
	}
	return t
}

// one is the name of the row with one device.
func (b *benchmark) one(n string) string {
	i := strings.LastIndex(n, "=")
	return n[:i+1] + "1"
}

func (b *benchmark) amplified(n string) float64 {
	return b.rec.Median(n, registryUnit) / b.rec.Median(n, distinctUnit)
}

func (b *benchmark) perDevice(n string) float64 {
	var count float64
	if _, err := fmt.Sscan(part(n, "devices")+part(n, "images"), &count); err != nil || count <= 1 {
		return math.NaN()
	}
	return (b.rec.Median(n, memoryUnit) - b.rec.Median(b.one(n), memoryUnit)) / (count - 1)
}

func (b *benchmark) hostsTable(prefix string) *bench.Table {
	t := &bench.Table{Columns: []string{"way", "what", "hosts", "starts on each", "time", "p50", "p99", "from the registry", "of distinct", "requests", "busiest to mean", "errors"}}
	for _, n := range b.names(prefix) {
		t.Row(part(n, "way"), part(n, "mode")+part(n, "fault"), part(n, "hosts"), part(n, "starts"), bench.Seconds(b.rec.Median(n, bench.Wall)), bench.Seconds(b.rec.Median(n, "p50-ns")),
			bench.Seconds(b.rec.Median(n, "p99-ns")), bench.Bytes(b.rec.Median(n, registryUnit)), fmt.Sprintf("%.3f", b.amplified(n)),
			fmt.Sprintf("%.0f", b.rec.Median(n, requestsUnit)), fmt.Sprintf("%.2f", b.rec.Median(n, toMeanUnit)), fmt.Sprintf("%.0f", b.rec.Max(n, errorsUnit)))
	}
	return t
}

func (b *benchmark) aims() (aims []aim) {
	add := func(what string, got, bound float64) { aims = append(aims, aim{what, got, bound}) }
	for _, n := range append(b.names("Devices/"), b.names("Sharing/")...) {
		if n == b.one(n) {
			continue
		}
		add(n+": registry bytes to distinct ones", b.amplified(n), 1.02)
		add(n+": time to one start's", b.rec.Ratio(n, b.one(n), bench.Wall), 1.5)
		add(n+": MiB of memory per device", b.perDevice(n)/(1<<20), 1)
	}
	for _, n := range b.names("Hosts/") {
		if part(n, "mode") == string(withZone) && part(n, "starts") != "1" {
			add(n+": registry bytes to distinct ones", b.amplified(n), 1.05)
			add(n+": busiest host to mean", b.rec.Median(n, toMeanUnit), 2)
		}
	}
	for _, n := range b.names("Peer/") {
		add(n+": ms to a peer's first byte beyond the round trip", (b.rec.Median(n, "first-byte-ns")-b.rec.Median(n, "round-trip-ns"))/1e6, 0.5)
		add(n+": ms to the leaf that a reader waits for beyond the round trip", (b.rec.Median(n, "first-leaf-ns")-b.rec.Median(n, "round-trip-ns"))/1e6, 0.5)
		add(n+": ms to a peer's chunk beyond the round trip", (b.rec.Median(n, bench.Wall)-b.rec.Median(n, "round-trip-ns"))/1e6, 0.5)
	}
	for _, n := range b.names("Fault/") {
		bound := 1.25
		if part(n, "fault") == halved {
			bound *= 2 // each half reads for itself
		}
		add(n+": registry bytes to distinct ones", b.amplified(n), bound)
	}
	for _, x := range b.simulated {
		if x.system != "zone" {
			continue
		}
		if strings.HasSuffix(x.scenario, split) { // each half reads what it lacks
			add(x.scenario+": amplification", x.Amplification(), 2)
			continue
		}
		add(x.scenario+": amplification", x.Amplification(), 1.05)
		add(x.scenario+": p99 to a lone start", float64(x.Percentile(0.99))/float64(x.lone), 2)
		if len(x.Starts) > 5000 {
			add(x.scenario+": registry's share of bytes in %", 100*x.OriginShare(), 0.06)
		}
	}
	for _, x := range b.agreements {
		add(x.name+": how far the simulator is off in time, %", 100*math.Abs(x.simTime/x.time-1), 20)
		add(x.name+": how far the simulator is off in registry bytes, %", 100*math.Abs(x.simBytes/x.bytes-1), 20)
	}
	return aims
}
