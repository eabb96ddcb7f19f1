package flatten

import (
	"context"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Target is where a block image goes: a repository or an OCI layout. Push
// methods return once the thing is there for good, and do nothing for what is
// there already.
type Target interface {
	HasBlob(ctx context.Context, d v1.Descriptor) (bool, error)
	Blob(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// PushFile may move the file away.
	PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(sent int64)) error
	PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error
	// Tagged returns the manifest under a tag, or nil.
	Tagged(ctx context.Context, tag string) ([]byte, error)
	// PushManifest puts it under its digest, and under tag unless that is
	// empty.
	PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error
	// OpenRange reads n bytes of a blob from off, or ends in an error. They are
	// checked by who reads them.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}
