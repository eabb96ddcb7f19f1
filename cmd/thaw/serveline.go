package main

import (
	"context"
	"regexp"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
)

// serveLineTime bounds the look-up that tells whether a name leads to what was
// built.
const serveLineTime = 10 * time.Second

// serveLine is the command that serves the block image that was just built: by
// name if the name leads to it, and else by its digest at place.
func (a *app) serveLine(ctx context.Context, find *host.Finder, name, place registry.Ref, digest v1.Hash) string {
	words := []string{"thaw", "serve"}
	ctx, cancel := context.WithTimeout(ctx, serveLineTime)
	defer cancel()
	if leadsTo(ctx, find, name, digest) {
		words = append(words, name.String())
		if a.platform != defaultPlatform {
			words = append(words, "--platform", a.platform)
		}
	} else {
		words = append(words, place.WithDigest(digest).String())
	}
	if place.Registry != "" {
		for _, h := range a.insecure {
			words = append(words, "--plain-http", h)
		}
		if a.hosts != "" {
			words = append(words, "--hosts", a.hosts)
		}
	}
	for i, w := range words {
		words[i] = shellWord(w)
	}
	return strings.Join(words, " ")
}

// leadsTo says whether a server that is given name finds this block image.
func leadsTo(ctx context.Context, find *host.Finder, name registry.Ref, digest v1.Hash) bool {
	b, err := find.Find(ctx, name.String())
	return err == nil && b.Digest == digest
}

// defaultPlatform is the one of this host. Images for it are Linux's, whatever
// thaw was built for.
const defaultPlatform = "linux/" + runtime.GOARCH

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_./:@=,+%-]+$`)

// shellWord is w as a POSIX shell takes it.
func shellWord(w string) string {
	if plainWord.MatchString(w) {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
