package host

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A device that is being opened is for all who wait for it: the opening goes on while
// one of them is there, and ends with the last one and with the host. What is opened
// is closed once.
func TestSharedOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const name = "registry.example/team/app:v1"
		var opens, closes atomic.Int32
		opening := make(chan context.Context, 10)
		hang := true
		x := newDevices(slog.New(slog.DiscardHandler), func(ctx context.Context, _ *Device) error {
			opens.Add(1)
			opening <- ctx
			if hang {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			time.Sleep(time.Second)
			return nil
		}, func(*Device) { closes.Add(1) })
		open := func(ctx context.Context) <-chan error {
			c := make(chan error, 1)
			go func() {
				_, release, err := x.acquire(ctx, name, Allow{"registry.example/**"}.Match)
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
		if ctx.Err() == nil || len(x.list()) != 0 {
			t.Error("the opening continues although no caller waits")
		}
		// For the next client the host opens it anew; a client that comes late is
		// served as well.
		hang = false
		a, b = open(t.Context()), open(t.Context())
		for _, c := range []<-chan error{a, b} {
			if err := <-c; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if opens.Load() != 2 || closes.Load() != 1 {
			t.Errorf("opened %d times, closed %d times", opens.Load(), closes.Load())
		}
		// A device that becomes ready after all users have left is closed.
		third, leave := context.WithCancel(t.Context())
		a = open(third)
		leave()
		<-a
		<-x.list()[0].closed
		if closes.Load() != 2 {
			t.Errorf("closed %d times", closes.Load())
		}
		// The host stops.
		hang = true
		a = open(t.Context())
		x.stop()
		if err := <-a; err == nil {
			t.Error("it was opened")
		}
		if err := <-open(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("a stopping host opens a device: %v", err)
		}
		if _, err := x.add(t.Context(), []Spec{{Name: name}}); !errors.Is(err, ErrClosed) {
			t.Errorf("a stopping host adds a device: %v", err)
		}
	})
}

// Devices are added all or none, whether or not a client has one of them open, and
// what was added stays until it is removed.
func TestAddedDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opens, closes atomic.Int32
		fail := errors.New("cannot be opened")
		x := newDevices(slog.New(slog.DiscardHandler), func(ctx context.Context, d *Device) error {
			opens.Add(1)
			switch d.spec.Image {
			case "fails":
				return fail
			case "hangs":
				<-ctx.Done()
				return context.Cause(ctx)
			}
			return nil
		}, func(*Device) { closes.Add(1) })
		any := func(string) bool { return true }

		// A device that fails ends the others, also those that hang.
		if _, err := x.add(t.Context(), []Spec{{Name: "a"}, {Name: "hangs"}, {Name: "fails"}}); !errors.Is(err, fail) {
			t.Errorf("add: %v", err)
		}
		synctest.Wait()
		if n := len(x.list()); n != 0 || opens.Load() != 3 || closes.Load() != 1 {
			t.Errorf("%d devices are left; opened %d, closed %d", n, opens.Load(), closes.Load())
		}
		// So does the end of the caller's patience.
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := x.add(short, []Spec{{Name: "hangs"}}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("add: %v", err)
		}

		// A client's device becomes permanent, and outlives the client.
		client, release, err := x.acquire(t.Context(), "b", any)
		if err != nil {
			t.Fatal(err)
		}
		added, err := x.add(t.Context(), []Spec{{Name: "a"}, {Name: "b"}})
		if err != nil || len(added) != 2 || added[1] != client || added[0].Name() != "a" {
			t.Fatalf("added %v, %v", added, err)
		}
		release()
		synctest.Wait()
		if got := x.list(); len(got) != 2 {
			t.Errorf("%d devices are left", len(got))
		}
		var invalid InvalidError
		for _, spec := range []Spec{{Name: "a"}, {Name: "b", Image: "another"}} {
			if _, err := x.add(t.Context(), []Spec{{Name: "c"}, spec}); !errors.As(err, &invalid) {
				t.Errorf("a name is given twice: %v", err)
			}
		}
		if _, err := x.add(t.Context(), []Spec{{Name: "d"}, {Name: "d"}}); !errors.As(err, &invalid) {
			t.Errorf("a name is given twice: %v", err)
		}
		// There are two, so none is the default.
		if _, _, err := x.acquire(t.Context(), "", nil); !errors.Is(err, ErrNoDevice) {
			t.Errorf("the default of two: %v", err)
		}
		if !x.remove(added[0]) || x.remove(added[0]) {
			t.Error("remove does not succeed exactly once")
		}
		<-added[0].closed
		d, release, err := x.acquire(t.Context(), "", nil)
		if err != nil || d != added[1] {
			t.Fatalf("the default is %v, %v", d, err)
		}
		// A removed device is closed when its last user has left. Its name is free.
		if !x.remove(d) {
			t.Error("it is not removed")
		}
		again, releaseToo, err := x.acquire(t.Context(), "b", any)
		if err != nil || again == d || again.ID() == d.ID() {
			t.Errorf("the name leads to the removed device: %v", err)
		}
		synctest.Wait()
		select {
		case <-d.closed:
			t.Error("it is closed although it has a user")
		default:
		}
		release()
		<-d.closed
		releaseToo()
		<-again.closed
		x.stop()
		if never := int32(3); opens.Load()-never != closes.Load() { // "fails", and "hangs" twice
			t.Errorf("%d were opened, %d of which failed, and %d were closed", opens.Load(), never, closes.Load())
		}
	})
}
