package blockmap

// Resident is the number of bytes of the image's streams that are on disk. A stream
// that the index lists twice counts twice, as in the sum of the streams' sizes.
func (m *Image) Resident() (n int64) {
	for _, s := range m.streams {
		n += s.Resident()
	}
	return n
}
