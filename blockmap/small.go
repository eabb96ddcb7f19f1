package blockmap

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"
)

// smallStore keeps small files: blobs by digest, what names meant, and roots. All
// of them count against the quota, in whole blocks. With them a restart needs no
// network, so they are worth more than chunks of their size: they go only when
// they take more than a share of the quota, or when the disk is full of nothing
// else.
type smallStore struct {
	disk    *disk
	writer  *fileWriter
	evictor *evictor

	mu struct {
		sync.Mutex
		files map[string]smallFile // by path
		bytes int64                // the space that they take
	}
}

type smallFile struct {
	size int64
	used time.Time
}

// smallShare of the quota is for small files.
const smallShare = 8

// What is read back is bounded: a blob is at most the largest index.
const (
	blobLimit = 256 << 20
	refLimit  = 1 << 20
)

// load notes the files that an earlier process left, and removes those that it
// had not finished.
func (s *smallStore) load(dirs ...string) error {
	for _, dir := range dirs {
		entries, err := s.disk.fs.ReadDir(s.disk.path(dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			path := s.disk.path(dir, e.Name())
			info, err := e.Info()
			switch {
			case err != nil:
			case !info.Mode().IsRegular() || strings.HasSuffix(path, newSuffix):
				err = s.disk.fs.RemoveAll(path)
			default:
				s.note(path, smallFile{info.Size(), info.ModTime()})
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// note notes a file that was written.
func (s *smallStore) note(path string, f smallFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.files == nil {
		s.mu.files = make(map[string]smallFile)
	}
	n := allocated(f.size) - allocated(s.mu.files[path].size)
	s.mu.files[path] = f
	s.mu.bytes += n
	s.disk.used.Add(n)
}

// forget undoes note, and returns the space that was counted.
func (s *smallStore) forget(path string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := allocated(s.mu.files[path].size)
	delete(s.mu.files, path)
	s.mu.bytes -= n
	s.disk.used.Add(-n)
	return n
}

// touch notes that a file is used, and returns it if it exists.
func (s *smallStore) touch(path string) (smallFile, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.mu.files[path]
	if ok {
		f.used = time.Now()
		s.mu.files[path] = f
	}
	return f, ok
}

// put keeps b at path, evicting for it where that is necessary.
func (s *smallStore) put(path string, b []byte) error {
	return s.store(path, int64(len(b)), func(put func([]byte) error) error { return put(b) })
}

// store keeps at path what fill puts, some size bytes, evicting where that is
// necessary. fill may be called several times, and may put nothing.
func (s *smallStore) store(path string, size int64, fill func(put func(b []byte) error) error) error {
	n := int64(-1)
	put := func(b []byte) error {
		n = int64(len(b))
		return s.writer.put(path, b)
	}
	err := s.evictor.squeeze(size+BlockSize, func() error { return fill(put) })
	if err != nil || n < 0 {
		return err
	}
	s.note(path, smallFile{n, time.Now()})
	if s.disk.quota == 0 {
		return nil
	}
	if over := s.size() - s.disk.quota/smallShare; over > 0 {
		s.evictor.evictSmall(over)
	}
	_, _ = s.evictor.evict(0) // b is kept all the same
	return nil
}

func (s *smallStore) size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.bytes
}

// remove removes a file, and returns the space that it took.
func (s *smallStore) remove(path string) (freed int64, err error) {
	if err := s.disk.fs.RemoveAll(path); err != nil {
		return 0, err
	}
	return s.forget(path), nil
}

// evict removes about n bytes of files that are not held, the least recently used
// first, and returns how many that were. The file that was used last stays.
func (s *smallStore) evict(n int64, held func(path string) bool) (freed int64) {
	type file struct {
		path string
		smallFile
	}
	s.mu.Lock()
	all := make([]file, 0, len(s.mu.files))
	for path, f := range s.mu.files {
		all = append(all, file{path, f})
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b file) int { return cmp.Or(a.used.Compare(b.used), strings.Compare(a.path, b.path)) })
	for i, f := range all {
		if freed >= n || i == len(all)-1 {
			break
		}
		if held(f.path) {
			continue
		}
		n, err := s.remove(f.path)
		if err != nil {
			s.disk.log.Warn("cannot evict a small file", "path", f.path, "err", err)
		}
		freed += n
	}
	return freed
}

// blob returns the small blob of that digest, or fs.ErrNotExist. One that has
// been damaged is removed.
func (s *smallStore) blob(d Digest) ([]byte, error) {
	path := s.disk.blobPath(d)
	b, err := readFile(s.disk.fs, path, blobLimit)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != d {
		s.disk.drop("blob", d.String(), errors.New("its content has another digest"))
		_, err := s.remove(path)
		return nil, errors.Join(fs.ErrNotExist, err)
	}
	s.touch(path)
	return b, nil
}

// putBlob keeps b under its digest.
func (s *smallStore) putBlob(b []byte) error {
	path := s.disk.blobPath(sha256.Sum256(b))
	if f, ok := s.touch(path); ok && f.size == int64(len(b)) {
		return nil
	}
	return s.put(path, b)
}

// ref returns what a name leads to, or fs.ErrNotExist.
func (s *smallStore) ref(name string) ([]byte, error) {
	path := s.disk.refPath(name)
	s.touch(path)
	return readFile(s.disk.fs, path, refLimit)
}

// putRef keeps what a name leads to, in place of what it led to before.
func (s *smallStore) putRef(name string, b []byte) error {
	if old, err := s.ref(name); err == nil && bytes.Equal(old, b) {
		return nil
	}
	return s.put(s.disk.refPath(name), b)
}

// blobPath is where the small blob of that digest lies.
func (d *disk) blobPath(g Digest) string { return d.path(blobsDir, g.String()) }

// refPath is where what a name leads to lies.
func (d *disk) refPath(name string) string {
	return d.path(refsDir, Digest(sha256.Sum256([]byte(name))).String())
}

// rootPath is where the root of an image lies.
func (d *disk) rootPath(image Digest) string { return d.path(rootsDir, image.String()) }
