package sim

import "time"

// event is something that happens at a time. What a and b are depends on its kind.
type event struct {
	at   time.Duration
	seq  uint64 // of events at one time, the one that was made first comes first
	kind kind
	a, b int32
}

func (e *event) before(f *event) bool { return e.at < f.at || e.at == f.at && e.seq < f.seq }

// queue orders events by time: a heap in which each event has up to four below it, which is
// less deep than one with two.
type queue struct {
	events []event
	seq    uint64
}

func (q *queue) push(at time.Duration, k kind, a, b int32) {
	q.seq++
	e := event{at, q.seq, k, a, b}
	q.events = append(q.events, e)
	h := q.events
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 4
		if !e.before(&h[up]) {
			break
		}
		h[i] = h[up]
		i = up
	}
	h[i] = e
}

func (q *queue) pop() (event, bool) {
	h := q.events
	if len(h) == 0 {
		return event{}, false
	}
	first := h[0]
	n := len(h) - 1
	e := h[n]
	q.events = h[:n]
	h = h[:n]
	i := 0
	for {
		child := 4*i + 1
		if child >= n {
			break
		}
		least := child
		for c := child + 1; c < min(child+4, n); c++ {
			if h[c].before(&h[least]) {
				least = c
			}
		}
		if !h[least].before(&e) {
			break
		}
		h[i] = h[least]
		i = least
	}
	if n > 0 {
		h[i] = e
	}
	return first, true
}
