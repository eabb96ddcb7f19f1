package sim

import "time"

// Line is what connects a host to the others.
type Line struct {
	Up, Down int64         // bits per second
	Delay    time.Duration // from this line to the middle of the network, one way
}

// line is a Line in use.
type line struct {
	up, down float64 // nanoseconds per byte
	delay    time.Duration

	turns  []int32 // flows that have something to send, the next one first
	first  int     // position in turns
	busy   bool    // a piece is being sent
	flow   int32   // the one whose piece that is
	piece  int64   // its bytes
	free   time.Duration
	sent   int64 // bytes
	dead   bool  // nothing leaves it or comes in
	serves int   // requests that it serves; of the registry
}

func newLine(o Line) line {
	return line{up: 8e9 / float64(o.Up), down: 8e9 / float64(o.Down), delay: o.Delay}
}

// flow is an answer on its way. A flow can send less than it has: when its server does not
// have the rest yet, when its window is full, and when its receiver does not read it.
type flow struct {
	request  int32
	from, to int32
	size     int64 // bytes in all
	ready    int64 // bytes that the server has
	sent     int64 // bytes that left
	got      int64 // bytes that arrived
	read     int64 // bytes that the receiver has read; sent - read is at most the window
	window   int64
	due      time.Duration // when the last piece arrives: pieces of a flow keep their order
	queued   bool          // in turns of its line
	acking   bool          // an event that moves read is on its way
	used     bool
}

const pieceBytes = 64 << 10

// leastWindow is that of a TCP connection that has carried a few answers.
const leastWindow = 512 << 10

// minRTO is the least time after which Linux sends again what nothing that came later has
// shown to be lost.
const minRTO = 200 * time.Millisecond

// rtt returns the round trip between two lines.
func (w *world) rtt(a, b int32) time.Duration { return 2 * (w.lines[a].delay + w.lines[b].delay) }

// newFlow begins an answer. Its bytes leave when they are ready.
func (w *world) newFlow(request, from, to int32, size int64) int32 {
	var id int32
	if n := len(w.freeFlows); n > 0 {
		id = w.freeFlows[n-1]
		w.freeFlows = w.freeFlows[:n-1]
	} else {
		id = int32(len(w.flows))
		w.flows = append(w.flows, flow{})
	}
	bdp := int64(float64(w.rtt(from, to)) / min(w.lines[to].down, w.lines[from].up))
	w.flows[id] = flow{request: request, from: from, to: to, size: size, window: max(leastWindow, 2*bdp), used: true}
	return id
}

// push gives a flow its turn if it has something to send and may.
func (w *world) push(id int32) {
	f := &w.flows[id]
	if f.queued || f.sent >= f.ready || f.sent-f.read >= f.window {
		return
	}
	f.queued = true
	l := &w.lines[f.from]
	l.turns = append(l.turns, id)
	if !l.busy {
		w.send(f.from)
	}
}

// send sends the next piece of a line.
func (w *world) send(at int32) {
	l := &w.lines[at]
	l.busy = false
	for l.first < len(l.turns) {
		id := l.turns[l.first]
		l.first++
		if l.first > 1024 && l.first > len(l.turns)/2 {
			l.turns = l.turns[:copy(l.turns, l.turns[l.first:])]
			l.first = 0
		}
		f := &w.flows[id]
		n := min(pieceBytes, f.ready-f.sent)
		if n <= 0 { // it was cancelled
			f.queued = false
			w.release(id)
			continue
		}
		f.sent += n
		l.busy, l.flow, l.piece = true, id, n
		l.sent += n
		w.q.push(w.now+time.Duration(float64(n)*l.up), sent, at, 0)
		return
	}
	l.turns, l.first = l.turns[:0], 0
}

// pieceSent happens when a line has sent a piece.
func (w *world) pieceSent(at int32) {
	l := &w.lines[at]
	id, n := l.flow, l.piece
	f := &w.flows[id]
	f.queued = false
	to := &w.lines[f.to]
	arrive := w.now + w.rtt(f.from, f.to)/2
	took := time.Duration(float64(n) * to.down)
	switch late := w.loss(f, n); {
	case !w.reaches(at, f.to):
		// Nobody sees it. The receiver's timeout ends the request.
	case late > 0:
		f.due = max(f.due, arrive+late) + took
		w.q.push(f.due, came, id, int32(n))
	default:
		to.free = max(to.free, arrive) + took
		f.due = max(f.due, to.free)
		w.q.push(f.due, came, id, int32(n))
	}
	w.again(at, id)
	w.release(id)
	w.send(at)
}

// again gives a flow that has just sent a piece its next turn: after those of the others, or, on a
// host that writes a few answers at a time, after those of these few.
func (w *world) again(at, id int32) {
	f, l := &w.flows[id], &w.lines[at]
	if w.o.Writers == 0 || int(at) >= w.o.Hosts || l.first == 0 || f.sent >= f.ready || f.sent-f.read >= f.window {
		w.push(id)
		return
	}
	f.queued = true
	before := min(w.o.Writers-1, len(l.turns)-l.first)
	copy(l.turns[l.first-1:], l.turns[l.first:l.first+before])
	l.first--
	l.turns[l.first+before] = id
}

// loss returns how much later a piece arrives because packets of it were lost.
func (w *world) loss(f *flow, n int64) time.Duration {
	if w.o.Loss <= 0 {
		return 0
	}
	packets := float64(n) / packetBytes
	x := w.rng.Float64()
	if f.sent >= f.size && x < 3*w.o.Loss { // nothing follows that would show the loss
		return max(minRTO, w.rtt(f.from, f.to))
	}
	if x < w.o.Loss*packets {
		return w.rtt(f.from, f.to)
	}
	return 0
}

const packetBytes = 1448

// arrived happens when a piece of a flow has arrived.
func (w *world) arrived(id int32, n int64) {
	f := &w.flows[id]
	f.got += n
	if f.request >= 0 {
		w.received(id)
	}
	f = &w.flows[id]
	if f.request >= 0 && !w.paused(id) {
		w.readMore(id)
	}
	w.release(id)
}

// readMore makes the receiver read what has arrived. The sender sees that half a round trip
// later.
func (w *world) readMore(id int32) {
	f := &w.flows[id]
	full := f.sent < f.size && f.sent-f.read >= f.window
	if !full { // the sender does not wait for it
		f.read = f.got
		return
	}
	if !f.acking {
		f.acking = true
		w.q.push(w.now+w.rtt(f.from, f.to)/2, acked, id, 0)
	}
}

// ack happens when the sender learns that the receiver has read what had arrived.
func (w *world) ack(id int32) {
	f := &w.flows[id]
	f.acking = false
	f.read = f.got
	w.push(id)
	w.release(id)
}

// cancel ends a flow. The pieces that are on the way still arrive.
func (w *world) cancel(id int32) {
	f := &w.flows[id]
	f.request = -1
	f.ready, f.size = f.sent, f.sent
	w.release(id)
}

// release frees a flow that is over and of which no event is left.
func (w *world) release(id int32) {
	f := &w.flows[id]
	l := &w.lines[f.from]
	if !f.used || f.request >= 0 || f.queued || f.acking || l.busy && l.flow == id {
		return
	}
	if f.got < f.sent && !l.dead && !w.lines[f.to].dead {
		return
	}
	f.used = false
	w.freeFlows = append(w.freeFlows, id)
}
