package flatten

import (
	"context"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Place is a repository or an OCI layout other than the target, in which earlier builds
// may have left conversions of layers. Whoever may write to it decides what the files of
// these layers contain: nothing ties a conversion to its layer but the tag that it has.
type Place interface {
	// Tagged returns the manifest under a tag, or nil if there is none.
	Tagged(ctx context.Context, tag string) ([]byte, error)
	HasBlob(ctx context.Context, d v1.Descriptor) (bool, error)
	Blob(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// OpenBlob reads a blob. The reader fails, and does not end, if the bytes are not
	// those of the descriptor.
	OpenBlob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
	String() string
}

// Target is the repository or the OCI layout that a block image is pushed to. A push
// returns when the target has stored the thing durably, and does nothing if the
// target has it already.
type Target interface {
	HasBlob(ctx context.Context, d v1.Descriptor) (bool, error)
	Blob(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// PushFile may move the file away.
	PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(sent int64)) error
	PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error
	// Mount makes a blob of another place one of the target, if the target can do so
	// without the bytes being sent.
	Mount(ctx context.Context, d v1.Descriptor, from Place) (bool, error)
	// Tagged returns the manifest under a tag, or nil if there is none.
	Tagged(ctx context.Context, tag string) ([]byte, error)
	// PushManifest stores a manifest under its digest and, unless tag is empty,
	// under tag. If the manifest has a subject, the target lists it as a referrer.
	PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error
	// OpenRange reads n bytes of a blob from off. The caller checks the bytes.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}
