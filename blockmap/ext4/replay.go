package ext4

import (
	"fmt"
	"io"
	"maps"
	"slices"
)

// Disk is a device that Replay reads and writes.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	// Flush makes durable what was written.
	Flush() error
}

// Replay recovers the filesystem on a device of size bytes: it writes the transactions
// of the journal to their places, and marks the journal as empty and the filesystem as
// clean. It does what a mount does first, and what "e2fsck -E journal_only" does, without
// either. It leaves the orphan list to the kernel. All of the log is verified before
// anything is written; a replay that was cut off can be repeated.
//
// A filesystem that needs no recovery is not changed.
func Replay(d Disk, size int64) (Replayed, error) {
	v, err := Recover(d, size)
	if err != nil || !v.needed {
		return Replayed{}, err
	}
	var b [blockSize]byte
	for _, block := range slices.Sorted(maps.Keys(v.logged)) {
		if err := v.copyOf(b[:], block); err != nil {
			return Replayed{}, fmt.Errorf("ext4: replay the journal: %w", err)
		}
		if _, err := d.WriteAt(b[:], int64(block)*blockSize); err != nil {
			return Replayed{}, fmt.Errorf("ext4: replay the journal: write block %d: %w", block, err)
		}
	}
	// The log goes when the blocks are safe in their places.
	if err := d.Flush(); err != nil {
		return Replayed{}, fmt.Errorf("ext4: replay the journal: %w", err)
	}
	for _, f := range []fixedBlock{v.fixed[1], v.fixed[0]} {
		if _, err := d.WriteAt(f.bytes, int64(f.block)*blockSize); err != nil {
			return Replayed{}, fmt.Errorf("ext4: replay the journal: write the superblock at block %d: %w", f.block, err)
		}
	}
	if err := d.Flush(); err != nil {
		return Replayed{}, fmt.Errorf("ext4: replay the journal: %w", err)
	}
	return v.Replayed(), nil
}
