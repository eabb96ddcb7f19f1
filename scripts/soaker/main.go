// Command soaker is what scripts/soak runs. It serves images to clients that connect
// and vanish, from a registry that fails in every way that registries do, on a disk
// that fills up, and kills the server at random. It compares every byte that a client
// reads with the right one. In the end the faults stop. Then every image must read
// without an error, and the server's goroutines, descriptors, mappings and memory,
// and the disk, must return to where they began.
//
//	soaker SEED MINUTES
//
// The seed determines the faults, as far as the machine's timing allows. soaker
// requires root, for a disk of its own, and docker-registry, nbdcopy and mkfs.ext4.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(log.Ltime)
	if len(os.Args) != 3 {
		log.Fatal("usage: soaker SEED MINUTES")
	}
	seed, err := strconv.ParseUint(os.Args[1], 10, 64)
	minutes, err2 := strconv.ParseFloat(os.Args[2], 64)
	if err := errors.Join(err, err2); err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err = soak(ctx, seed, time.Duration(minutes*float64(time.Minute)))
	stop()
	if err != nil {
		log.Fatalf("FAIL: %v", err)
	}
	log.Print("ok")
}

const (
	images   = 6
	readers  = 6
	diskSize = 96 << 20
	// quota is about half the size of all images.
	quota = 24 << 20
)

// soak runs everything.
func soak(ctx context.Context, seed uint64, lasts time.Duration) (err error) {
	dir, err := os.MkdirTemp("", "thaw-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	rng := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }

	reg, err := startRegistry(filepath.Join(dir, "registry"))
	if err != nil {
		return err
	}
	defer reg.stop()
	thaw := filepath.Join(dir, "thaw")
	if err := command(ctx, "go", "build", "-race", "-o", thaw, "./cmd/thaw"); err != nil {
		return err
	}
	log.Print("building images")
	set, err := buildImages(ctx, thaw, dir, reg.host, rng(1))
	if err != nil {
		return err
	}
	d, err := newDisk(filepath.Join(dir, "disk"), filepath.Join(dir, "mnt"), diskSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()

	origin := newFront(reg.host, rng(2))
	defer origin.close()
	mirror := newFront(reg.host, rng(3))
	defer mirror.close()
	hosts := filepath.Join(dir, "hosts")
	if err := os.WriteFile(hosts, fmt.Appendf(nil, "%s http://%s\n", origin.host, mirror.host), 0o600); err != nil {
		return err
	}
	srv := &server{thaw: thaw, cache: filepath.Join(d.at, "cache"), socket: filepath.Join(dir, "sock"), log: filepath.Join(dir, "log")}
	srv.args = []string{"--allow", origin.host + "/**", "--hosts", hosts, "--cache-size", strconv.Itoa(quota), "--grace", "3s"}
	if err := srv.start(); err != nil {
		return err
	}
	defer srv.kill()
	defer func() {
		if err != nil {
			srv.showLog()
		}
	}()

	// The baseline: each image was opened once and read whole, and all is idle.
	tally := &tally{}
	for _, m := range set {
		if err := readWhole(ctx, srv.socket, origin.host, m, tally); err != nil {
			return fmt.Errorf("before any fault: %w", err)
		}
	}
	before, err := srv.settle(ctx, nil)
	if err != nil {
		return err
	}
	log.Printf("idle: %v", before)

	run, cancel := context.WithTimeout(ctx, lasts)
	defer cancel()
	var wg sync.WaitGroup
	failed := make(chan error, 64)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
		cancel()
	}
	for i := range readers {
		wg.Go(func() {
			if err := readFor(run, srv.socket, origin.host, set, rng(100+uint64(i)), tally); err != nil {
				fail(err)
			}
		})
	}
	wg.Go(func() { origin.weather(run, true) })
	wg.Go(func() { mirror.weather(run, false) })
	wg.Go(func() { d.crowd(run, rng(5), tally) })
	wg.Go(func() { d.damage(run, rng(6), srv.cache, tally) })
	wg.Go(func() {
		if err := srv.torment(run, rng(7), tally); err != nil {
			fail(err)
		}
	})
	wg.Wait()
	origin.calm()
	mirror.calm()
	d.empty()
	select {
	case err := <-failed:
		return err
	default:
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	log.Printf("calm again: %v; origin %v; mirror %v", tally, origin, mirror)

	// Requests from before may be retried for half a minute, or longer on a busy machine.
	for _, m := range set {
		if err := retry(ctx, 5*time.Minute, func() error { return readWhole(ctx, srv.socket, origin.host, m, tally) }); err != nil {
			return fmt.Errorf("with no more faults: %w", err)
		}
	}
	if err := nbdcopyWhole(ctx, srv.socket, origin.host, set, dir); err != nil {
		return err
	}
	after, err := srv.settle(ctx, before)
	if err != nil {
		return err
	}
	log.Printf("idle: %v", after)
	if n, err := d.used(srv.cache); err != nil {
		return err
	} else if n > quota+2<<20 {
		return fmt.Errorf("the cache takes %d bytes, its quota is %d", n, quota)
	}
	if err := srv.stop(true); err != nil {
		return err
	}
	return srv.checkLog()
}

// retry calls f until it succeeds, returns wrong bytes, or lasts is over.
func retry(ctx context.Context, lasts time.Duration, f func() error) error {
	for end := time.Now().Add(lasts); ; {
		err := f()
		if err == nil || errors.Is(err, errWrong) || time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}
