package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"thaw/tracefile"
)

// interruptible runs read, and returns when ctx ends if that is earlier. Opening a
// FIFO waits for its writer, reading a terminal for whoever types; neither can be
// called off, and what a signal ends is not to wait for it.
func interruptible[T any](ctx context.Context, read func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := read()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// readInput reads a file of at most max bytes that the user names, or with "-" stdin, once: a pipe gives
// its bytes to one reader.
func readInput(ctx context.Context, path string, max int64) ([]byte, error) {
	return interruptible(ctx, func() ([]byte, error) {
		f := os.Stdin
		if path != "-" {
			var err error
			if f, err = os.Open(path); err != nil {
				return nil, err
			}
			defer f.Close()
		}
		b, err := io.ReadAll(io.LimitReader(f, max+1))
		if err == nil && int64(len(b)) > max {
			err = fmt.Errorf("%s: it is not a trace: it has more than %d bytes", path, max)
		}
		return b, err
	})
}

// readTrace reads a trace file, or with "-" what comes on stdin. raw are its bytes.
func readTrace(ctx context.Context, path string) (t *tracefile.Trace, raw []byte, err error) {
	if raw, err = readInput(ctx, path, tracefile.MaxSize); err != nil {
		return nil, nil, err
	}
	if t, err = tracefile.Read(bytes.NewReader(raw)); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, raw, nil
}
