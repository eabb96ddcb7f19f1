package main

import (
	"context"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/fetcher/registry"
)

// copyBlobs has the target get the blobs that it lacks: by a mount where the registry can do that, otherwise by way of a file.
func copyBlobs(ctx context.Context, from, to *registry.Repo, blobs []v1.Descriptor, temp string) error {
	for _, d := range blobs {
		has, err := to.HasBlob(ctx, d)
		if err != nil {
			return err
		}
		if !has {
			if has, err = to.MountBlob(ctx, d, from); err != nil {
				return err
			}
		}
		if !has {
			fmt.Fprintf(os.Stderr, "copying layer %s, %.1f MiB\n", d.Digest, float64(d.Size)/(1<<20))
			if err := copyBlob(ctx, from, to, d, temp); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyBlob(ctx context.Context, from, to *registry.Repo, d v1.Descriptor, temp string) error {
	f, err := os.CreateTemp(temp, "blob.")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	r, err := from.OpenBlob(ctx, d) // it ends only if the digest is right
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	_, err = to.PushBlob(ctx, d, f.Name(), nil)
	return err
}
