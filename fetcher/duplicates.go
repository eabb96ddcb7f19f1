package fetcher

// enqueue queues a fetch at its sources. If another fetch already brings the same
// content, enqueue makes the new fetch a duplicate of that one. (Fetches of which a bundle
// download brings leaves do not count: they may bring only a part of the content.) f.mu
// is held; the caller calls dispatch.
func (f *Fetcher) enqueue(ft *fetch) {
	if ft.state == downloading {
		ft.download.leave(ft)
	}
	digest := ft.chunk().Digest
	original := f.mu.contents[digest]
	switch {
	case original == ft || original == nil:
	default:
		ft.state = duplicate
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

// addDuplicates makes fetches duplicates of original.
func (f *Fetcher) addDuplicates(original *fetch, duplicates ...*fetch) {
	for _, x := range duplicates {
		x.original = original
	}
	original.duplicates = append(original.duplicates, duplicates...)
}

// copyTo ends a fetch with a copy of its content. Another fetch, from a source that
// works, was quicker to bring that content.
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
