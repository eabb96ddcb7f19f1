package fetcher

import (
	"sync"
)

// refusals counts prefetched chunks in a row that the cache refused to store. A single
// refusal proves little: all other chunks may have been in use at that moment.
type refusals struct {
	mu sync.Mutex
	n  int
}

const maxRefusals = 3

// full records whether a chunk was stored; err is the reason if it was not. It reports
// whether the cache has refused enough chunks for the prefetch to end.
func (c *refusals) full(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.n = 0
		return false
	}
	c.n++
	return c.n >= maxRefusals
}
