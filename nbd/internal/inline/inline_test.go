package inline

import (
	"testing"
	"time"

	"thaw/blockmap"
)

func TestTake(t *testing.T) {
	for _, c := range []struct {
		off, n int64
		want   bool
	}{
		{8192, 4096, true}, {0, MaxLen, true}, {0, MaxLen + 4096, false},
		{512, 4096, false}, {4096, 512, false}, {3584, 512, false},
	} {
		var w Writes
		if got := w.Take(blockmap.Range(c.off, c.n)); got != c.want {
			t.Errorf("%d bytes at %d: %t", c.n, c.off, got)
		}
	}
}

// After a slow write, writes are given away, for longer each time, and for a short time
// again once one was fast.
func TestTook(t *testing.T) {
	var w Writes
	away := func() (n int) {
		for !w.Take(blockmap.Range(0, 4096)) {
			n++
		}
		return n
	}
	w.Took(slow)
	if n := away(); n != 0 {
		t.Errorf("after a fast write, %d are given away", n)
	}
	for want := awayMin; want <= 2*awayMax; want *= 2 {
		w.Took(slow + 1)
		if n := away(); n != min(want, awayMax) {
			t.Errorf("after a slow write, %d are given away: want %d", n, want)
		}
	}
	w.Took(0)
	w.Took(time.Second)
	if n := away(); n != awayMin {
		t.Errorf("after a fast write and a slow one, %d are given away", n)
	}
}
