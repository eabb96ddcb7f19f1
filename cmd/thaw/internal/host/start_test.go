package host

import (
	"testing"
	"time"
)

// What was found beside an image counts, also where opening the image has taken longer than
// the start waits for it.
func TestFoundWhileTheImageOpens(t *testing.T) {
	s := &start{t: &tracer{opener: &opener{patience: time.Second}}, begun: time.Now().Add(-time.Hour)}
	found := make(chan struct{})
	if s.within(t.Context(), found) {
		t.Error("nothing is found")
	}
	close(found)
	for range 100 {
		if !s.within(t.Context(), found) {
			t.Fatal("what was found does not count, because the time is over")
		}
	}
}
