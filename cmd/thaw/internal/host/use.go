package host

import (
	"encoding/json"
	"os"

	"thaw/blockmap"
	"thaw/tracefile"
)

// With TraceOptions.Push, every start is recorded and compared with the bundle or the traces
// that are stored beside its image. A start counts as unlike them if it has read less than
// half of what they list, or if less than half of what it has read is in them. A start that
// has read less than a quarter as much as they list does not count: a client has looked at
// the image, and not started it. If staleStarts starts in a row on this host are unlike, the
// recording of the last one replaces the stored traces, and a new bundle is packed of it.
const (
	leastHits   = 50 // percent
	leastRead   = 25 // percent
	staleStarts = 3
)

// UseInfo compares what a start has read with the bundle or the traces that were stored for
// it.
type UseInfo struct {
	Known  int `json:"known_leaves"`  // that the bundle or the traces list
	Read   int `json:"read_leaves"`   // that the start has read
	Hits   int `json:"hit_leaves"`    // that are both
	Unlike int `json:"unlike_starts"` // in a row, this one included; 0 if this one is like them
}

// counts reports whether the start was one.
func (u *UseInfo) counts() bool { return u.Read*100 >= u.Known*leastRead }

// like reports whether the start has read what is known.
func (u *UseInfo) like() bool {
	return u.Hits*100 >= u.Known*leastHits && u.Hits*100 >= u.Read*leastHits
}

// leafNames are leaves, by the digest of their chunk.
type leafNames map[blockmap.Digest]blockmap.LeafSet

func namesOf(p *tracefile.Plan) leafNames {
	names := make(leafNames)
	for _, s := range p.Steps {
		names[p.Chunk(s).Digest] |= blockmap.LeafRange(s.Leaf, s.Leaves)
	}
	return names
}

func namesIn(b *tracefile.Bundle) leafNames {
	names := make(leafNames)
	for i := range b.Frames {
		for _, p := range b.Frames[i].Parts {
			names[b.Chunks[p.Chunk].Digest] |= blockmap.LeafRange(p.Leaf, p.Count)
		}
	}
	return names
}

// useOf compares what was read with what was known.
func useOf(known, read leafNames) *UseInfo {
	u := new(UseInfo)
	for d, leaves := range known {
		u.Known += leaves.Len()
		u.Hits += (leaves & read[d]).Len()
	}
	for _, leaves := range read {
		u.Read += leaves.Len()
	}
	return u
}

// compare compares a start with what was stored for it, and reports whether its recording
// is to replace that.
func (t *tracer) compare(rec *recording) (anew bool) {
	s := rec.start
	log := t.log.With("image", s.image.Name)
	t.mu.Lock()
	known := s.known
	t.mu.Unlock()
	if known == nil {
		return false // it was of no use, which the log says
	}
	trace, err := readTraceFile(rec.file.target)
	var plan *tracefile.Plan
	if err == nil {
		plan, err = tracefile.NewPlan(trace, s.image.Index)
	}
	if err != nil {
		log.Warn("the start cannot be compared with what is stored", "err", err)
		return false
	}
	u := useOf(known, namesOf(plan))
	name := "use of " + s.image.Digest.String()
	unlike := t.unlikeStarts(name)
	if u.counts() {
		if unlike++; u.like() {
			unlike = 0
		}
	}
	u.Unlike = unlike
	if anew = unlike >= staleStarts; anew {
		unlike = 0
	}
	if err := t.setUnlikeStarts(name, unlike); err != nil {
		log.Debug("the cache cannot keep how much of a trace was used", "err", err)
	}
	t.mu.Lock()
	s.use = u
	t.mu.Unlock()
	log.Info("compared the start with what was stored for it", "known_leaves", u.Known, "read_leaves", u.Read, "hit_leaves", u.Hits,
		"unlike_starts", u.Unlike, "replace", anew)
	return anew
}

func readTraceFile(path string) (*tracefile.Trace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return tracefile.Read(f)
}

// unlikeStarts returns how many starts in a row were unlike. The cache keeps the number
// under a name, and may have lost it.
func (t *tracer) unlikeStarts(name string) (n int) {
	b, err := t.opener.cache.Ref(name)
	if err != nil || json.Unmarshal(b, &n) != nil || n < 0 || n >= staleStarts {
		return 0
	}
	return n
}

func (t *tracer) setUnlikeStarts(name string, n int) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return t.opener.cache.PutRef(name, b)
}
