// Package host is thaw on one host: a cache, a registry client and a fetcher, and the
// devices that are made of them. The commands of thaw parse flags, make a [Host] or a
// [Finder], and print the results; this package makes the decisions.
//
// A [Finder] finds block images by name, and the traces and bundles beside them.
// Commands that only look at images need nothing else.
//
// A [Host] opens images as devices. To open a device, it finds the image, takes its
// streams from the cache, and begins the start: it looks for traces, prefetches the
// chunks that they list, and records the start if there are none. A device is a
// [blockmap.Device] for any transport:
//
//	h, err := host.Open(host.Options{Finder: finder, Dir: "/var/cache/thaw"})
//	defer h.Close()
//	devices, err := h.Add(ctx, host.Spec{Name: "registry.example/team/app:v1"})
//	server := &nbd.Server{Exports: host.NewExports(h, nil, nil, false)}
//	h.SetServing()
//
// There are two ways to a device. [Host.Add] opens devices that stay until
// [Host.Remove]. [Host.Acquire] makes the caller a user of a device, and opens the
// device first if that is allowed; such a device is closed when its last user has left.
// A device that was added and then removed is also closed when its last user has left.
// Each name leads to one device, even if several clients ask for it at once.
//
// Devices are read-only unless [Options.Overlay] says where clients' changes are kept. A
// writable device is an overlay over an image. The recorder of the start, the prefetch
// and the completion lie below the overlay: they are about the image. A client can have a
// device of its own, NAME~CLIENT, which is an overlay over the image of the device NAME.
// All connections that ask for that name reach the same overlay.
//
// A device that was added with [Spec.Keep] is there again in the next host in the cache
// directory: [Host.Recover] and [Host.RestoreDevices] do that, also after the process was
// killed. An overlay that goes with its device outlives the process then, too, and the
// device of that name finds it.
//
// A virtual machine has a device as its disk by a socket of that device's own, which
// [Options.Sockets] asks for. Each device that is added gets one, until it is removed.
//
// Concurrency: any number of goroutines may call the methods of Host, Device and
// Exports, also while Stop and Close run; the methods then fail with [ErrClosed]. No
// lock is held during a wait for the registry, the disk or a client. The caller is
// responsible only for the order of the end: first stop the transports, then call Stop,
// which closes the devices and stores recordings, then Close. A reader may read a
// device's Block while it has acquired the device, or knows that the device is not
// removed.
//
// The files, from the top:
//
//	host.go        Host: what it owns, Add, Remove, Acquire, Stop, Close
//	devices.go     the devices by name: shared openings, users, states
//	exports.go     devices as NBD exports; allow.go: which images clients may open
//	sockets.go     devices as disks of virtual machines: a socket for each
//	remove.go      Remove where no client is in the way, and other requests of the API
//	status.go      what the host does; stats.go: the counts of every layer; rates.go
//	api/           the control API on a socket in the cache directory, and its client
//	find.go        from a name to a block image; pin.go: which one it has to be
//	open.go        from a block image to a device, with or without the registry
//	overlays.go    where clients' changes are kept, and which image they belong to
//	writable.go    overlays over the images of devices
//	commit.go      overlays become images; target.go: where images are pushed to
//	nodes.go       devices that have nodes below /dev; nodedevice.go: what is behind a node
//	nodewatch.go   nodes that go when nobody uses them any more, and at the end of a host
//	noderecover.go nodes of a server that was killed
//	kept.go        devices of a server that was killed, and overlays that go with devices
//	statefile.go   where nodes and devices are kept for the next server
//	start.go       which traces, bundles and guesses to prefetch
//	complete.go    the rest of an image, once the start is over
//	recording.go   the recording of a start; recordfile.go: its file
//	beside.go      traces and bundles beside an image: find, read, push, pack
//	packing.go     bundles that are packed in the background
//	use.go         how much of what is stored a start has read
//	reload.go      files that are read again when they change
//	zone.go        membership in a zone; zonestore.go: what peers may have this host open
package host
