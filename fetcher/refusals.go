package fetcher

import (
	"sync"
)

// refusals counts prefetched chunks in a row that the cache refused to store. A single
// one says little: all other chunks may have been in use when it came.
type refusals struct {
	mu sync.Mutex
	n  int
}

const maxRefusals = 3

// full notes whether a chunk was stored, err saying why not, and says whether the cache
// has refused enough of them for the prefetch to end.
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
