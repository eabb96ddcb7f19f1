package blockmap

import "crypto/sha256"

// Digest is a SHA-256.
type Digest [sha256.Size]byte

// Run maps Count consecutive device blocks to consecutive blocks of one
// stream. Device blocks that no run covers read as zeros.
type Run struct {
	Device uint32 // first block on the device
	Stream uint32 // position in Index.Streams
	Block  uint32 // first block in the stream
	Count  uint32
}
