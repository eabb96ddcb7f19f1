package zone

// budget bounds extra requests to a share of all requests. What is left adds up to burst.
type budget struct {
	share, burst, left float64
}

func newBudget(share, burst float64) budget { return budget{share, burst, burst} }

// earn records an ordinary request.
func (b *budget) earn() { b.left = min(b.left+b.share, b.burst) }

// spend reports whether an extra request may be made, and records it if so.
func (b *budget) spend() bool {
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}
