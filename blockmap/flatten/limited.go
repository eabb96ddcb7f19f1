package flatten

import (
	"context"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// limited is a Target with a bound on its operations in flight. It pushes a thing once
// at a time: docker-registry can lose a blob of which it gets two uploads at once.
type limited struct {
	Target
	requests *budget
	sends    *budget // bytes of files that are being pushed

	mu      sync.Mutex
	pushing map[v1.Hash]chan struct{} // closed when the push has ended
}

func newLimited(t Target, requests *budget) *limited {
	return &limited{Target: t, requests: requests, sends: newBudget(sendBytes), pushing: make(map[v1.Hash]chan struct{})}
}

// A file that is pushed counts as its size, within sendLeast and sendMost. So many small
// ones go side by side, since they take round trips, and few large ones, since these share
// the line: one that gets too little of it would be taken for stuck.
const (
	sendBytes = 32 << 20
	sendLeast = sendBytes / DefaultRequests
	sendMost  = 4 << 20
)

// do runs one operation.
func (l *limited) do(ctx context.Context, f func() error) error {
	n, err := l.requests.take(ctx, 0, 1)
	if err != nil {
		return err
	}
	defer l.requests.give(n)
	return f()
}

func (l *limited) push(ctx context.Context, d v1.Descriptor, f func() error) error {
	mine := make(chan struct{})
	for {
		l.mu.Lock()
		other, ok := l.pushing[d.Digest]
		if !ok {
			l.pushing[d.Digest] = mine
		}
		l.mu.Unlock()
		if !ok {
			break
		}
		select {
		case <-other:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	defer func() {
		l.mu.Lock()
		delete(l.pushing, d.Digest)
		l.mu.Unlock()
		close(mine)
	}()
	return l.do(ctx, f)
}

// place is a Place whose requests share the bound of the target.
type place struct {
	Place
	l *limited
}

func (p *place) Tagged(ctx context.Context, tag string) (raw []byte, err error) {
	err = p.l.do(ctx, func() (err error) { raw, err = p.Place.Tagged(ctx, tag); return err })
	return raw, err
}

func (p *place) HasBlob(ctx context.Context, d v1.Descriptor) (has bool, err error) {
	err = p.l.do(ctx, func() (err error) { has, err = p.Place.HasBlob(ctx, d); return err })
	return has, err
}

func (p *place) Blob(ctx context.Context, d v1.Descriptor) (b []byte, err error) {
	err = p.l.do(ctx, func() (err error) { b, err = p.Place.Blob(ctx, d); return err })
	return b, err
}

func (l *limited) HasBlob(ctx context.Context, d v1.Descriptor) (has bool, err error) {
	err = l.do(ctx, func() (err error) { has, err = l.Target.HasBlob(ctx, d); return err })
	return has, err
}

func (l *limited) Blob(ctx context.Context, d v1.Descriptor) (b []byte, err error) {
	err = l.do(ctx, func() (err error) { b, err = l.Target.Blob(ctx, d); return err })
	return b, err
}

func (l *limited) Tagged(ctx context.Context, tag string) (raw []byte, err error) {
	err = l.do(ctx, func() (err error) { raw, err = l.Target.Tagged(ctx, tag); return err })
	return raw, err
}

func (l *limited) Mount(ctx context.Context, d v1.Descriptor, from Place) (mounted bool, err error) {
	err = l.push(ctx, d, func() (err error) { mounted, err = l.Target.Mount(ctx, d, from); return err })
	return mounted, err
}

func (l *limited) PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(int64)) error {
	n, err := l.sends.take(ctx, 0, min(max(d.Size, sendLeast), sendMost))
	if err != nil {
		return err
	}
	defer l.sends.give(n)
	return l.push(ctx, d, func() error { return l.Target.PushFile(ctx, d, path, progress) })
}

func (l *limited) PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error {
	return l.push(ctx, d, func() error { return l.Target.PushBytes(ctx, d, b) })
}

func (l *limited) PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error {
	return l.push(ctx, d, func() error { return l.Target.PushManifest(ctx, d, raw, tag) })
}
