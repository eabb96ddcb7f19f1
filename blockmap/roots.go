package blockmap

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// rootStore has the roots of a cache, and knows what they hold.
type rootStore struct {
	disk  *disk
	small *smallStore // keeps their files

	// writing is held across the encoding and writing of a root, and across the
	// removal of one, so that the file says what memory says.
	writing sync.Mutex

	mu struct {
		sync.Mutex
		byImage map[Digest]*rooted
		streams map[Digest]int // how many roots hold the stream of that ID
		files   map[string]int // how many roots hold the small file at that path
	}
}

type rooted struct {
	Root
	used time.Time
}

func newRootStore(d *disk, small *smallStore) *rootStore {
	rs := &rootStore{disk: d, small: small}
	rs.mu.byImage = make(map[Digest]*rooted)
	rs.mu.streams = make(map[Digest]int)
	rs.mu.files = make(map[string]int)
	return rs
}

// load reads the roots that an earlier process left, and removes those that are
// damaged.
func (rs *rootStore) load() error {
	entries, err := rs.disk.fs.ReadDir(rs.disk.path(rootsDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := rs.disk.path(rootsDir, e.Name())
		b, err := readFile(rs.disk.fs, path, rootLimit)
		var r *Root
		if err == nil {
			r, err = DecodeRoot(b)
		}
		if err == nil && r.Image.String() != e.Name() {
			err = fmt.Errorf("%w: it is the root of image %.12s", ErrCorrupt, r.Image)
		}
		if err != nil {
			rs.disk.drop("root", e.Name(), err)
			if _, err := rs.small.remove(path); err != nil {
				return err
			}
			continue
		}
		var used time.Time
		if info, err := e.Info(); err == nil {
			used = info.ModTime()
		}
		rs.mu.Lock()
		rs.replace(&rooted{*r, used})
		rs.mu.Unlock()
	}
	return nil
}

// replace makes r the root of its image, in place of an earlier one. rs.mu is
// held.
func (rs *rootStore) replace(r *rooted) {
	rs.drop(r.Image)
	rs.mu.byImage[r.Image] = r
	rs.count(r, 1)
}

// drop forgets the root of an image. rs.mu is held.
func (rs *rootStore) drop(image Digest) {
	if r := rs.mu.byImage[image]; r != nil {
		delete(rs.mu.byImage, image)
		rs.count(r, -1)
	}
}

// count adds n to the number of roots of all that r holds. rs.mu is held.
func (rs *rootStore) count(r *rooted, n int) {
	for _, id := range r.Streams {
		if rs.mu.streams[id] += n; rs.mu.streams[id] == 0 {
			delete(rs.mu.streams, id)
		}
	}
	file := func(path string) {
		if rs.mu.files[path] += n; rs.mu.files[path] == 0 {
			delete(rs.mu.files, path)
		}
	}
	file(rs.disk.rootPath(r.Image))
	for _, d := range r.Blobs {
		file(rs.disk.blobPath(d))
	}
	for _, name := range r.Refs {
		file(rs.disk.refPath(name))
	}
}

// holdsStream says whether a root names the stream.
func (rs *rootStore) holdsStream(id Digest) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.mu.streams[id] > 0
}

// holdsFile says whether a root names the small file at path, or is it.
func (rs *rootStore) holdsFile(path string) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.mu.files[path] > 0
}

// all are the roots, the most recently used first.
func (rs *rootStore) all() []*rooted {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	all := make([]*rooted, 0, len(rs.mu.byImage))
	for _, r := range rs.mu.byImage {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *rooted) int {
		return cmp.Or(b.used.Compare(a.used), a.Image.compare(b.Image))
	})
	return all
}

// add adds r to the root of its image. A name leads to one image: roots of other
// images lose the names that r has.
func (rs *rootStore) add(r Root) error {
	if r = r.union(Root{}); !r.fits() {
		return r.tooLarge()
	}
	rs.mu.Lock()
	if old := rs.mu.byImage[r.Image]; old != nil {
		r = r.union(old.Root)
	}
	if !r.fits() {
		rs.mu.Unlock()
		return r.tooLarge()
	}
	changed := []Digest{r.Image}
	for image, other := range rs.mu.byImage {
		if left := without(other.Refs, r.Refs); image != r.Image && len(left) < len(other.Refs) {
			less := &rooted{other.Root, other.used}
			less.Refs = left
			rs.replace(less)
			changed = append(changed, image)
		}
	}
	rs.replace(&rooted{r, time.Now()})
	rs.mu.Unlock()
	var err error
	for _, image := range changed {
		err = errors.Join(err, rs.write(image))
	}
	return err
}

// write brings the file of a root up to date.
func (rs *rootStore) write(image Digest) error {
	const usual = 4 << 10 // bytes
	return rs.small.store(rs.disk.rootPath(image), usual, func(put func(b []byte) error) error {
		rs.writing.Lock()
		defer rs.writing.Unlock()
		rs.mu.Lock()
		r := rs.mu.byImage[image]
		rs.mu.Unlock()
		if r == nil {
			return nil // removed meanwhile
		}
		return put(r.Encode())
	})
}

// remove removes the root of an image, and returns the space that its file took.
func (rs *rootStore) remove(image Digest) (freed int64, err error) {
	rs.writing.Lock()
	defer rs.writing.Unlock()
	rs.mu.Lock()
	rs.drop(image)
	rs.mu.Unlock()
	return rs.small.remove(rs.disk.rootPath(image))
}

// coldest is the image whose root goes next: the least recently used one of those
// that are not in use or, if all are, of all. The root used last stays.
func (rs *rootStore) coldest(inUse func(stream Digest) bool) (image Digest, ok bool) {
	all := rs.all()
	if len(all) < 2 {
		return image, false
	}
	all = all[1:]
	for _, r := range slices.Backward(all) {
		if !slices.ContainsFunc(r.Streams, inUse) {
			return r.Image, true
		}
	}
	return all[len(all)-1].Image, true
}

// without is list without the strings that are in others.
func without(list, others []string) (left []string) {
	for _, s := range list {
		if !slices.Contains(others, s) {
			left = append(left, s)
		}
	}
	return left
}
