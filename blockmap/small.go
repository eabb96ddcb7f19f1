package blockmap

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// small is the store of small files: blobs by digest, and what names meant. All
// of them count against the quota. They are worth more than chunks of their
// size, for with them a restart needs no network, so they go only when they take
// more than a share of the quota, or the disk is full of nothing else.
type small struct {
	c  *Cache
	mu struct {
		sync.Mutex
		files map[string]smallFile // by path
		bytes int64
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

// load takes note of what an earlier process left, and removes what one that was
// killed was about to write.
func (s *small) load(dir string) error {
	entries, err := s.c.fs.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := e.Info()
		switch {
		case err != nil:
		case !info.Mode().IsRegular() || strings.HasSuffix(path, newSuffix):
			err = s.c.fs.RemoveAll(path)
		default:
			s.note(path, smallFile{info.Size(), info.ModTime()})
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// note takes note of a file that was written or, where its size is negative, is
// no longer there.
func (s *small) note(path string, f smallFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.files == nil {
		s.mu.files = make(map[string]smallFile)
	}
	n := -s.mu.files[path].size
	if f.size < 0 {
		delete(s.mu.files, path)
	} else {
		s.mu.files[path] = f
		n += f.size
	}
	s.mu.bytes += n
	s.c.used.Add(n)
}

// touch notes that a file is used, and says whether it is there.
func (s *small) touch(path string) (smallFile, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.mu.files[path]
	if ok {
		f.used = time.Now()
		s.mu.files[path] = f
	}
	return f, ok
}

// put keeps b at path, making room for it if need be.
func (s *small) put(path string, b []byte) error {
	n := int64(len(b))
	if err := s.c.squeeze(n+BlockSize, func() error { return s.c.put(path, b) }); err != nil {
		return err
	}
	s.note(path, smallFile{n, time.Now()})
	if s.c.quota > 0 {
		s.mu.Lock()
		over := s.mu.bytes - s.c.quota/smallShare
		s.mu.Unlock()
		if over > 0 {
			s.evict(over)
		}
		if s.c.used.Load() > s.c.quota {
			s.c.evict(0)
		}
	}
	return nil
}

// evict removes about n bytes, what was not used for the longest time first, and
// returns how many that were. The file that was used last stays.
func (s *small) evict(n int64) (freed int64) {
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
		if err := s.c.fs.RemoveAll(f.path); err != nil {
			s.c.log.Warn("cannot evict a small file", "path", f.path, "err", err)
			continue
		}
		s.note(f.path, smallFile{size: -1})
		freed += f.size
	}
	return freed
}

// Blob returns the small blob of that digest, or fs.ErrNotExist. One that has
// been damaged is removed and is not there.
func (c *Cache) Blob(d Digest) ([]byte, error) {
	path := c.blobPath(d)
	b, err := readFile(c.fs, path, blobLimit)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != d {
		c.drop("blob "+d.String(), errors.New("its content has another digest"))
		c.small.note(path, smallFile{size: -1})
		return nil, errors.Join(fs.ErrNotExist, c.fs.RemoveAll(path))
	}
	c.small.touch(path)
	return b, nil
}

// PutBlob keeps b for a later Blob. Where there is no room for it the caller can
// go on without: a restart then needs the registry.
func (c *Cache) PutBlob(b []byte) error {
	path := c.blobPath(sha256.Sum256(b))
	if f, ok := c.small.touch(path); ok && f.size == int64(len(b)) {
		return nil
	}
	return c.small.put(path, b)
}

// Ref returns what PutRef kept under name, or fs.ErrNotExist. After a power cut
// it may be anything: whoever reads it checks it.
func (c *Cache) Ref(name string) ([]byte, error) {
	c.small.touch(c.refPath(name))
	return readFile(c.fs, c.refPath(name), refLimit)
}

// PutRef keeps b under a name, in place of what was there.
func (c *Cache) PutRef(name string, b []byte) error {
	if old, err := c.Ref(name); err == nil && bytes.Equal(old, b) {
		return nil
	}
	return c.small.put(c.refPath(name), b)
}

func (c *Cache) blobPath(d Digest) string { return filepath.Join(c.dir, blobsDir, d.String()) }

func (c *Cache) refPath(name string) string {
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(c.dir, refsDir, hex.EncodeToString(sum[:]))
}
