package blockmap

// View is the content of an extent as a list of byte slices, which are pinned where
// they lie until Release. It is a plain value: a view of up to inlineSegments pieces
// allocates nothing. A view belongs to one goroutine at a time and is released once.
// The zero View is empty.
type View struct {
	n    int
	few  [inlineSegments]Segment
	many []Segment // all of them, once there are more than fit in few
}

// A read of 4 KiB or 64 KiB nearly always touches one or two runs of a device.
const inlineSegments = 4

// Segment is one piece of a View.
type Segment struct {
	Bytes []byte // must not be written to, nor kept beyond Release
	Zero  bool   // all of Bytes is zero: a hole of the device

	pin   Pinner
	token uint64
}

// Pinner keeps bytes in place. The bytes of a segment are pinned before it is appended
// to a view; Unpin ends that.
type Pinner interface {
	Unpin(token uint64)
	// Pinned is how many bytes of a cache the token keeps in place: as a rule
	// more than the segment shows, since chunks are pinned whole. It is 0 for
	// copies in memory of this process.
	Pinned(token uint64) int64
	// Damaged reports that the bytes could not be read: the file was truncated,
	// or has a bad sector. Their chunk is absent from then on, and is fetched
	// again when it is next read. The pin stays.
	Damaged(token uint64)
}

// zeros backs every hole. It is never written to, so it costs address space and one
// shared page.
var zeros [1 << 20]byte

// Append adds b to the end of the view. p is nil where b needs no pin.
func (v *View) Append(b []byte, p Pinner, token uint64) {
	v.add(Segment{Bytes: b, pin: p, token: token})
}

// AppendZeros adds n bytes of zeros.
func (v *View) AppendZeros(n int64) {
	for n > 0 {
		m := min(n, int64(len(zeros)))
		v.add(Segment{Bytes: zeros[:m:m], Zero: true})
		n -= m
	}
}

func (v *View) add(s Segment) {
	switch {
	case v.many != nil:
		v.many = append(v.many, s)
	case v.n < len(v.few):
		v.few[v.n] = s
	default:
		v.many = append(append(make([]Segment, 0, 4*len(v.few)), v.few[:]...), s)
	}
	v.n++
}

// take moves the pieces of o to the end of v. o is empty afterwards.
func (v *View) take(o *View) {
	for _, s := range o.Segments() {
		v.add(s)
	}
	*o = View{}
}

// Segments returns the pieces in order. The slice is valid until the view is appended
// to, copied or released.
func (v *View) Segments() []Segment {
	if v.many != nil {
		return v.many
	}
	return v.few[:v.n]
}

// Len is the number of bytes in the view.
func (v *View) Len() int64 {
	var n int64
	for i := range v.Segments() {
		n += int64(len(v.Segments()[i].Bytes))
	}
	return n
}

// Pinned is how many bytes of a cache the view keeps in place.
func (v *View) Pinned() (n int64) {
	for i := range v.Segments() {
		n += v.Segments()[i].Pinned()
	}
	return n
}

// Pinned is how many bytes of a cache the segment keeps in place.
func (s *Segment) Pinned() int64 {
	if s.pin == nil {
		return 0
	}
	return s.pin.Pinned(s.token)
}

// Damaged reports that the bytes of the segment could not be read: see Pinner.
func (s *Segment) Damaged() {
	if s.pin != nil {
		s.pin.Damaged(s.token)
	}
}

// CopyTo copies the view to p, which has its length. It fails with ErrDamaged where
// bytes cannot be read. Their chunk is absent then, and Fault fetches it again.
func (v *View) CopyTo(p []byte) error {
	for i := range v.Segments() {
		s := &v.Segments()[i]
		if err := CopyMapped(p, s.Bytes); err != nil {
			s.Damaged()
			return err
		}
		p = p[min(len(s.Bytes), len(p)):]
	}
	return nil
}

// Release unpins the bytes. The view is empty afterwards.
func (v *View) Release() {
	for i, s := range v.Segments() {
		if s.pin != nil {
			s.pin.Unpin(s.token)
		}
		v.Segments()[i] = Segment{}
	}
	v.n, v.many = 0, nil
}
