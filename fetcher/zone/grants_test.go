package zone

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// The first members get a run from here, the others are told to ask these.
func TestGrantsFormATree(t *testing.T) {
	for _, names := range []int{1, 2} {
		g := NewGrants(GrantOptions{Slots: 3, FanOut: 4, Names: names})
		run := Run{Number: 1}
		order := make(map[string]int)
		depth := make(map[string]int)
		named, first := make(map[string]int), make(map[string]int)
		deepest := 0
		for i := range 1000 {
			from := fmt.Sprintf("host-%d", i)
			serve, holders := g.Ask(run, from, start)
			if serve != (i < 3) {
				t.Fatalf("member %d: serve is %v", i, serve)
			}
			if !serve && (len(holders) == 0 || len(holders) > names) {
				t.Fatalf("member %d is told to ask %q", i, holders)
			}
			for n, h := range holders {
				if at, ok := order[h]; !ok || at >= i {
					t.Fatalf("%s is told to ask %s, which was granted the run later", from, h)
				}
				if named[h]++; named[h] > 4 {
					t.Fatalf("%s was named %d times", h, named[h])
				}
				if n == 0 {
					first[h]++
					depth[from] = depth[h] + 1
				}
			}
			order[from] = i
			deepest = max(deepest, depth[from])
		}
		// 3 * (1 + 4 + 16 + 64 + 256) is more than 1000; with two names each is the first one twice.
		if most := map[int]int{1: 5, 2: 10}[names]; deepest > most {
			t.Errorf("%d names: the tree has %d levels", names, deepest)
		}
		for h, n := range first {
			if names == 2 && n > 3 {
				t.Errorf("%s is the first of two %d times of 4", h, n)
			}
		}
	}
}

// A slot that is free again is used.
func TestSlotsAreFreed(t *testing.T) {
	g := NewGrants(GrantOptions{Slots: 1})
	run := Run{Number: 1}
	for i := range 10 {
		from := fmt.Sprintf("host-%d", i)
		if serve, _ := g.Ask(run, from, start); !serve {
			t.Fatal("the slot was not freed")
		}
		if n := g.Uploads(run); n != 1 {
			t.Fatalf("%d uploads", n)
		}
		g.Done(run, from, true, start)
	}
	if serve, _ := g.Ask(Run{Number: 2}, "host-1", start); !serve {
		t.Error("another run has no slot of its own")
	}
}

// A member that has failed, or left, is not named.
func TestNotNamed(t *testing.T) {
	for name, forget := range map[string]func(*Grants, Run){
		"failed": func(g *Grants, run Run) { g.Done(run, "host-1", false, start) },
		"left":   func(g *Grants, run Run) { g.Drop("host-1") },
	} {
		t.Run(name, func(t *testing.T) {
			g := NewGrants(GrantOptions{Slots: 2, FanOut: 1, Names: 2})
			run := Run{Number: 1}
			g.Ask(run, "host-1", start)
			g.Ask(run, "host-2", start)
			forget(g, run)
			if name == "failed" {
				g.Ask(run, "host-3", start)
			}
			for i := range 10 {
				if _, holders := g.Ask(run, fmt.Sprintf("other-%d", i), start); slices.Contains(holders, "host-1") {
					t.Fatal("it was named")
				}
			}
		})
	}
}

// A member that comes back, because no holder had the run, gets it, even if others take
// all slots.
func TestComesBack(t *testing.T) {
	g := NewGrants(GrantOptions{Slots: 1, FanOut: 4, Names: 2})
	run := Run{Number: 1}
	g.Ask(run, "host-1", start)
	for i := range 20 {
		g.Ask(run, fmt.Sprintf("other-%d", i), start)
	}
	for i := range 20 {
		if serve, _ := g.Ask(run, fmt.Sprintf("other-%d", i), start); !serve {
			t.Error("it is not served")
		}
	}
	if serve, _ := g.Ask(run, "other-20", start); serve {
		t.Error("one that asks for the first time is served beyond the slots")
	}
}

// Holders are forgotten after a while, as they may have evicted the run.
func TestForget(t *testing.T) {
	g := NewGrants(GrantOptions{Slots: 1, Forget: time.Minute})
	run := Run{Number: 1}
	g.Ask(run, "host-1", start)
	if _, holders := g.Ask(run, "host-2", start); !slices.Equal(holders, []string{"host-1"}) {
		t.Fatalf("holders are %q", holders)
	}
	now := start.Add(2 * time.Minute)
	if serve, holders := g.Ask(run, "host-3", now); serve || len(holders) != 0 {
		t.Errorf("host-1 still uploads, and %q are told", holders)
	}
	g.Done(run, "host-1", true, now)
	if serve, _ := g.Ask(run, "host-3", now); !serve {
		t.Error("the slot is lost")
	}
}

// Memory is bounded, whoever asks for whatever.
func TestGrantsAreBounded(t *testing.T) {
	g := NewGrants(GrantOptions{Slots: 1, MaxRuns: 100, MaxHolders: 50, MaxEntries: 1000})
	for i := range 5000 {
		run := Run{Number: uint32(i)}
		if serve, _ := g.Ask(run, "host-1", start.Add(time.Duration(i))); !serve {
			t.Fatal("not served")
		}
		g.Done(run, "host-1", true, start.Add(time.Duration(i)))
	}
	if n := len(g.mu.runs); n > 100 {
		t.Errorf("%d runs are remembered", n)
	}
	run := Run{Number: 9999}
	for i := range 5000 {
		if serve, holders := g.Ask(run, fmt.Sprintf("host-%d", i), start); !serve && len(holders) == 0 {
			t.Fatalf("nobody is named to member %d", i)
		}
	}
	x := g.mu.runs[run]
	if len(x.order) > 50 || len(x.holders) > 50 {
		t.Errorf("%d holders are remembered", len(x.order))
	}
	for i := range 100 {
		for j := range 50 {
			g.Ask(Run{Number: uint32(20000 + i)}, fmt.Sprintf("host-%d", j), start)
		}
	}
	if g.mu.entries > 1000 {
		t.Errorf("%d holders are remembered in all", g.mu.entries)
	}
}

// Whatever is called in whatever order, the books are right.
func TestGrantsAtRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		o := GrantOptions{Slots: 1 + rng.IntN(3), FanOut: 1 + rng.IntN(4), Names: 1 + rng.IntN(3), MaxRuns: 2 + rng.IntN(4), MaxHolders: 1 + rng.IntN(10), MaxEntries: 1 + rng.IntN(30)}
		g := NewGrants(o)
		now := start
		uploads := make(map[Run][]string)
		for range 2000 {
			now = now.Add(time.Duration(rng.Int64N(int64(time.Second))))
			run, from := Run{Number: uint32(rng.IntN(6))}, fmt.Sprintf("host-%d", rng.IntN(20))
			switch rng.IntN(10) {
			case 0:
				g.Drop(from)
			case 1, 2, 3:
				if l := uploads[run]; len(l) > 0 {
					g.Done(run, l[0], rng.IntN(4) > 0, now)
					uploads[run] = l[1:]
				}
			default:
				serve, holders := g.Ask(run, from, now)
				if serve {
					uploads[run] = append(uploads[run], from)
				}
				if serve && len(holders) > 0 || len(holders) > o.Names || slices.Contains(holders, from) {
					t.Fatalf("%s is told %v and %q", from, serve, holders)
				}
			}
			entries := 0
			for run, x := range g.mu.runs {
				entries += len(x.order)
				if x.uploads != len(uploads[run]) {
					t.Fatalf("%d uploads, and %d were begun", x.uploads, len(uploads[run]))
				}
				if len(x.order) != len(x.holders) || len(x.order) > o.MaxHolders || x.full > len(x.order) {
					t.Fatalf("%d holders in order, %d by name, %d named often enough", len(x.order), len(x.holders), x.full)
				}
				for i, h := range x.order {
					if x.holders[h.name] != h || h.named > o.FanOut || i < x.full && h.named < o.FanOut || i > 0 && x.order[i-1].seq >= h.seq {
						t.Fatalf("holder %d: %+v", i, h)
					}
				}
			}
			if entries != g.mu.entries || entries > o.MaxEntries {
				t.Fatalf("%d holders, %d are counted", entries, g.mu.entries)
			}
		}
	}
}
