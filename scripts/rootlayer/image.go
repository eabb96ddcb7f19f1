package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/fetcher/registry"
	"thaw/scripts/rootinit/bootconfig"
)

// An image is the container image that becomes bootable.
type image struct {
	ref       registry.Ref
	found     *registry.Image
	manifest  *v1.Manifest
	rawConfig []byte
	config    v1.ConfigFile
}

func readImage(ctx context.Context, repo *registry.Repo, platform *v1.Platform) (*image, error) {
	found, err := repo.Resolve(ctx, platform)
	if err != nil {
		return nil, err
	}
	i := &image{ref: repo.Ref(), found: found, manifest: &found.Manifest}
	fail := func(err error) (*image, error) { return nil, fmt.Errorf("%s: %w", i.ref, err) }
	if t := i.manifest.Config.MediaType; t != types.OCIConfigJSON && t != types.DockerConfigJSON {
		return fail(fmt.Errorf("it is no container image, but %s", t))
	}
	if i.rawConfig, err = repo.Blob(ctx, i.manifest.Config); err != nil {
		return fail(err)
	}
	if err := json.Unmarshal(i.rawConfig, &i.config); err != nil {
		return fail(fmt.Errorf("image config: %w", err))
	}
	switch {
	case i.config.OS != "" && i.config.OS != "linux":
		return fail(fmt.Errorf("it is an image for %s", i.config.OS))
	case len(i.config.RootFS.DiffIDs) != len(i.manifest.Layers):
		return fail(fmt.Errorf("it has %d layers, but its config lists %d", len(i.manifest.Layers), len(i.config.RootFS.DiffIDs)))
	}
	if i.config.Architecture == "" {
		i.config.Architecture, i.config.Variant = platform.Architecture, platform.Variant
	}
	return i, nil
}

// boot is the config of the image as the first process takes it.
func (i *image) boot(hostname string) (bootconfig.Config, error) {
	c := i.config.Config
	b := bootconfig.Config{Args: slices.Concat(c.Entrypoint, c.Cmd), Env: c.Env, User: c.User, Dir: c.WorkingDir, Stop: c.StopSignal, Hostname: hostname}
	if len(b.Args) > 0 && path.Base(b.Args[0]) == "init" && slices.Contains([]string{"/sbin", "/usr/sbin"}, path.Dir(b.Args[0])) {
		return bootconfig.Config{}, errOwnInit
	}
	return b, nil
}

// push pushes the image with a layer added, and returns its reference. All fields of the config and the manifest that are not
// about layers stay as they are.
func (i *image) push(ctx context.Context, to *registry.Repo, o options, added *layer) (registry.Ref, error) {
	fail := func(err error) (registry.Ref, error) { return registry.Ref{}, err }
	kind := types.OCILayer
	if i.found.MediaType == types.DockerManifestSchema2 {
		kind = types.DockerLayer
	}
	d := v1.Descriptor{MediaType: kind, Size: added.size, Digest: added.digest}
	if _, err := to.PushBlob(ctx, d, added.path, nil); err != nil {
		return fail(err)
	}
	rawConfig, err := addToConfig(i.rawConfig, added.diff)
	if err != nil {
		return fail(err)
	}
	config, err := to.PushBytes(ctx, rawConfig, i.manifest.Config.MediaType)
	if err != nil {
		return fail(err)
	}
	raw, err := addToManifest(i.found, config, d, o.src)
	if err != nil {
		return fail(err)
	}
	pushed, err := to.PushManifest(ctx, raw, i.found.MediaType, o.dst.Tag)
	if err != nil {
		return fail(err)
	}
	made := o.dst
	made.Digest = pushed.Digest
	return made, nil
}

// fields is a JSON object whose other members are kept as they are.
type fields map[string]json.RawMessage

func (f fields) set(name string, v any) error {
	raw, err := json.Marshal(v)
	f[name] = raw
	return err
}

func addToConfig(raw []byte, diff v1.Hash) ([]byte, error) {
	var c, rootfs fields
	var ids []v1.Hash
	var history []json.RawMessage
	err := json.Unmarshal(raw, &c)
	if err == nil {
		err = json.Unmarshal(c["rootfs"], &rootfs)
	}
	if err == nil {
		err = json.Unmarshal(rootfs["diff_ids"], &ids)
	}
	if err == nil && len(c["history"]) > 0 {
		err = json.Unmarshal(c["history"], &history)
	}
	if err == nil && len(history) > 0 { // where it is kept, it has an entry for each layer
		err = c.set("history", append(history, json.RawMessage(`{"created_by":"scripts/rootfs"}`)))
	}
	if err == nil {
		err = rootfs.set("diff_ids", append(ids, diff))
	}
	if err == nil {
		err = c.set("rootfs", rootfs)
	}
	if err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	return json.Marshal(c)
}

func addToManifest(old *registry.Image, config, added v1.Descriptor, base registry.Ref) ([]byte, error) {
	var m fields
	if err := json.Unmarshal(old.Raw, &m); err != nil {
		return nil, err
	}
	delete(m, "subject") // what the image refers to, the new one does not
	err := errors.Join(m.set("config", config), m.set("layers", append(slices.Clone(old.Manifest.Layers), added)))
	if old.MediaType == types.OCIManifestSchema1 {
		annotations := map[string]string{}
		for k, v := range old.Manifest.Annotations {
			annotations[k] = v
		}
		annotations["org.opencontainers.image.base.digest"] = old.Digest.String()
		delete(annotations, "org.opencontainers.image.base.name")
		if base.Registry != "" {
			annotations["org.opencontainers.image.base.name"] = strings.SplitN(base.String(), "@", 2)[0]
		}
		err = errors.Join(err, m.set("annotations", annotations))
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(m)
}
