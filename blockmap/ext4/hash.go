package ext4

import "math/bits"

// Hash tree directories are sorted by a hash of the name: half of MD4's state
// after two thirds of MD4's steps, on blocks of 32 bytes. Version 1 of the hash
// takes the bytes of the name as signed or unsigned, as the superblock's flags
// say.
const (
	hashHalfMD4 = 1

	// Hashes have their lowest bit clear: it is the continuation bit of an
	// index entry. The greatest one means the end of the directory to
	// readdir, so that no name has it.
	hashEOF = 0xFFFFFFFE
)

// nameHasher computes the hashes of names.
type nameHasher struct {
	seed   [4]uint32
	signed bool
}

func newNameHasher(seed [16]byte, signed bool) nameHasher {
	h := nameHasher{signed: signed}
	for i := range h.seed {
		h.seed[i] = le.Uint32(seed[4*i:])
	}
	if h.seed == [4]uint32{} {
		h.seed = [4]uint32{0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476}
	}
	return h
}

// hash is what a name is sorted by: first by hash, then by minor.
func (h *nameHasher) hash(name string) (hash, minor uint32) {
	state := h.seed
	var in [8]uint32
	for {
		h.fill(&in, name)
		halfMD4(&state, &in)
		if len(name) <= 32 {
			break
		}
		name = name[32:]
	}
	hash = state[1] &^ 1
	if hash == hashEOF {
		hash -= 2
	}
	return hash, state[2]
}

// fill makes eight words of the first 32 bytes of name, each the four bytes in
// big-endian order. The rest, and the missing front of a word that the name
// ends in, is the length of what is left of the name in every byte.
func (h *nameHasher) fill(in *[8]uint32, name string) {
	pad := uint32(len(name))
	pad |= pad << 8
	pad |= pad << 16
	name = name[:min(len(name), 32)]
	for i := range in {
		w := pad
		for _, c := range []byte(name[:min(len(name), 4)]) {
			v := uint32(c)
			if h.signed {
				v = uint32(int32(int8(c)))
			}
			w = w<<8 + v
		}
		in[i] = w
		name = name[min(len(name), 4):]
	}
}

// halfMD4 runs the three rounds of MD4 (RFC 1320) on half a block: 8 steps each
// instead of 16, with an order of words and amounts of rotation of its own.
func halfMD4(state *[4]uint32, in *[8]uint32) {
	a, b, c, d := state[0], state[1], state[2], state[3]
	for r := range md4Rounds {
		round := &md4Rounds[r]
		for i, word := range round.order {
			var f uint32
			switch r {
			case 0:
				f = d ^ b&(c^d) // b chooses between c and d
			case 1:
				f = b&c | d&(b|c) // majority
			case 2:
				f = b ^ c ^ d
			}
			a = bits.RotateLeft32(a+f+in[word]+round.add, round.rotate[i%4])
			a, b, c, d = d, a, b, c
		}
	}
	state[0] += a
	state[1] += b
	state[2] += c
	state[3] += d
}

var md4Rounds = [3]struct {
	add    uint32
	order  [8]uint8
	rotate [4]int
}{
	{0, [8]uint8{0, 1, 2, 3, 4, 5, 6, 7}, [4]int{3, 7, 11, 19}},
	{0x5A827999, [8]uint8{1, 3, 5, 7, 0, 2, 4, 6}, [4]int{3, 5, 9, 13}},
	{0x6ED9EBA1, [8]uint8{3, 7, 2, 6, 1, 5, 0, 4}, [4]int{3, 9, 11, 15}},
}
