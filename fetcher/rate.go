package fetcher

import (
	"time"
)

// samples are the numbers of bytes that had arrived at times that are watchEvery apart.
type samples struct {
	at  [int(stallAfter/watchEvery) + 1]time.Time
	got [int(stallAfter/watchEvery) + 1]int64
	n   int
}

func (s *samples) add(now time.Time, got int64) {
	i := s.n % len(s.at)
	s.at[i], s.got[i] = now, got
	s.n++
}

// rate returns the speed in the last stallAfter, in bytes per second. The speed is
// unknown until that time has passed.
func (s *samples) rate() (bytes float64, known bool) {
	if s.n < len(s.at) {
		return 0, false
	}
	first, last := s.n%len(s.at), (s.n-1)%len(s.at)
	return float64(s.got[last]-s.got[first]) / s.at[last].Sub(s.at[first]).Seconds(), true
}

// lately returns the speed in the last half second.
func (s *samples) lately() (bytes float64, known bool) {
	const back = int(500 * time.Millisecond / watchEvery)
	if s.n <= back {
		return 0, false
	}
	first, last := (s.n-1-back)%len(s.at), (s.n-1)%len(s.at)
	return float64(s.got[last]-s.got[first]) / s.at[last].Sub(s.at[first]).Seconds(), true
}

// rates returns the total speed of a source's requests.
type rates struct {
	sum float64
	of  int
}

func (s *source) rates(now time.Time) (all rates) {
	for r := range s.running {
		if rate, known := r.samples.rate(); known && now.Sub(r.moved) < stallAfter {
			all.sum += rate
		}
		all.of++
	}
	return all
}
