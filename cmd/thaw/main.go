// Command thaw starts container images before they have arrived: it builds block
// images (build), serves them as network block devices (serve), and examines them
// (inspect, verify). `thaw help` has the rest.
//
// Each command is a file that parses flags, connects the parts that it needs, and
// prints the result.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
)

func main() {
	// Go ends a program that writes to a closed pipe on stdout or stderr, unless
	// it asks for SIGPIPE. Then the write fails, and its caller decides what that
	// means. (Ignored signals are inherited by credential helpers; signals that are
	// asked for are not.)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ends := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		if reloads(os.Args[1:]) {
			signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // until the command asks for it
		} else {
			ends = append(ends, syscall.SIGHUP)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	// The first signal ends the command in order: it cancels its uploads and removes
	// its temporary files. A second one ends the process at once. But timeout and
	// supervisors signal the process and its group: that is one request, sent twice.
	context.AfterFunc(ctx, func() { time.AfterFunc(sameSignal, stop) })
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// sameSignal is how soon after a signal another one is still the same request. A test raises it.
var sameSignal = 500 * time.Millisecond

// Exit codes, as the help has them.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// usageError is the error of a wrong command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// run is the program without its process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	out := &results{w: stdout}
	a := &app{stdout: out, stderr: stderr}
	root := rootCommand(a)
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil || out.err != nil {
		err = out.err
	}
	switch {
	case err == nil:
		return exitOK
	case errors.Is(out.err, syscall.EPIPE):
		return exitError // the reader has closed the pipe, and wants no more
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		if unfinished, ok := errors.AsType[*flatten.Unfinished](err); ok {
			err = fmt.Errorf("interrupted: %s", unfinished.Reuse())
		} else {
			err = errors.New("interrupted")
		}
	default:
		if h := hint(err, cmd.Flags().Args(), a.temp); h != "" {
			err = fmt.Errorf("%w; %s", err, h)
		}
	}
	text, code := fmt.Sprintf("thaw: %v\n", err), exitError
	var usage usageError
	var invalid host.InvalidError
	if errors.As(err, &usage) || errors.As(err, &invalid) {
		text, code = text+fmt.Sprintf("See '%s --help'.\n", cmd.CommandPath()), exitUsage
	}
	said := make(chan struct{})
	go func() {
		defer close(said)
		_, _ = io.WriteString(stderr, text)
	}()
	select {
	case <-said:
	case <-afterEnd(ctx, time.Second): // nobody reads stderr
	}
	return code
}

// afterEnd is closed d after the end of ctx.
func afterEnd(ctx context.Context, d time.Duration) <-chan struct{} {
	c := make(chan struct{})
	context.AfterFunc(ctx, func() { time.AfterFunc(d, func() { close(c) }) })
	return c
}

// reloads says whether args run a command that takes SIGHUP as the request to
// read its files again. SIGHUP ends all other commands, as SIGTERM does.
func reloads(args []string) bool {
	c, _, err := rootCommand(new(app)).Find(args)
	return err == nil && c.Name() == "serve"
}

// results is stdout. It keeps the first error of a write, so that a command does not
// report success if its results were lost.
type results struct {
	w   io.Writer
	err error
}

func (r *results) Write(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.w.Write(p)
	if err != nil {
		r.err = fmt.Errorf("write the results: %w", err)
		return n, r.err
	}
	return n, nil
}
