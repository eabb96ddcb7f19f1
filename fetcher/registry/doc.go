// Package registry reads images and their blobs from a repository of an OCI registry, an
// OCI layout directory or an archive, and writes them to the first two. An archive is what
// `docker save` writes, or a tar of an OCI layout, compressed or not.
//
// The one idea is that only a digest is believed. A tag is turned into a descriptor once
// (Repo.Resolve); from then on everything is asked for by digest and size, so it does not
// matter which source answers: a mirror, the object storage that a registry redirects to,
// or a directory. Whole blobs are verified here. Ranges of blobs cannot be, so the reader
// verifies what they hold, and calls Body.Distrust when it is wrong. A Repo is an origin of
// chunks as package fetcher wants one.
//
//	client := registry.New(registry.Options{})
//	defer client.Close()
//	ref, err := registry.ParseRef("registry.example/team/app:v1")
//	repo, err := client.Open(ref)
//	img, err := repo.Resolve(ctx, &v1.Platform{OS: "linux", Architecture: "amd64"})
//	artifacts, err := repo.Referrers(ctx, img.Descriptor, "application/vnd.example")
//	body, err := repo.OpenRange(ctx, blob, 1<<20, 64<<10)
//
// A Client holds what repositories share: connections, mirrors, the health of sources,
// counters. A Repo is one repository, directory or archive, opened by a reference. Both are
// safe for concurrent use.
//
// # Sources and trust
//
// A registry may have mirrors (ParseMirrors, Client.SetMirrors). They are asked first for
// what a digest names, since that can be verified. Answers without a digest come from the
// registry itself: what a tag leads to, which manifests refer to an image, whether a blob
// exists. A mirror is asked for tags and referrers only if the user marks it as trusted to
// resolve. A list of referrers is a claim of anybody who may push to the repository, so
// callers check the subject of each manifest that it lists.
//
// The next source is asked when one fails, and also when one does not answer within four
// times its usual latency (0.25 s to 2 s); the first answer wins. When many answers are late,
// most requests wait for 2 s, so that a mirror that is busy still takes load off the registry.
// A mirror is not asked for some time after a failure, after wrong bytes, when it trickles, and
// when it is late four times in a row and answers nothing for 2 s; then one request at a time
// finds out whether it works again. At most 16 requests wait for a mirror that answers none. A
// body must bring 16 KiB in each StallTimeout. A reader that will not wait for that calls OpenRangeElsewhere, which asks
// the other sources.
//
// # Caches and peer-to-peer proxies
//
// A mirror's answer to a request for a range must have the status 206, exactly the range that
// was asked for, the size that earlier answers had, and no encoding. Anything else counts as a
// failure of the mirror, since the registry can answer instead; of a registry, thaw accepts
// more. The digest decides in the end.
//
// A pull-through cache that does not have a blob yet sends the whole blob with 200. thaw then
// closes the answer and asks again a little later. Meanwhile readers wait, for at most five
// seconds in a minute, for all blobs of a mirror
// together, and then read from the registry until the mirror has the blob. A range of a blob of
// at most 1 MiB is taken from the whole blob. A cache that keeps only what a client has read to
// its end (docker-registry from version 3 on) does not learn a large blob in this way: pull the
// image through it once.
//
// A registry that sends whole blobs may be such a cache itself, whose address the image is named
// by. It is told by the header Docker-Distribution-Api-Version from servers that know no ranges,
// and readers wait for it for up to 20 seconds.
//
// # Hosts that fail
//
// A mirror rests after the first failure, since the registry can answer instead. Any other host
// is left alone while it wants to be (Retry-After, in seconds or as a date; at most ten
// minutes, and ten seconds for blobs), and for up to five seconds after five failures in a row.
// Meanwhile calls fail at once with RetryAfter. Then one request finds out how the host does,
// while the others wait. All calls of a Client share this state. Manifests, blobs, uploads and
// tokens of a host have their own, since registries limit them apart. Pauses between attempts
// are random, from zero up to a limit that doubles.
//
// The location that a registry redirects to for a blob is used until its signature expires, as
// its URL says, by the clock of the server that checks it. If it is refused before that, the
// registry is asked again, once, and that is no failure of the registry. A registry on another
// machine cannot redirect thaw to this one, by an address or by a name.
//
// # Registries as they are
//
// thaw's requests follow the spec, and it accepts answers that do not: any 2xx status;
// redirects of uploads, with their bodies; limits of a body's size, by sending pieces; a
// refused HEAD, by a GET; lists of referrers in the API, under the fallback tag or both,
// with entries that it cannot use; wrong ranges, by reading the whole blob. A look-up that
// only saves work never fails an operation: see Absent. Credentials are sent to the host
// that they are for, and to a host that a registry redirects to only if that host sends a
// challenge. Credentials that cannot be read are a warning, until a registry refuses
// access.
//
// # Errors
//
// Every error says what was being done, to what and where. Query strings are cut from
// URLs, since they carry signatures. Callers branch on ErrNotFound, ErrUnauthorized,
// ErrUnavailable, ErrTruncated, ErrDigest, ErrTagTaken and ErrUnlisted. Temporary says
// whether the same call may succeed later, RetryAfter how long the server asked to wait,
// and Repo.LastFailure what a registry has answered while a call is still being retried.
//
// All calls are retried here but for those that open ranges: they are the hot path, and
// their caller knows the deadline.
//
// # Several ranges at once
//
// A request costs a registry as much as a megabyte or more, and a start reads small parts
// all over its blobs. So OpenRanges asks for up to 16 ranges in one request (RFC 9110,
// 14.2). docker-registry and most web servers answer with all of them, as a multipart body.
// Object storage answers with the whole blob, or with the first range. No header announces
// this, so the first request to a source finds out, and is cancelled if its answer is the
// whole blob. From then on Ranges returns what the source can do.
//
// # What is ours and why
//
// Names, descriptors and manifests are those of go-containerregistry, and docker's config
// and its helpers are read through its keychain. Requests are made here, because a process
// that serves disks for weeks needs three things that its transport does not do: many
// readers that need a token share one request for it; credentials are read again for each
// new token; and the location that a registry redirects to is remembered, so that a range
// costs one round trip. It recompresses the layers of an archive, which changes their
// digests, so archives are read here as well.
//
// # Layouts
//
// An OCI layout is written so that a reader never sees a part of a file: a blob is renamed
// to its name after an fsync, and so is index.json, under an exclusive flock on
// index.json.lock beside it. A pushed manifest has an entry in index.json, with its tag in
// the annotation org.opencontainers.image.ref.name, and with its artifactType and
// annotations if it has a subject.
//
// # Archives
//
// An archive is scanned once, and its members are then read in place. A compressed one is
// decompressed first, into an unnamed file in Options.TempDir, because blobs are read by
// ranges, and several layers at once. Zeros behind a compressed archive are padding;
// anything else there is an error. An archive is trusted as little as a registry.
//
// # Platforms
//
// The image of an index is chosen as by containerd's platforms.Only: the variant that is
// asked for, then those below it (arm/v7, v6, v5), then other architectures that the
// processor runs (386 on amd64, arm on arm64). Versions and features of the operating
// system are ignored. For an entry without a platform, the config of its image is read.
package registry
