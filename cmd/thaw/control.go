package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"thaw/cmd/thaw/internal/host/api"
)

const controlCacheUsage = "the server's cache is in `DIR` (default: " + cacheUsage + ")"

// control makes a client of the server that uses a cache directory; "" is the default
// one. The caller closes it.
func control(cache string) (*api.Client, error) {
	if cache == "" {
		var err error
		if cache, err = defaultCache(os.Getuid()); err != nil {
			return nil, err
		}
	}
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	return api.NewClient(cache), nil
}

// deviceID finds a device by its ID or its name.
func deviceID(ctx context.Context, c *api.Client, device string) (string, error) {
	all, err := c.Devices(ctx)
	if err != nil {
		return "", err
	}
	named := ""
	for _, d := range all {
		if d.ID == device {
			return d.ID, nil
		}
		if d.Name == device {
			named = d.ID // the last one: others of that name are closing
		}
	}
	if named == "" {
		return "", fmt.Errorf("the server has no device %s: see thaw list", device)
	}
	return named, nil
}
