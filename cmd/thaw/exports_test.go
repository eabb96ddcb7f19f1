package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/nbd"
)

// An image that is being opened is for all who wait for it: it goes on while one of
// them is there, ends with the last one and with the server, and what is opened is
// let go once.
func TestSharedOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const name = "registry.example/team/app:v1"
		var opens, lets atomic.Int32
		opening := make(chan context.Context, 10)
		hang := true
		x := newExports(patterns{"registry.example/**"}, nil, slog.New(slog.DiscardHandler), func(ctx context.Context, _ string) (blockmap.Device, func(), error) {
			opens.Add(1)
			opening <- ctx
			if hang {
				<-ctx.Done()
				return nil, nil, context.Cause(ctx)
			}
			time.Sleep(time.Second)
			return nil, func() { lets.Add(1) }, nil
		})
		open := func(ctx context.Context) <-chan error {
			c := make(chan error, 1)
			go func() {
				_, release, err := x.Open(ctx, name, nbd.ClientInfo{})
				if err == nil {
					release()
				}
				c <- err
			}()
			synctest.Wait()
			return c
		}
		first, leave := context.WithCancel(t.Context())
		second, leaveToo := context.WithCancel(t.Context())
		a, b := open(first), open(second)
		ctx := <-opening
		leave()
		if err := <-a; !errors.Is(err, context.Canceled) || ctx.Err() != nil {
			t.Errorf("the first has left: %v, and the opening: %v", err, ctx.Err())
		}
		leaveToo()
		if err := <-b; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		synctest.Wait()
		if ctx.Err() == nil {
			t.Error("it is being opened for nobody")
		}
		// Whoever comes now has it opened anew; who is late for it is served.
		hang = false
		a, b = open(t.Context()), open(t.Context())
		for _, c := range []<-chan error{a, b} {
			if err := <-c; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if opens.Load() != 2 || lets.Load() != 1 {
			t.Errorf("opened %d times, let go %d times", opens.Load(), lets.Load())
		}
		// One that comes when all have left is let go.
		third, leave := context.WithCancel(t.Context())
		a = open(third)
		leave()
		<-a
		x.wg.Wait()
		if lets.Load() != 2 {
			t.Errorf("let go %d times", lets.Load())
		}
		// The server stops.
		hang = true
		a = open(t.Context())
		x.stop()
		if err := <-a; err == nil {
			t.Error("it was opened")
		}
		if err := <-open(t.Context()); !errors.Is(err, nbd.ErrServerClosed) {
			t.Errorf("a server that stops opens more: %v", err)
		}
	})
}
