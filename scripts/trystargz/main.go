// Command trystargz starts an image by stargz-snapshotter in the way that the
// benchmarks do, and checks that it answers, that it came lazily, and that
// nothing is left of it: no process, no mount, no control group. It prints what
// the start took.
//
//	trystargz [-rtt 20ms] [-mbits 200] OCI-LAYOUT [PROGRAM]     tagged latest; /app/run by default
//
// It wants root, and the programs that scripts/stargz builds, in PATH.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"thaw/bench"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	rtt := flag.Duration("rtt", 0, "of the link to the registry")
	mbits := flag.Int64("mbits", 0, "of the link to the registry, each second; 0 for no limit")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: trystargz [flags] OCI-LAYOUT [PROGRAM]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	program := flag.Args()[1:]
	if len(program) == 0 {
		program = []string{bench.Start}
	}
	if err := try(ctx, flag.Arg(0), program, *rtt, *mbits*1e6); err != nil {
		fmt.Fprintln(os.Stderr, "trystargz:", err)
		os.Exit(1)
	}
}

func try(ctx context.Context, layout string, program []string, rtt time.Duration, rate int64) (err error) {
	p, err := bench.FindStargz()
	if err != nil {
		return err
	}
	version, err := p.Version(ctx)
	if err != nil {
		return err
	}
	fmt.Println(version)
	dir, err := os.MkdirTemp("", "trystargz")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir), nothingOf(dir)) }()
	registry, err := bench.StartRegistry(ctx, dir)
	if err != nil {
		return err
	}
	defer registry.Close()
	link, err := bench.ListenLink(registry.Addr, rtt, rate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	t := &trial{programs: p, dir: dir, layout: layout, program: program, registry: registry.Addr, link: link}
	if err := t.make(ctx); err != nil {
		return err
	}
	for _, name := range []string{"plain", "optimized"} {
		if err := t.start(ctx, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return t.interrupt(ctx)
}

// trial is one image, in a registry that is a link away.
type trial struct {
	programs    *bench.StargzPrograms
	dir, layout string
	program     []string
	registry    string
	link        *bench.Link
	answer      string
	full        int64 // what a whole pull transfers, nearly
	starts      int
}

// with runs f with a stargz that has nothing yet.
func (t *trial) with(ctx context.Context, registry string, f func(*bench.Stargz) error) (err error) {
	t.starts++
	dir := filepath.Join(t.dir, fmt.Sprint(t.starts))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	s, err := t.programs.Start(ctx, dir, registry)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, s.Close(), os.RemoveAll(dir))
		if err != nil && s.Said() != "" {
			err = fmt.Errorf("%w\nIts logs end with:%s", err, s.Said())
		}
	}()
	return f(s)
}

func (t *trial) make(ctx context.Context) error {
	source := t.registry + "/image:source"
	img, err := bench.Push(ctx, t.layout, "latest", source)
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	for _, l := range m.Layers {
		t.full += l.Size
	}
	return t.with(ctx, t.registry, func(s *bench.Stargz) error {
		began := time.Now()
		if err := s.Convert(ctx, source, t.registry+"/image:plain"); err != nil {
			return err
		}
		fmt.Printf("converted  %.1f s\n", time.Since(began).Seconds())
		began = time.Now()
		if err := s.Optimize(ctx, source, t.registry+"/image:optimized", t.program...); err != nil {
			return err
		}
		fmt.Printf("optimized  %.1f s\n", time.Since(began).Seconds())
		return nil
	})
}

// start is one of an image that is not here.
func (t *trial) start(ctx context.Context, tag string) error {
	addr := t.link.Addr().String()
	return t.with(ctx, addr, func(s *bench.Stargz) error {
		before, began := t.link.Stats(), time.Now()
		if err := s.Pull(ctx, addr+"/image:"+tag); err != nil {
			return err
		}
		pulled := time.Since(began)
		out, err := s.Exec(ctx, addr+"/image:"+tag, t.program...)
		if err != nil {
			return err
		}
		took, used := time.Since(began), t.link.Stats().Sub(before)
		fmt.Printf("%-10s pulled after %.2f s, answered after %.2f s, %s of %s had come: %s\n", tag,
			pulled.Seconds(), took.Seconds(), bench.Bytes(used.Down), bench.Bytes(t.full), out)
		if out == "" || t.answer != "" && out != t.answer {
			return fmt.Errorf("the answer is %q, it was %q", out, t.answer)
		}
		t.answer = out
		if used.Down >= t.full {
			return errors.New("it has fetched all of the image: that is not lazy")
		}
		return nil
	})
}

// interrupt ends a start in the middle, and another one with its snapshotter.
func (t *trial) interrupt(ctx context.Context) error {
	addr := t.link.Addr().String()
	return t.with(ctx, addr, func(s *bench.Stargz) error {
		ref := addr + "/image:plain"
		if err := s.Pull(ctx, ref); err != nil {
			return err
		}
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if out, err := s.Exec(short, ref, "/bin/sleep", "60"); !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("a start that is cancelled returns %q, %v", out, err)
		}
		if out, err := s.Exec(ctx, ref, "/bin/echo", "again"); err != nil || out != "again" {
			return fmt.Errorf("the start after it returns %q, %v", out, err)
		}
		// This one runs when all of it is closed.
		ended := make(chan error, 1)
		go func() {
			_, err := s.Exec(ctx, ref, "/bin/sleep", "61")
			ended <- err
		}()
		for !running("/bin/sleep 61") {
			select {
			case err := <-ended:
				return fmt.Errorf("a start that is to be ended by Close ends by itself: %w", err)
			case <-time.After(10 * time.Millisecond):
			}
		}
		if err := s.Close(); err != nil {
			return err
		}
		if err := <-ended; err == nil {
			return errors.New("a start whose containerd was closed succeeds")
		}
		if running("/bin/sleep 61") {
			return errors.New("a container runs on after Close")
		}
		return nil
	})
}

// nothingOf fails where there is a process or a mount of a directory, or a
// control group, or a shim's socket.
func nothingOf(dir string) error {
	if running(dir) {
		return fmt.Errorf("a process of %s is left", dir)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if strings.Contains(string(mounts), dir) {
		return fmt.Errorf("a mount in %s is left", dir)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/thaw-bench-*", "/sys/fs/cgroup/*/thaw-bench-*"} {
		if left, err := filepath.Glob(pattern); err != nil || left != nil {
			return fmt.Errorf("control groups are left: %s, %v", left, err)
		}
	}
	fmt.Println("nothing is left")
	return nil
}

// running says whether a process has that in its command line, besides this
// one.
func running(what string) bool {
	out, err := exec.Command("ps", "-ww", "-eo", "args").Output()
	return err == nil && strings.Contains(string(out), what)
}
