package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"

	"thaw/bench"
)

// diskRows are the loads of servers with a quarter of the memory that the data would need.
var diskRows = []row{
	{name: "4k-QD1", job: bench.FioJob{BS: "4k", Depth: 1, RW: "randread"}},
	{name: "4k-QD32", job: bench.FioJob{BS: "4k", Depth: 32, RW: "randread"}},
	{name: "64k-QD16", job: bench.FioJob{BS: "64k", Depth: 16, RW: "randread"}},
	{name: "4k-QD32-4conn", job: bench.FioJob{BS: "4k", Depth: 32, Jobs: 4, RW: "randread"}},
	{name: "1M-seq", job: bench.FioJob{BS: "1M", Depth: 8, RW: "read"}},
}

// roofline is the side that is no server: fio reads the file itself, by io_uring and
// O_DIRECT.
const roofline = "fio"

// measureDisk runs diskRows against servers that are each in a cgroup of its own. The page
// cache is empty before each load.
func (b *benchmark) measureDisk(ctx context.Context) error {
	var rows []row
	for _, r := range diskRows {
		if b.wanted("disk/" + r.name) {
			rows = append(rows, r)
		}
	}
	if rows == nil {
		return nil
	}
	if err := b.fillDirect(ctx); err != nil {
		return err
	}
	servers, err := b.startDisk()
	defer func() {
		for _, s := range servers {
			_ = s.Stop() // if it is still there
		}
	}()
	if err != nil {
		return err
	}
	for _, r := range rows {
		var sides []func(context.Context, int) error
		for _, s := range servers {
			sides = append(sides, func(ctx context.Context, _ int) error { return b.diskRound(ctx, r, s) })
		}
		sides = append(sides, func(ctx context.Context, _ int) error { return b.diskRound(ctx, r, nil) })
		if err := bench.Alternate(ctx, b.rounds, sides...); err != nil {
			return err
		}
	}
	err = stopAll(servers)
	servers = nil
	return err
}

// diskRound measures one side: a server, or the roofline where s is nil.
func (b *benchmark) diskRound(ctx context.Context, r row, s *bench.NBDServer) error {
	if err := bench.DropCaches(); err != nil {
		return err
	}
	name := roofline
	var res *bench.FioResult
	var err error
	if s != nil {
		name = s.Name
		res, err = b.fio(ctx, s, r.job)
	} else {
		res, err = b.fioFile(ctx, r.job)
	}
	if err != nil {
		return fmt.Errorf("disk/%s, %s: %w", r.name, name, err)
	}
	return b.rec.Add("NBD/disk/"+r.name+"/server="+name,
		bench.Measure{Value: 1e9 / max(res.IOPS, 1), Unit: bench.Wall},
		bench.Measure{Value: res.IOPS, Unit: iops},
		bench.Measure{Value: res.Bandwidth, Unit: bandwidth},
		bench.Measure{Value: res.CPU.Seconds() * 1e9 / max(res.IOs, 1), Unit: cpuPerIO},
		bench.Measure{Value: res.P99, Unit: p99})
}

// fioFile runs a job on the file of the device.
func (b *benchmark) fioFile(ctx context.Context, j bench.FioJob) (*bench.FioResult, error) {
	return bench.Fio(ctx, append(b.over(j).Args(), "--ioengine=io_uring", "--direct=1", "--readonly", "--filename="+b.device)...)
}

func (b *benchmark) directCache() string { return b.cache() + "-direct" }

// fillDirect fills the cache of the thaw that uses direct I/O. A copy of another cache
// would be fetched again.
func (b *benchmark) fillDirect(ctx context.Context) error {
	if _, err := os.Stat(b.directCache()); err == nil {
		return nil
	}
	s, err := b.startThaw("thaw", "unix", b.directCache(), "--cache-mode", "direct")
	if err != nil {
		return err
	}
	_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", s.URI, "null:"))
	return errors.Join(err, s.Stop())
}

// startDisk starts the servers of the rows of the disk.
func (b *benchmark) startDisk() (servers []*bench.NBDServer, err error) {
	limit := int64(b.sizeMiB) << 20 / 4
	add := func(name string, start func() (*bench.NBDServer, error)) {
		if err != nil {
			return
		}
		b.group, err = bench.NewCgroup("bench-nbd-"+strconv.Itoa(os.Getpid())+"-"+name, limit)
		if err != nil {
			return
		}
		var s *bench.NBDServer
		if s, err = start(); err != nil {
			err = errors.Join(err, b.group.Close())
		} else {
			s.Group = b.group
			servers = append(servers, s)
		}
		b.group = nil
	}
	peer := func(name string, command func(p bench.Place) []string) {
		add(name, func() (*bench.NBDServer, error) {
			return bench.LaunchNBD(name, "unix", nil, func(p bench.Place) []string { return b.group.Args(command(p)...) })
		})
	}
	add("thaw", func() (*bench.NBDServer, error) { return b.startThaw("thaw", "unix", b.cache()) })
	add(thawDirect, func() (*bench.NBDServer, error) {
		return b.startThaw(thawDirect, "unix", b.directCache(), "--cache-mode", "direct")
	})
	peer("nbdkit-file", func(p bench.Place) []string {
		return []string{"nbdkit", "-f", "-r", "--unix", p.Sock, "file", b.device}
	})
	qemu := func(cache string) func(p bench.Place) []string {
		return func(p bench.Place) []string {
			return []string{"qemu-nbd", "-r", "-f", "raw", "--aio=io_uring", "--cache=" + cache, "-t", "-e", "16", "-k", p.Sock, b.device}
		}
	}
	peer("qemu-nbd", qemu("writeback"))
	peer("qemu-nbd-direct", qemu("none"))
	return servers, err
}

const thawDirect = "thaw-direct"

// diskPeers in the order of the table.
var diskPeers = []string{"nbdkit-file", "qemu-nbd", "qemu-nbd-direct"}

// reportDisk writes the table of the disk.
func (b *benchmark) reportDisk(w io.Writer) error {
	t := bench.Table{Columns: []string{"load", "thaw", "thaw direct", "nbdkit file", "qemu-nbd", "qemu-nbd direct", "fio on the file",
		"thaw / best peer", "direct / best peer", "thaw / fio", "direct / fio"}}
	any := false
	for _, r := range diskRows {
		name := "NBD/disk/" + r.name + "/server="
		if b.rec.Rounds(name+"thaw", iops) == 0 {
			continue
		}
		any = true
		best := diskPeers[0]
		row := []string{r.name, b.cell(name+"thaw", r), b.cell(name+thawDirect, r)}
		for _, p := range diskPeers {
			row = append(row, b.cell(name+p, r))
			if b.rec.Median(name+p, iops) > b.rec.Median(name+best, iops) {
				best = p
			}
		}
		file := fmt.Sprintf("%.0f", b.rec.Median(name+roofline, iops))
		if r.job.BS == "1M" {
			file = fmt.Sprintf("%.0f MB/s", b.rec.Median(name+roofline, bandwidth)/1e6)
		}
		row = append(row, file)
		for _, other := range []string{best, roofline} {
			for _, s := range []string{"thaw", thawDirect} {
				cell := fmt.Sprintf("%.2f", b.rec.Ratio(name+s, name+other, iops))
				if other != roofline {
					cell += " (" + other + ")"
				}
				row = append(row, cell)
			}
		}
		t.Row(row...)
	}
	if !any {
		return nil
	}
	if _, err := fmt.Fprintf(w, "\nFrom the disk: each server has %d MiB of memory for %d MiB of data. Medians of %d rounds: requests per second (MB/s where marked), and the server's CPU time per request in us.\n\n",
		b.sizeMiB/4, b.sizeMiB, b.rounds); err != nil {
		return err
	}
	_, err := t.WriteTo(w)
	return err
}
