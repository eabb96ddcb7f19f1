package bench

import (
	"context"
	"runtime"
	"time"
)

// Quiet waits until the machine has done next to nothing for two seconds, but
// not longer than limit, and says how long it waited. It is for before a round,
// on a machine that others use; a quiet one it takes two seconds of.
func Quiet(ctx context.Context, limit time.Duration) (time.Duration, error) {
	began := time.Now()
	calm := 0
	for calm < 2 && time.Since(began) < limit {
		before, err := busyTime()
		if err != nil {
			return 0, err
		}
		if err := sleep(ctx, time.Second); err != nil {
			return 0, err
		}
		after, err := busyTime()
		if err != nil {
			return 0, err
		}
		if after-before <= time.Second*time.Duration(runtime.NumCPU())/20 {
			calm++
		} else {
			calm = 0
		}
	}
	return time.Since(began), nil
}
