package fetcher

import (
	"sync"
)

// refusals notices that a cache cannot keep what is fetched ahead: several chunks in
// a row say so, where one may only have come when all others were in use.
type refusals struct {
	mu sync.Mutex
	n  int
}

const maxRefusals = 3

// full says whether this is the end of it: err is why a chunk could not be kept.
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
