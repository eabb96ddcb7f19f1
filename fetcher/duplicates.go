package fetcher

// enqueue has a fetch be fetched: alone, or behind one that brings its content
// already. A fetch that a bundle was to bring has had enough of waiting for
// such. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) enqueue(ft *fetch) {
	if ft.state == downloading {
		ft.download.leave(ft)
	}
	digest := ft.chunk().Digest
	original := f.mu.contents[digest]
	switch {
	case original == ft || original == nil:
	case original.state == downloading && ft.state == downloading:
		f.addDuplicates(ft, original.duplicates...)
		original.duplicates = nil
	default:
		ft.state = duplicated
		f.addDuplicates(original, ft)
		f.addDuplicates(original, ft.duplicates...)
		ft.duplicates = nil
		if ft.demand {
			f.promote(original)
		}
		return
	}
	f.mu.contents[digest] = ft
	f.push(ft)
}

func (f *Fetcher) addDuplicates(original *fetch, duplicates ...*fetch) {
	for _, x := range duplicates {
		x.original = original
	}
	original.duplicates = append(original.duplicates, duplicates...)
}

// copyTo fills the chunk of a fetch with a copy: another was quicker to bring its
// content, from a source that works.
func (f *Fetcher) copyTo(ft *fetch) {
	if !ft.isWanted() {
		return
	}
	f.wg.Go(func() {
		if ft.stream.FillLocal(ft.key.chunk) {
			f.local.Add(1)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.end(ft, nil)
			f.dispatch()
		}
	})
}
