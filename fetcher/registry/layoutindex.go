package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

func (l *layout) putManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string, _ *v1.Descriptor) error {
	if err := l.putBlob(ctx, d, blob{data: raw}, nil); err != nil {
		return err
	}
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	// Other entries are kept byte by byte, with fields that v1 does not know.
	path := filepath.Join(l.dir, "index.json")
	old, err := readBounded(path, maxManifest)
	if err != nil {
		return err
	}
	var index map[string]json.RawMessage
	var entries []json.RawMessage
	if err := json.Unmarshal(old, &index); err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	if err := json.Unmarshal(index["manifests"], &entries); err != nil && index["manifests"] != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	if index == nil {
		return fmt.Errorf("parse %s: it is not an object", path)
	}
	entries, err = enter(entries, d, tag)
	if err != nil {
		return err
	}
	if index["manifests"], err = json.Marshal(entries); err != nil {
		return err
	}
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if len(b) > maxManifest {
		return fmt.Errorf("%s would be longer than %d bytes", path, maxManifest)
	}
	tmp, err := writeTemp(l.dir, func(f *os.File) error {
		_, err := f.Write(b)
		return err
	})
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(l.dir)
}

// enter puts d into the entries of index.json. The entry that had the tag before is removed,
// or loses the tag if it has a subject, by which it is still found.
func enter(entries []json.RawMessage, d v1.Descriptor, tag string) ([]json.RawMessage, error) {
	annotations := make(map[string]string)
	for k, v := range d.Annotations {
		annotations[k] = v
	}
	delete(annotations, refName)
	if tag != "" {
		annotations[refName] = tag
	}
	d.Annotations = annotations
	var kept []json.RawMessage
	for _, raw := range entries {
		var e v1.Descriptor
		if err := json.Unmarshal(raw, &e); err != nil {
			kept = append(kept, raw)
			continue
		}
		name := e.Annotations[refName]
		switch {
		case e.Digest == d.Digest && (name == tag || name == ""):
			continue // d says the same, or more
		case e.Digest == d.Digest && tag == "":
			return entries, nil // it is listed with a tag already
		case tag != "" && name == tag:
			if e.ArtifactType == "" {
				continue
			}
			delete(e.Annotations, refName)
			b, err := json.Marshal(e)
			if err != nil {
				return nil, err
			}
			raw = b
		}
		kept = append(kept, raw)
	}
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return append(kept, b), nil
}

// lock keeps other processes and goroutines from replacing index.json.
func (l *layout) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(l.dir, "index.json.lock"), os.O_CREATE|os.O_RDWR|unix.O_NONBLOCK, 0o666)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			f.Close()
			return nil, fmt.Errorf("wait for the lock %s: %w", f.Name(), ctx.Err())
		}
	}
}
