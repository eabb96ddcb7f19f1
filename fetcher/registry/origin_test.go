package registry

import (
	"encoding/hex"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/fetcher"
)

// A Repo is an origin of chunks, with all optional interfaces that a fetcher uses.
var (
	_ fetcher.Origin    = (*Repo)(nil)
	_ fetcher.Ranger    = (*Repo)(nil)
	_ fetcher.Elsewhere = (*Repo)(nil)
)

func digestOf(h v1.Hash) (d blockmap.Digest) {
	if n, err := hex.Decode(d[:], []byte(h.Hex)); n != len(d) || err != nil {
		panic("a test asks for what is no SHA-256")
	}
	return d
}
