package host

import (
	"fmt"
	"strings"
	"testing"

	"thaw/blockmap"
)

// Metadata of any size takes at most half of the link while the program's files come.
func TestShare(t *testing.T) {
	wants := func(n int, stored uint32) (all []blockmap.Want) {
		table := &blockmap.Table{}
		for i := range n {
			table.Chunks = append(table.Chunks, blockmap.Chunk{Stored: stored, Block: uint32(i), Count: 1})
			all = append(all, blockmap.Want{Table: table, Chunk: i})
		}
		return all
	}
	for _, c := range []struct {
		metadata, files int // of 512 KiB and 256 KiB
		want            string
	}{
		{0, 0, ""},
		{2, 3, "mmfff"},
		{8, 3, "mmmmmmmmfff"},
		{11, 5, "mmmmmmmmffmffmfm"},
		{9, 6, "mmmmmmmmffmffff"},
		{0, 2, "ff"},
		{9, 0, "mmmmmmmmm"},
	} {
		t.Run(fmt.Sprint(c.metadata, c.files), func(t *testing.T) {
			metadata, files := wants(c.metadata, 512<<10), wants(c.files, 256<<10)
			var got strings.Builder
			next := map[byte]int{}
			for _, w := range share(metadata, files) {
				kind := byte('f')
				if len(metadata) > 0 && w.Table == metadata[0].Table {
					kind = 'm'
				}
				if w.Chunk != next[kind] {
					t.Errorf("chunk %d of %c comes where %d belongs", w.Chunk, kind, next[kind])
				}
				next[kind]++
				got.WriteByte(kind)
			}
			if got.String() != c.want {
				t.Errorf("got %s, want %s", got.String(), c.want)
			}
		})
	}
	if n := len(within(wants(9, 1), 5*blockmap.BlockSize)); n != 5 {
		t.Errorf("%d chunks are within 5 blocks", n)
	}
	if n := len(within(wants(9, 1), 0)); n != 9 {
		t.Errorf("%d of 9 chunks without a limit", n)
	}
}
