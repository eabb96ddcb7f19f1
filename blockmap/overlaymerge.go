package blockmap

import (
	"cmp"
	"context"
)

// merge moves the blocks of the upper level to the lower one. From its begin, writes go to
// the lower level, and take their blocks from the upper one; so the upper one only loses
// blocks. A worker pulls down those that nobody writes. A flush meanwhile makes the lower
// level durable before the upper map, so after a loss of power each block is in one of
// them. When the upper level is empty, durably, it goes.
type merge struct {
	done chan struct{}
	err  error // once done is closed
}

// wait waits for the end, until ctx ends.
func (m *merge) wait(ctx context.Context) error {
	select {
	case <-m.done:
		return m.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startMerge starts the worker, unless it runs. o.freezing is held.
func (o *Overlay) startMerge() (*merge, error) {
	if o.closed.Load() {
		return nil, ErrClosed
	}
	if m := o.merging; m != nil {
		select {
		case <-m.done: // it has failed
		default:
			return m, nil
		}
	}
	m := &merge{done: make(chan struct{})}
	o.merging = m
	o.wg.Go(func() {
		defer close(m.done)
		if m.err = o.mergeLevels(o.life); m.err != nil && o.life.Err() == nil {
			o.log.Warn("cannot merge the levels of the overlay; it goes on with two", "err", m.err)
		}
	})
	return m, nil
}

// pullStep is how many words of the map are pulled at a time: 1 MiB of blocks.
const pullStep = 8

// mergeLevels is the worker.
func (o *Overlay) mergeLevels(ctx context.Context) error {
	s := o.layers.Load()
	buf := o.reads.buffers.get(pullStep * perWord * BlockSize)
	defer buf.put()
	end := s.top.m.live.words
	for i := uint32(0); i < end; i += pullStep {
		first, behind := i, min(i+pullStep, end)
		for first < behind && s.top.m.live.word(first) == 0 {
			first++
		}
		if first == behind {
			continue
		}
		if err := ctx.Err(); err != nil {
			return ErrClosed
		}
		if err := o.pull(s, first, behind, buf.b); err != nil {
			return err
		}
	}
	return o.removeUpper(s)
}

// pull moves the blocks of words first to end. What the upper level has does not change,
// but for blocks that go, so it is read before the stripes are taken.
func (o *Overlay) pull(s *layers, first, end uint32, buf []byte) error {
	for _, lv := range s.levels() {
		if err := o.replaceCut(lv); err != nil {
			return err
		}
	}
	b := first * perWord
	n := min(end*perWord, o.blocks()) - b // end*perWord fits: see maxOverlayBlocks
	at := func(b uint32, n uint32) []byte {
		return buf[int64(b-first*perWord)*BlockSize:][:int64(n)*BlockSize]
	}
	for c, left := b, n; left > 0; {
		k, st := s.top.m.live.run(c, left)
		if st == stateData {
			if err := s.top.read(c, at(c, k)); err != nil {
				return err
			}
		}
		c, left = c+k, left-k
	}
	o.stripes.lock(first, end)
	defer o.stripes.unlock(first, end)
	if err := o.poison.Load(); err != nil {
		return *err
	}
	for c, left := b, n; left > 0; {
		k, st := s.top.m.live.run(c, left)
		if st == stateData {
			if err := o.store(s, at(c, k), int64(c)*BlockSize); err != nil {
				return err
			}
		}
		if st != stateAbsent {
			if err := o.setWords(s.low, c, k, st); err != nil {
				return err
			}
		}
		c, left = c+k, left-k
	}
	return o.setWords(s.top, b, n, stateAbsent)
}

// removeUpper removes the upper level, which is empty.
func (o *Overlay) removeUpper(s *layers) error {
	o.syncing.Lock()
	defer o.syncing.Unlock()
	if err := o.syncLayers(s); err != nil {
		return err
	}
	o.switchLayers(func(s layers) layers { return layers{top: s.low} })
	o.retire(s.top, s.top.file.Swap(nil))
	err := cmp.Or(s.top.m.close(), o.closeRetired())
	if o.temp {
		return err
	}
	return cmp.Or(err, o.removeLevel(upperSuffix))
}

// removeLevel removes the files of a level that has no data.
func (o *Overlay) removeLevel(suffix string) error {
	for _, name := range []string{mapName + suffix, mapName + suffix + newSuffix, liveName + suffix, dataName + suffix} {
		if err := o.fs.RemoveAll(o.path(name)); err != nil {
			return err
		}
	}
	return o.fs.SyncDir(o.dir)
}
