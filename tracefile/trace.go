package tracefile

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Trace is a recording in memory: of one start, or of several that were
// merged.
type Trace struct {
	Header
	End

	// Touches are in the order in which their blocks are wanted. In a trace
	// of one start that is the order of time; in a merged one time may go
	// back. No block is in two of them.
	Touches []Touch

	// Cut says why a file ended before its end: ErrCut for one that a crash
	// has left, blockmap.ErrCorrupt for one that was altered. The touches are
	// those of all frames before that. It is nil where the file was whole.
	Cut error
}

// Header says what a trace is of.
type Header struct {
	Index  blockmap.Digest // of the image's index, see IndexDigest
	Blocks uint32          // size of the device in blocks
	Starts uint32          // recorded in it: 1, or how many were merged
}

// Touch is a run of blocks that were read for the first time.
type Touch struct {
	At     time.Duration // since the first read, in whole microseconds; in a merged trace the median
	Block  uint32        // first block on the device
	Count  uint32        // blocks
	Starts uint32        // how many of the trace's starts touched it; 0 means 1
	Miss   bool          // it was not resident; in a merged trace: mostly
}

func (t Touch) end() uint64 { return uint64(t.Block) + uint64(t.Count) }

// Bytes is the length of the run.
func (t Touch) Bytes() int64 { return int64(t.Count) * blockmap.BlockSize }

// Extent is the run as bytes of the device.
func (t Touch) Extent() blockmap.Extent {
	return blockmap.Range(int64(t.Block)*blockmap.BlockSize, t.Bytes())
}

// End says how a recording ended. The zero End is that of a file that was cut.
type End struct {
	Why     Reason
	After   time.Duration // from the first read to the end of the recording
	Dropped uint64        // blocks that were touched but did not fit in the buffer
}

// Reason is why a recording ended.
type Reason uint8

// The values are those of the file format.
const (
	Unfinished Reason = iota // the file was cut
	Stopped                  // by Recorder.Stop
	TimeUp                   // Options.For had passed
	Enough                   // Options.Bytes were touched
	WentQuiet                // nothing new was touched for Options.Quiet
	TooLong                  // the file had MaxSize bytes
	Merged                   // it was made by Merge

	reasons = iota
)

func (r Reason) String() string {
	switch r {
	case Unfinished:
		return "cut off"
	case Stopped:
		return "stopped"
	case TimeUp:
		return "time was up"
	case Enough:
		return "bytes were enough"
	case WentQuiet:
		return "went quiet"
	case TooLong:
		return "file was full"
	case Merged:
		return "merged"
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Errors that a caller tells apart.
var (
	// ErrOtherImage says that a trace is not of the image at hand. A trace of
	// an earlier version of that image can be translated.
	ErrOtherImage = errors.New("the trace is of another image")
	// ErrCut says that a file ends before its trace does: the process that
	// recorded it was killed.
	ErrCut = errors.New("the trace is cut short")
	// ErrFull says that a trace file would become longer than MaxSize.
	ErrFull = errors.New("the trace file is full")
)

// IndexDigest is what binds a trace to an image: the SHA-256 of its encoded
// index, which is also the digest of the index in the image's manifest.
func IndexDigest(ix *blockmap.Index) blockmap.Digest { return sha256.Sum256(ix.Encode()) }

// Read reads a whole trace, of at most MaxSize bytes, without trusting it. It
// fails with blockmap.ErrCorrupt where nothing can be read; where the file ends
// early or has been altered, the trace is what lies before that, and its Cut
// says so. It allocates at most some thirty bytes for each byte that it reads,
// and for an honest trace ten.
func Read(r io.Reader) (*Trace, error) {
	in, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	t := &Trace{Header: in.Header}
	for {
		x, err := in.Next()
		switch {
		case err == nil:
			t.Touches = append(t.Touches, x)
			continue
		case err == io.EOF:
			t.End = in.End()
		case errors.Is(err, ErrCut), errors.Is(err, blockmap.ErrCorrupt):
			t.Cut = err
		default:
			return nil, err
		}
		if err := t.check(); err != nil {
			return nil, err
		}
		return t, nil
	}
}

// Write writes the trace in the format of its files.
func (t *Trace) Write(w io.Writer) error {
	if err := t.check(); err != nil {
		return err
	}
	out, err := NewWriter(w, t.Header)
	if err != nil {
		return err
	}
	for _, x := range t.Touches {
		if err := out.Add(x); err != nil {
			return err
		}
	}
	return out.Close(t.End)
}

// Bytes is how much of the device the trace touches.
func (t *Trace) Bytes() (n int64) {
	for _, x := range t.Touches {
		n += x.Bytes()
	}
	return n
}

// check fails unless all touches lie on the device, and none on another.
func (t *Trace) check() error {
	byBlock := slices.Clone(t.Touches)
	slices.SortFunc(byBlock, func(a, b Touch) int { return cmp.Compare(a.Block, b.Block) })
	var end uint64
	for _, x := range byBlock {
		if err := t.Header.fits(x); err != nil {
			return fmt.Errorf("trace: %w: %w", blockmap.ErrCorrupt, err)
		}
		if uint64(x.Block) < end {
			return fmt.Errorf("trace: %w: block %d is touched twice", blockmap.ErrCorrupt, x.Block)
		}
		end = x.end()
	}
	return nil
}

// fits says what is wrong with x in a trace of h.
func (h *Header) fits(x Touch) error {
	switch {
	case x.Count == 0:
		return fmt.Errorf("a range at block %d is empty", x.Block)
	case x.end() > uint64(h.Blocks):
		return fmt.Errorf("a range ends at block %d of %d", x.end(), h.Blocks)
	case x.At < 0 || x.At > maxTime:
		return fmt.Errorf("block %d is touched at %v", x.Block, x.At)
	case x.Starts > h.Starts:
		return fmt.Errorf("block %d is touched by %d starts of %d", x.Block, x.Starts, h.Starts)
	}
	return nil
}

// is fails with ErrOtherImage unless the trace is of the image with that index.
func (t *Trace) is(ix *blockmap.Index) error {
	if d := IndexDigest(ix); d != t.Index || ix.Blocks != t.Blocks {
		return fmt.Errorf("%w: of the one with index sha256:%.12s…, this one's is sha256:%.12s…", ErrOtherImage, t.Index, d)
	}
	return nil
}
