package zone

import "time"

// This file says when a peer is late. A peer that works gives a sign of life within a
// moment of each request: its answer, or a 102. So silence is what tells a peer that has
// died from one that waits for the registry.
//
//   - Until the first sign, a request waits as long as the signs of this zone take as a
//     rule, several times over. Then it has failed, and the next source is asked.
//   - After it, a request is late when nothing has come for a while, neither bytes nor a
//     sign, or when the bytes trickle. Then another source is asked as well. Who gives
//     signs is waiting for what was asked for, and nobody else would have it sooner.
//
// A busy machine must not make peers that live look dead, or each of its requests would
// reach the registry by way of another owner. So the wait is long until there are enough
// signs to go by; it is longer while most of the peers that were asked are silent, for then
// it is this host that is slow; and a peer that gives its sign after it was given up
// counts as one that works, and makes the wait longer for all (see Client.linger).

const (
	// signTimes is how many times longer than the 95th percentile of first signs a request
	// waits for its own.
	signTimes = 4
	// unknownTimes is the same before there are enough signs, of RouterOptions.SignFloor.
	unknownTimes = 4
	// manySilent is how many peers have to be silent until that says something about this
	// host: if there are more than twice as many of them as of those that have given a sign
	// since.
	manySilent = 3
	// nextSign is how much longer than the first sign the next one may take.
	nextSign = 2 * SignEvery
	// quietTimes is how many times longer than the 95th percentile of the pauses in answers
	// a pause may be.
	quietTimes = 2
	// onlySigns is the default of RouterOptions.OnlySigns.
	onlySigns = 5 * time.Second
)

// patience returns how long a peer has for its first sign. r.mu is held.
func (r *Router) patience() time.Duration {
	d := signTimes * r.mu.signs.high
	if d == 0 {
		d = unknownTimes * r.o.SignFloor
	}
	return min(max(d, r.o.SignFloor), r.o.SignMost)
}

// Patience returns how much longer to wait for the first sign of life of a request that
// was sent at asked, until Patience is asked again: others may show meanwhile how long it
// takes. If it is not positive, the request has failed: Late, and Silent.
func (r *Router) Patience(peer string, asked, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := asked.Add(r.patience()).Sub(now)
	if most := asked.Add(r.o.SignMost).Sub(now); left <= 0 && most > 0 && r.mostAreSilent(asked, now) {
		return min(most, r.o.SignFloor/4)
	}
	return min(left, r.o.SignFloor)
}

// mostAreSilent reports whether most of the peers that were asked are silent, so that this
// is no fault of theirs. r.mu is held.
func (r *Router) mostAreSilent(asked, now time.Time) bool {
	silent, heard := 0, 0
	for _, h := range r.mu.peers {
		switch {
		case h.sign.After(asked):
			heard++
		case h.active > h.signed && now.Sub(h.asked) >= r.o.SignFloor:
			silent++
		}
	}
	return silent >= manySilent && silent > 2*heard
}

// SignPause returns how long a request waits for its next sign of life after one.
func (r *Router) SignPause() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return nextSign + r.patience()
}

// Signed records the first sign of life of a request, which came after this time.
func (r *Router) Signed(peer string, after time.Duration, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer(peer).signed++
	r.heard(peer, after, now)
}

// Revived records that a peer has given its first sign after all, when the request had
// been given up already. So it works, and the wait was too short.
func (r *Router) Revived(peer string, after time.Duration, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.peers[peer] == nil && !r.mu.ring.Has(peer) {
		return
	}
	r.heard(peer, after, now)
	r.peer(peer).revived()
}

func (r *Router) heard(peer string, after time.Duration, now time.Time) {
	h := r.peer(peer)
	h.sign = later(h.sign, now)
	r.mu.signs.add(after)
	r.mu.failures = 0
}

// Progress is how far a request is.
type Progress struct {
	Asked     time.Time // when it was sent
	Began     time.Time // when its answer began; zero before that
	Moved     time.Time // when the last bytes came, or the last sign of life; zero before that
	Got, Size int64     // bytes
}

// Late reports whether a reader that waits for a request should have the next source asked
// as well. Nobody waits long for a peer that is tried again after failures.
func (r *Router) Late(peer string, p Progress, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	quiet := now.Sub(later(p.Asked, p.Moved))
	if h := r.mu.peers[peer]; h != nil && h.fails > 0 {
		return quiet >= r.o.HedgeFloor
	}
	bound := quietTimes * r.mu.quiet.high
	if bound == 0 {
		bound = r.o.HedgeMost
	}
	if quiet >= min(max(bound, r.o.QuietFloor), r.o.HedgeMost) {
		return true
	}
	if p.Got == 0 {
		return now.Sub(p.Asked) >= r.o.OnlySigns
	}
	// How long the peer has waited for the registry says nothing about its bytes.
	took, usual := now.Sub(later(p.Asked, p.Began)), r.usual(peer)
	rest := time.Duration(float64(took) * float64(p.Size-p.Got) / float64(p.Got))
	return took >= usual && rest >= usual // it trickles
}

// usual returns how long requests to a peer take: the 95th percentile, and no more than
// twice that of all peers, so that a peer that is always slow is not waited for. r.mu is
// held.
func (r *Router) usual(peer string) time.Duration {
	d := r.mu.all.high
	if d == 0 {
		return r.o.HedgeMost
	}
	if h := r.mu.peers[peer]; h != nil && h.latency.high > 0 {
		d = min(h.latency.high, 2*d)
	} else {
		d = 2 * d
	}
	return min(max(d, r.o.HedgeFloor), r.o.HedgeMost)
}
