package host

import (
	"thaw/blockmap"
	"thaw/fetcher"
)

// This file decides what is prefetched for a start of which no trace and no bundle says what
// it reads, and in which order.

// guess prefetches what every start is likely to read: the filesystem's metadata, and
// the files of the image's program.
func (s *start) guess(image *openImage) {
	wants := s.guessWants(image)
	if len(wants) > 0 && s.ctx.Err() == nil {
		guessed := image.fetcher.Replay(s.ctx, wants, s.replayOptions())
		s.t.mu.Lock()
		s.guessed = guessed
		s.t.mu.Unlock()
	}
}

func (s *start) guessWants(image *openImage) []blockmap.Want {
	var metadata, files []blockmap.Want
	if s.t.Ahead.Metadata {
		if i, ok := s.image.Manifest.Metadata(); ok {
			metadata = within(image.MissingStream(i), s.t.opener.cache.Quota()/4)
		}
	}
	if s.t.Ahead.Program {
		extents, err := s.image.Manifest.Guess(image.Index().Blocks)
		if err != nil {
			s.t.log.Warn("the guess in the image cannot be used", "image", s.image.Name, "err", err)
		}
		for _, e := range extents {
			files = append(files, image.Missing(e)...)
		}
	}
	return share(metadata, files)
}

// replayOptions limits a prefetch to the capacity of the cache: a larger prefetch would
// evict its first chunks before clients read them.
func (s *start) replayOptions() fetcher.ReplayOptions {
	return fetcher.ReplayOptions{Rate: s.t.Rate, MaxBytes: s.t.opener.cache.Quota() / 4 * 3}
}

const (
	// firstMetadata is how many stored bytes of metadata are prefetched before the
	// program's files: the metadata of a few hundred thousand files.
	firstMetadata = 4 << 20
	// shareMetadata is how many stored bytes of metadata, and of files, take turns behind
	// these.
	shareMetadata = 512 << 10
)

// share returns the order in which to prefetch metadata and files: the first part of the
// metadata, then both in turn, so that metadata of any size takes half of the link.
func share(metadata, files []blockmap.Want) (all []blockmap.Want) {
	take := func(from *[]blockmap.Want, bytes int64) {
		for len(*from) > 0 && bytes > 0 {
			w := (*from)[0]
			bytes -= int64(w.Table.Chunks[w.Chunk].Stored)
			all, *from = append(all, w), (*from)[1:]
		}
	}
	for take(&metadata, firstMetadata); len(metadata)+len(files) > 0; take(&metadata, shareMetadata) {
		take(&files, shareMetadata)
	}
	return all
}

// within returns the first of wants that take at most this many bytes in the cache; 0
// means all.
func within(wants []blockmap.Want, most int64) []blockmap.Want {
	if most == 0 {
		return wants
	}
	for i, w := range wants {
		if most -= int64(w.Table.Chunks[w.Chunk].Size()); most < 0 {
			return wants[:i]
		}
	}
	return wants
}
