package ext4

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrNotExt4 means that a device has no ext4 superblock.
var ErrNotExt4 = errors.New("the device has no ext4 filesystem")

// State is what the superblock says about the last mount of a filesystem.
type State struct {
	// Recover: the journal has to be replayed. The filesystem is mounted, or was
	// mounted when its machine or its device stopped.
	Recover bool
	// Unclean: a filesystem without a journal is mounted, or was not unmounted.
	Unclean bool
	// Errors: the kernel has noted that the filesystem is damaged.
	Errors bool
	// Orphans: files that are deleted but were open, or that were being cut short.
	// The next mount removes them or finishes the cut. This is not dirty: e2fsck and
	// the kernel do it without a question.
	Orphans bool
}

// Dirty says whether the filesystem is in use or was not unmounted cleanly.
func (s State) Dirty() bool { return s.Recover || s.Unclean || s.Errors }

func (s State) String() string {
	var l []string
	if s.Recover {
		l = append(l, "its journal has to be replayed")
	}
	if s.Unclean {
		l = append(l, "it was not unmounted")
	}
	if s.Errors {
		l = append(l, "the kernel has noted errors in it")
	}
	if len(l) == 0 {
		return "it is clean"
	}
	return strings.Join(l, ", and ")
}

const (
	stateErrors = 2

	incompatRecover = 0x4 // the journal is not empty
)

// ReadState reads the state of the filesystem on a device. It fails with ErrNotExt4 if
// there is none.
func ReadState(r io.ReaderAt) (State, error) {
	var b [superblockSize]byte
	if n, err := r.ReadAt(b[:], superblockOffset); n < len(b) {
		if errors.Is(err, io.EOF) {
			return State{}, ErrNotExt4
		}
		return State{}, fmt.Errorf("ext4: read the superblock: %w", err)
	}
	if le.Uint16(b[sbMagic:]) != superMagic {
		return State{}, ErrNotExt4
	}
	if le.Uint32(b[sbFeatureROCompat:])&roCompatMetadataCsum != 0 && le.Uint32(b[sbChecksum:]) != crc32c(^uint32(0), b[:sbChecksum]) {
		return State{}, errors.New("ext4: the superblock does not match its checksum")
	}
	state := le.Uint16(b[sbState:])
	return State{
		Recover: le.Uint32(b[sbFeatureIncompat:])&incompatRecover != 0,
		Unclean: state&stateClean == 0,
		Errors:  state&stateErrors != 0,
		Orphans: le.Uint32(b[sbLastOrphan:]) != 0,
	}, nil
}
