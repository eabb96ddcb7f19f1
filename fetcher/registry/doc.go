// Package registry is where images and their blobs are read from and written
// to: a repository of an OCI registry, spoken to over HTTP, an OCI layout
// directory, or, for reading only, an archive: what `docker save` writes, or a tar
// of an OCI layout, compressed or not.
//
// The one idea is that nothing is believed but a digest. A tag is turned into
// a descriptor once (Repo.Resolve); from then on everything is asked for by
// digest and size, so it does not matter which of several sources answers: a
// mirror, the object storage that a registry redirects to, or a directory.
// Whole blobs are checked here; ranges of blobs cannot be, so who reads one
// checks what it holds and says so with Body.Distrust when it is wrong.
//
//	client := registry.New(registry.Options{})
//	defer client.Close()
//	ref, err := registry.ParseRef("registry.example/team/app:v1")
//	repo, err := client.Open(ref)
//	img, err := repo.Resolve(ctx, &v1.Platform{OS: "linux", Architecture: "amd64"})
//	artifacts, err := repo.Referrers(ctx, img.Descriptor, "application/vnd.example")
//	body, err := repo.OpenRange(ctx, img.Manifest.Layers[0].Digest, 1<<20, 64<<10)
//
// A Client holds what repositories share: connections, mirrors and their
// health, counters. A Repo is one repository, directory or archive, opened by
// a reference. Both are safe for concurrent use.
//
// # Sources and trust
//
// A repository of a registry is also at its mirrors (ParseMirrors,
// Client.SetMirrors). Mirrors are asked first for what a digest names, since it
// can be checked. What no digest vouches for comes from the registry itself: what
// a tag leads to, which manifests refer to an image, whether a blob is there to be
// pushed. A mirror is asked for tags and referrers only if the user marks it as
// trusted to resolve. A list of referrers is a claim of whoever may push to the
// repository: callers check the subject of a manifest that it lists.
//
// Sources race. The next one is asked when one fails, and also when one does not
// answer in four times its usual latency (0.25 s to 2 s); the first answer wins. A
// mirror rests after a failure, after wrong bytes, when it trickles, and when it
// is late four times in a row; then one request at a time finds out whether it
// works again. No more than 16 requests wait for a mirror that does not answer
// any. A body must bring 16 KiB in each StallTimeout. For a reader that waits for
// less than that, OpenRangeElsewhere asks the other sources.
//
// # Registries as they are
//
// The spec is what thaw asks by, and not what it expects. Any 2xx will do; uploads
// are redirected, with bodies, and go in pieces where a body is too large; sizes
// come by GET where HEAD is refused; the referrers API and the fallback tag are
// united, and what is unusable of either is passed over; ranges that are wrong are
// followed by the whole blob. A look-up that only saves work never fails an
// operation: see Absent. Credentials go to the host that they are for, and to a
// host that a registry redirects to only if that asks by a challenge. Credentials
// that cannot be read are a warning, until a registry refuses.
//
// # Errors
//
// Every error says what was being done, to what and where; query strings are
// cut from URLs since they carry signatures. ErrNotFound, ErrUnauthorized,
// ErrUnavailable, ErrTruncated, ErrDigest, ErrTagTaken and ErrUnlisted are there
// for callers that branch; Temporary says whether the same call may succeed later, and
// RetryAfter how long the server asked to be left alone.
//
// What is small or made of several requests is retried here. OpenRange is
// not: it is the hot path, and its caller knows the deadline.
//
// # Several ranges at once
//
// A request costs a registry as much as a megabyte or more, and what a start reads lies all
// over its blobs, so OpenRanges asks for up to 16 ranges in one (RFC 9110, 14.2).
// docker-registry and most web servers answer with a multipart of them; object
// storage answers with all of the blob, or with the first. Which it is nobody
// says beforehand. So one request of a process finds out, is given up if need be,
// and Ranges says from then on what to do.
//
// # What is ours and why
//
// Names, descriptors and manifests are go-containerregistry's, and docker's
// config and its helpers are read through its keychain. The requests are made
// here, because three things matter to who serves disks for weeks that its
// transport does otherwise: many readers that wait for a token get one token,
// and not one each; credentials are read anew whenever a token is; and where a
// registry redirects to is remembered, so that a range costs one round trip.
// Its layers of an archive are recompressed, which changes their digests, so
// archives are read here as well.
//
// # Layouts
//
// An OCI layout is written so that a reader never sees half of anything: blobs
// appear by rename after an fsync, index.json is replaced the same way under
// an exclusive flock on index.json.lock beside it. A manifest that was pushed
// has an entry in index.json, which carries its tag in the annotation
// org.opencontainers.image.ref.name, and its artifactType and annotations if
// it has a subject.
//
// # Archives
//
// An archive is walked once and then read where its members lie. One that is
// compressed is decompressed first, into a file without a name in
// Options.TempDir: blobs are read by ranges, and layers beside each other. What an
// archive says is believed no more than what a registry says.
//
// # Platforms
//
// Which image of an index is meant follows containerd's platforms.Only: the
// variant that is asked for, then those below it (arm/v7, v6, v5), then what the
// processor runs as well (386 on amd64, arm on arm64). Versions and features of the
// operating system are ignored. An entry that says no platform is looked at: its
// image's config has it.
package registry
