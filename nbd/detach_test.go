package nbd

import (
	"bytes"
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"

	"thaw/blockmap"
)

// However much of a batch has been sent when its bytes turn out to be unreadable, the
// client gets the replies that it would have got, or errors if the bytes are
// unavailable, and nothing else.
func TestDetachAnywhere(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	dev := newCutDevice(t, 3)
	late, failed := 0, 0
	for round := range 400 {
		structured, away := round%2 == 0, round%4 < 2
		nc := &script{in: bytes.NewReader(nil)}
		s := newSession(&conn{srv: &Server{}, nc: nc}, nc, terms{export: &Export{Device: dev}, structured: structured},
			slog.New(slog.DiscardHandler), func(error) {})
		s.ctx = t.Context()
		dev.cut(dev.Size()) // whole

		// Replies of all kinds.
		b := &s.hits
		lengths := make(map[uint64]int)
		offsets := make(map[uint64]int64)
		for i := range uint64(1 + rng.IntN(8)) {
			if rng.IntN(4) == 0 {
				b.fail(1000+i, eInval, "no", -1, structured)
				continue
			}
			off := rng.Int64N(dev.Size() - 1)
			n := 1 + rng.Int64N(min(dev.Size()-off, 300<<10))
			r := request{cmd: cmdRead, cookie: i, offset: uint64(off), length: uint32(n), flags: uint16(rng.IntN(2)) * cmdFlagDF}
			d := b.slot()
			var ok bool
			if d.view, ok = dev.View(blockmap.Range(off, n)); !ok {
				t.Fatal("not resident")
			}
			b.data(&r, d, structured)
			lengths[i], offsets[i] = int(n), off
		}
		sent := rng.IntN(b.size)
		var whole []byte
		for _, p := range b.bufs {
			got := make([]byte, len(p))
			if err := blockmap.CopyMapped(got, p); err != nil {
				t.Fatal(err)
			}
			whole = append(whole, got...)
		}

		dev.setAway(away)
		dev.cutMore(rng.Int64N(dev.Size()) &^ (blockmap.BlockSize - 1))
		err := s.detach(b, sent)
		out := whole[:sent]
		for _, p := range b.bufs {
			out = append(out[:len(out):len(out)], p...)
		}
		b.reset()
		if err != nil {
			if !away || !errors.Is(err, errLate) {
				t.Fatalf("away=%v: %v", away, err)
			}
			late++
			continue
		}
		if !away && !bytes.Equal(out, whole) {
			t.Fatal("the replies differ")
		}
		c := &client{t, &script{in: bytes.NewReader(out)}}
		in := c.nc.(*script).in.(*bytes.Reader)
		bad := make(map[uint64]bool)
		for in.Len() > 0 {
			if !structured {
				// A simple reply has the requested length.
				var p [simpleReplyLen]byte
				in.Read(p[:])
				in.Seek(-simpleReplyLen, 1)
				cookie := uint64(p[14])<<8 | uint64(p[15])
				k := c.chunk(lengths[cookie])
				if k.errno != 0 {
					bad[cookie] = true
				} else if !bytes.Equal(k.data, dev.content[offsets[cookie]:][:lengths[cookie]]) {
					t.Fatal("wrong bytes")
				}
				continue
			}
			var data []chunk
			wrong := int64(-1) // where the reply says that it goes wrong
			for _, k := range c.reply(0) {
				switch k.typ {
				case chunkErrorOffset:
					wrong = int64(k.offset)
				case chunkError:
					wrong = 0
				default:
					data = append(data, k)
				}
			}
			for _, k := range data {
				good := k.data
				if wrong >= int64(k.offset) && wrong < int64(k.offset)+int64(len(good)) {
					good = good[:wrong-int64(k.offset)]
				}
				if !bytes.Equal(good, dev.content[k.offset:][:len(good)]) {
					t.Fatal("wrong bytes")
				}
			}
			if wrong > 0 {
				bad[uint64(wrong)] = true
			} else if wrong < 0 && len(data) > 0 {
				assemble(t, data, uint64(offsets[data[0].cookie]), lengths[data[0].cookie])
			}
		}
		if len(bad) > 0 {
			failed++
		}
	}
	if late == 0 || failed == 0 {
		t.Errorf("%d ended late and %d failed: the test did not try all cases", late, failed)
	}
}
