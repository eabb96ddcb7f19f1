package blockmap_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// filled is a stream with all of its content in a cache.
func filled(t *testing.T, dir string, o blockmap.CacheOptions) (c *blockmap.Cache, s *blockmap.Stream, content []byte) {
	t.Helper()
	m := blocktest.NewImage(t, 5, 1200)
	c, err := blockmap.OpenCache(dir, quiet(o))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	table := &m.Index.Streams[1]
	if s, err = c.Stream(table); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Release)
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	for i := range table.Chunks {
		p := &table.Chunks[i]
		chunk, err := dec.Decode(p, m.Blobs[table.Blob][p.Offset:p.Offset+int64(p.Stored)], nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Fill(i, chunk); err != nil {
			t.Fatal(err)
		}
		content = append(content, chunk...)
	}
	return c, s, content
}

// sendAll sends a section over a TCP connection, and returns what arrives.
func sendAll(t *testing.T, x *blockmap.Section) (got []byte, err error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	arrived := make(chan []byte, 1)
	go func() {
		var got []byte
		if c, err := l.Accept(); err == nil {
			got, _ = io.ReadAll(c)
			c.Close()
		}
		arrived <- got
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < x.Len() && err == nil; {
		var n int64
		var sendErr error
		err = raw.Write(func(fd uintptr) bool {
			n, sendErr = x.SendTo(int(fd), off, x.Len()-off)
			return !errors.Is(sendErr, unix.EAGAIN)
		})
		if err == nil {
			err = sendErr
		}
		off += n
	}
	c.Close()
	return <-arrived, err
}

func TestSectionIsSent(t *testing.T) {
	c, s, content := filled(t, t.TempDir(), blockmap.CacheOptions{})
	for _, e := range []blockmap.Extent{s.ChunkRange(0), s.ChunkRange(1), {Start: 4096, End: s.Size() - 8192}, {Start: 0, End: s.Size()}} {
		x, ok := s.Section(e)
		if !ok {
			t.Fatalf("%v: no section", e)
		}
		if !x.InMemory() || x.Len() != e.Len() || !x.Intact() {
			t.Errorf("%v: in memory: %v, %d bytes", e, x.InMemory(), x.Len())
		}
		if got, err := sendAll(t, &x); err != nil || !bytes.Equal(got, content[e.Start:e.End]) {
			t.Errorf("%v: %d bytes arrived, %v", e, len(got), err)
		}
		// It stays while it is pinned, and no longer.
		c.Evict(1 << 30)
		if !s.Has(s.Table().Find(uint32(e.Start / blockmap.BlockSize))) {
			t.Errorf("%v: it was evicted while it was pinned", e)
		}
		x.Release()
		c.Evict(1 << 30)
		if s.Resident() > 0 {
			t.Errorf("%v: %d bytes are left after an eviction", e, s.Resident())
		}
		if _, ok := s.Section(e); ok {
			t.Errorf("%v: a section of what is absent", e)
		}
		if _, ok := s.LoadRange(t.Context(), e); ok {
			t.Errorf("%v: absent bytes are loaded", e)
		}
		at := 0
		for i := range s.Table().Chunks {
			size := s.Table().Chunks[i].Size()
			if err := s.Fill(i, content[at:at+size]); err != nil {
				t.Fatal(err)
			}
			at += size
		}
	}
	for _, e := range []blockmap.Extent{{}, {Start: -4096, End: 4096}, {Start: 4096, End: 0}, {Start: 0, End: s.Size() + 1}, {Start: 1 << 62, End: 1<<62 + 1}} {
		if _, ok := s.Section(e); ok {
			t.Errorf("%v: a section", e)
		}
		if _, ok := s.LoadRange(t.Context(), e); ok {
			t.Errorf("%v: it is loaded", e)
		}
	}
}

// A file that another program cuts short is not sent as if it was whole. It counts as
// absent from then on.
func TestSectionOfACutFile(t *testing.T) {
	dir := t.TempDir()
	c, s, content := filled(t, dir, blockmap.CacheOptions{})
	x, ok := s.Section(blockmap.Extent{End: s.Size()})
	if !ok {
		t.Fatal("no section")
	}
	for _, f := range dataFiles(t, dir) {
		if err := os.Truncate(f, 64<<10); err != nil {
			t.Fatal(err)
		}
	}
	got, err := sendAll(t, &x)
	if !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(got, content[:len(got)]) || x.Intact() {
		t.Errorf("%d bytes of a file that was cut short, %v, intact: %v", len(got), err, x.Intact())
	}
	x.Release()
	if _, ok := s.Section(blockmap.Extent{End: s.Size()}); ok {
		t.Error("a section of a file that was cut short")
	}
	if c.Damaged() == 0 || s.Has(0) {
		t.Errorf("damaged: %d, chunk 0 is here: %v", c.Damaged(), s.Has(0))
	}
}

// What cannot be sent from the file is loaded: from a cache without the page cache, and
// from memory where the disk is full.
func TestLoadRange(t *testing.T) {
	for what, o := range map[string]blockmap.CacheOptions{"buffered": {}, "direct": {Mode: blockmap.Direct}, "no descriptor": {FS: blocktest.NewFS()}} {
		_, s, content := filled(t, t.TempDir(), o)
		if _, ok := s.Section(s.ChunkRange(0)); ok != (what == "buffered") {
			t.Errorf("%s: a section: %v", what, ok)
		}
		v, ok := s.LoadRange(t.Context(), blockmap.Extent{End: s.Size()})
		if !ok {
			t.Errorf("%s: it cannot be loaded", what)
			continue
		}
		got := make([]byte, v.Len())
		if err := v.CopyTo(got); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: other bytes, or %v", what, err)
		}
		v.Release()
	}
	c, s, content := filled(t, t.TempDir(), blockmap.CacheOptions{})
	e := s.ChunkRange(0)
	c.Evict(1 << 30)
	if err := s.Hold(0, content[:e.End]); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Section(e); ok {
		t.Error("a section of what is only in memory")
	}
	v, ok := s.LoadRange(t.Context(), e)
	if !ok {
		t.Fatal("what is held in memory cannot be loaded")
	}
	defer v.Release()
	if got := make([]byte, e.Len()); v.CopyTo(got) != nil || !bytes.Equal(got, content[:e.End]) {
		t.Error("other bytes are held in memory")
	}
}
