package flatten

import "io"

// Progress is told of the steps of a build. Several goroutines call its methods; the
// calls for one layer are in order.
type Progress interface {
	// Read: n more bytes of a layer's blob, as it is stored, were read.
	Read(layer int, n int64)
	// Push: the layer is converted, and the push of its stream of size bytes begins.
	Push(layer int, size int64)
	// Pushed: n bytes of the stream have been sent so far.
	Pushed(layer int, n int64)
	// Done: the conversion of the layer is in the target. If reused, it was there
	// before the build.
	Done(layer int, reused bool)
}

// counter tells Progress how many bytes were read.
type counter struct {
	r     io.Reader
	p     Progress
	layer int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.p.Read(c.layer, int64(n))
	return n, err
}

type silent struct{}

func (silent) Read(int, int64)   {}
func (silent) Push(int, int64)   {}
func (silent) Pushed(int, int64) {}
func (silent) Done(int, bool)    {}
