// Package host is one host's thaw: a cache, a registry client and a fetcher, and the
// devices that are made of them. The commands of thaw parse flags, make a [Host] or a
// [Finder], and print; what happens is decided here.
//
// A [Finder] finds block images by name, and the traces and bundles beside them. It is
// all that a command needs that only looks at images.
//
// A [Host] opens images as devices. To open a device is to find its image, to take its
// streams from the cache, and to begin its start: look for traces, prefetch what they
// say, record where there are none. A device is a [blockmap.Device] for any transport:
//
//	h, err := host.Open(host.Options{Finder: finder, Dir: "/var/cache/thaw"})
//	defer h.Close()
//	devices, err := h.Add(ctx, host.Spec{Name: "registry.example/team/app:v1"})
//	server := &nbd.Server{Exports: host.NewExports(h, nil, nil)}
//	h.SetServing()
//
// There are two ways to a device. [Host.Add] opens devices that stay until
// [Host.Remove]. [Host.Acquire] makes the caller a user of a device, and opens it first
// where that is allowed; such a device is closed when its last user has left. A device
// that was added and is removed is closed then as well. Each name leads to one device,
// however many ask for it at once.
//
// What may be called at once: all methods of Host, Device and Exports, from any number
// of goroutines, also while Stop and Close run; they fail with [ErrClosed] then. No
// lock is held while anything waits for the registry, the disk or a client. Only the
// order of the end is the caller's: the transports stop, then Stop, which closes the
// devices and stores what was recorded, then Close. A device's Block may be read as
// long as the reader has acquired the device, or knows that it is not removed.
//
// The files, from the top:
//
//	host.go        Host: what it owns, Add, Remove, Acquire, Stop, Close
//	devices.go     the devices by name: shared openings, users, states
//	exports.go     devices as NBD exports; allow.go: which images clients may open
//	remove.go      Remove where no client is in the way, and other requests of the API
//	status.go      what the host does; stats.go: the counts of every layer; rates.go
//	api/           the control API on a socket in the cache directory, and its client
//	find.go        from a name to a block image; pin.go: which one it has to be
//	open.go        from a block image to a device, with or without the registry
//	start.go       which traces, bundles and guesses to prefetch
//	recording.go   the recording of a start; recordfile.go: its file
//	beside.go      traces and bundles beside an image: find, read, push, pack
//	reload.go      files that are read again when they change
package host
