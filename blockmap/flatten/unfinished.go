package flatten

import (
	"fmt"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Unfinished is the error of a build that has begun to convert layers and did not
// end in an image, for whatever reason: it failed, or its context ended.
type Unfinished struct {
	Err    error  // the reason
	Layers int    // of the source image, each layer once
	Kept   int    // of these, layers whose conversion is in the target
	Stored int64  // bytes of the streams of these
	Left   string // a sentence about what is left in the temporary directory, or nothing
}

func (u *Unfinished) Error() string { return u.Err.Error() }

// Unwrap returns the reason.
func (u *Unfinished) Unwrap() error { return u.Err }

// Reuse is a sentence for the user that says what the next build of the image
// will reuse, without a full stop.
func (u *Unfinished) Reuse() string {
	s := u.layers()
	if u.Left != "" {
		s += "; " + u.Left
	}
	return s
}

func (u *Unfinished) layers() string {
	switch {
	case u.Kept == 0 && u.Left != "":
		return "no layer was finished"
	case u.Kept == 0:
		return "no layer was finished: the next build starts from the beginning"
	case u.Kept == u.Layers:
		return "all layers are converted and pushed: the next build reuses them"
	case u.Kept == 1:
		return fmt.Sprintf("1 of %d layers is converted and pushed: the next build reuses it", u.Layers)
	}
	return fmt.Sprintf("%d of %d layers are converted and pushed: the next build reuses them", u.Kept, u.Layers)
}

// unfinished records which layers the next build can reuse.
type unfinished struct {
	mu   sync.Mutex
	kept map[v1.Hash]int64 // bytes of their streams, by diff ID
}

// keep records that the conversion of a layer is in the target, and its tag too.
func (u *unfinished) keep(diffID v1.Hash, stored int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.kept == nil {
		u.kept = make(map[v1.Hash]int64)
	}
	u.kept[diffID] = stored
}

func (u *unfinished) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	clear(u.kept)
}

func (u *unfinished) error(layers int, reason error) *Unfinished {
	u.mu.Lock()
	defer u.mu.Unlock()
	e := &Unfinished{Err: reason, Layers: layers, Kept: len(u.kept)}
	for _, n := range u.kept {
		e.Stored += n
	}
	return e
}
