package flatten

import (
	"context"
	"io"
	"os"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// discard is a Target that keeps nothing.
type discard struct{}

func (discard) HasBlob(context.Context, v1.Descriptor) (bool, error)               { return false, nil }
func (discard) Blob(context.Context, v1.Descriptor) ([]byte, error)                { return nil, os.ErrNotExist }
func (discard) PushBytes(context.Context, v1.Descriptor, []byte) error             { return nil }
func (discard) Mount(context.Context, v1.Descriptor, Place) (bool, error)          { return false, nil }
func (discard) Tagged(context.Context, string) ([]byte, error)                     { return nil, nil }
func (discard) PushManifest(context.Context, v1.Descriptor, []byte, string) error  { return nil }
func (discard) PushFile(context.Context, v1.Descriptor, string, func(int64)) error { return nil }
func (discard) OpenRange(context.Context, blockmap.Digest, int64, int64) (io.ReadCloser, error) {
	return nil, os.ErrNotExist
}

// BenchmarkBuild builds real images, to a target that keeps nothing.
func BenchmarkBuild(b *testing.B) {
	for _, name := range []string{"flask", "torch"} {
		b.Run(name, func(b *testing.B) {
			src, _ := realImage(b, name)
			began := cpu(b)
			for b.Loop() {
				res, err := Build(b.Context(), src, discard{}, Options{
					Size: DefaultSize, ChunkSize: DefaultChunkSize, Level: DefaultLevel, TempDir: b.TempDir(),
				})
				if err != nil {
					b.Fatal(err)
				}
				var content, stored int64
				for _, l := range res.Layers {
					content, stored = content+l.Content, stored+l.Stored
				}
				b.SetBytes(content)
				b.ReportMetric(float64(stored), "stored-B")
			}
			b.ReportMetric((cpu(b)-began).Seconds()/float64(b.N), "cpu-s/op")
		})
	}
}

// cpu is the time that all processors have spent on this process.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkConvert converts the largest layer of a real image, in parts.
func BenchmarkConvert(b *testing.B) {
	src, _ := realImage(b, "torch")
	open := func() io.ReadCloser {
		r, err := src.Layers[1].Open(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		return r
	}
	b.Run("decompress", func(b *testing.B) {
		for b.Loop() {
			in := open()
			r, err := decompress(b.Context(), in, semaphore.NewWeighted(blockmap.MaxWindow))
			if err != nil {
				b.Fatal(err)
			}
			n, err := io.Copy(io.Discard, struct{ io.Reader }{r})
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(n)
			r.Close()
			in.Close()
		}
	})
}
