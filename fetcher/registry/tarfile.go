package registry

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// tarFile is an archive of images: a tar, compressed or not. It is scanned once, at first use,
// and its members are read in place. A compressed one is decompressed then, into an unnamed
// file that exists as long as the tarFile.
type tarFile struct {
	path string
	temp string // directory for decompressed archives; "": the system's

	turn chan struct{} // a token for the one that walks
	mu   struct {
		sync.Mutex
		f *os.File // nil: not walked yet
	}
	members map[string]member // not changed once f is set
}

func newTarFile(path, temp string) *tarFile {
	return &tarFile{path: path, temp: temp, turn: make(chan struct{}, 1)}
}

// member is where in the archive a file lies.
type member struct {
	off, size int64
	link      string
	why       error // why it cannot be read
}

// Limits of what a walk keeps.
const (
	maxMembers     = 1 << 20
	maxMemberName  = 4096     // PATH_MAX
	maxMemberNames = 64 << 20 // bytes of all names and links
)

// cleanMember is the canonical name of a member.
func cleanMember(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// walk finds the members. After a failure, the next call tries again.
func (t *tarFile) walk(ctx context.Context) (*os.File, error) {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	t.mu.Lock()
	f := t.mu.f
	t.mu.Unlock()
	if f != nil {
		return f, nil
	}
	f, _, err := openRegular(t.path)
	if err != nil {
		return nil, err
	}
	plain, err := plainTar(ctx, f, t.temp)
	if plain != f {
		f.Close()
	}
	if err != nil {
		return nil, err
	}
	if t.members, err = scan(ctx, plain); err != nil {
		plain.Close()
		if ctx.Err() == nil {
			err = fmt.Errorf("%s is not a tar archive, or is damaged: %w", t.path, err)
		}
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.f = plain
	return plain, nil
}

func scan(ctx context.Context, f *os.File) (map[string]member, error) {
	members := make(map[string]member)
	names := 0
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	r := tar.NewReader(f) // which skips contents by seeking
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := r.Next()
		if err == io.EOF {
			return members, nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) { // nothing is unpacked
			return nil, err
		}
		if n >= maxMembers {
			return nil, fmt.Errorf("it has more than %d members", maxMembers)
		}
		if len(h.Name) > maxMemberName || len(h.Linkname) > maxMemberName {
			continue // no file of an image has such a name
		}
		name := cleanMember(h.Name)
		var m member
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
			if m.off, err = f.Seek(0, io.SeekCurrent); err != nil {
				return nil, err
			}
			m.size = h.Size
			if sparse(h) {
				m.why = errors.New("it is stored as a sparse file: write the archive without the option --sparse")
			}
		case tar.TypeSymlink:
			m.link = cleanMember(path.Join(path.Dir(name), h.Linkname))
		case tar.TypeLink:
			m.link = cleanMember(h.Linkname)
		default:
			continue
		}
		if names += len(name) + len(m.link); names > maxMemberNames {
			return nil, fmt.Errorf("the names of its members have more than %d bytes", maxMemberNames)
		}
		if m.link != name {
			members[name] = m // the last of several with a name counts, as when they are unpacked
		}
	}
}

// sparse says whether a member is stored as a sparse file.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// maxMemberLinks is how many links a name may lead through.
const maxMemberLinks = 40

// member finds a file, following links.
func (t *tarFile) member(ctx context.Context, name string) (*os.File, member, error) {
	f, err := t.walk(ctx)
	if err != nil {
		return nil, member{}, err
	}
	at := cleanMember(name)
	for range maxMemberLinks {
		m, ok := t.members[at]
		switch {
		case !ok:
			return nil, m, fmt.Errorf("%w: %s has no member %.200q", ErrNotFound, t.path, name)
		case m.why != nil:
			return nil, m, fmt.Errorf("%s: member %.200q: %w", t.path, name, m.why)
		case m.link == "":
			return f, m, nil
		}
		at = m.link
	}
	return nil, member{}, fmt.Errorf("%s: the links from %.200q lead nowhere", t.path, name)
}

func (t *tarFile) read(ctx context.Context, name string, max int64) ([]byte, error) {
	f, m, err := t.member(ctx, name)
	if err != nil {
		return nil, err
	}
	if m.size > max {
		return nil, fmt.Errorf("%s: member %.200q %w: it has more than %d bytes", t.path, name, errTooLong, max)
	}
	b := make([]byte, m.size)
	if _, err := f.ReadAt(b, m.off); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%s: read member %.200q: %w", t.path, name, err)
	}
	return b, nil
}

func (t *tarFile) open(ctx context.Context, name string, off, n int64, whole bool) (*Body, error) {
	f, m, err := t.member(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := within(fmt.Sprintf("%s: member %.200q", t.path, name), m.size, off, n, whole); err != nil {
		return nil, err
	}
	// The file stays open for the next reader; the garbage collector closes it with the
	// archive and its readers.
	return &Body{rc: io.NopCloser(io.NewSectionReader(f, m.off+off, n)), left: n}, nil
}

func (t *tarFile) size(ctx context.Context, name string) (int64, error) {
	_, m, err := t.member(ctx, name)
	return m.size, err
}

// has says whether there is a member of the name. walk must have succeeded.
func (t *tarFile) has(name string) bool {
	_, ok := t.members[name]
	return ok
}

func (t *tarFile) absent(name string) error {
	if _, err := os.Stat(t.path); err != nil {
		return fmt.Errorf("%w: there is no file %s", ErrNotFound, t.path)
	}
	if t.has(savedManifest) {
		return fmt.Errorf("%s is not an OCI archive, it has no %s: write docker-archive:%s", t.path, name, t.path)
	}
	return fmt.Errorf("%s is not an OCI archive, it has no %s", t.path, name)
}

func (t *tarFile) String() string { return t.path }

// unnamedFile makes a file without a name, which is removed when it is closed.
func unnamedFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err == nil {
		return f, nil
	}
	// Not all filesystems support this.
	f, err = os.CreateTemp(dir, ".thaw-archive-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
