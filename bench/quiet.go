package bench

import (
	"context"
	"runtime"
	"time"
)

// Quiet waits until the machine has been idle, to 95 %, for two seconds, but at
// most limit, and returns how long it has waited. It is for a machine that others
// use, before a round. On an idle machine it takes two seconds.
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
