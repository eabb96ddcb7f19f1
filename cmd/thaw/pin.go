package main

import (
	"errors"

	"thaw/cmd/thaw/internal/host"
)

// pinFlags are the --pin flags as given: "sha256:HEX" or "IMAGE=sha256:HEX".
type pinFlags []string

const pinUsage = "fail unless the block image has this `DIGEST`: [IMAGE=]sha256:HEX; IMAGE= is needed if there are several images (repeatable)"

var errPinWithoutImage = usageError{errors.New("--pin needs an --image to pin")}

// of gives the flags their meaning for the images of a command line. others says
// that more images may be named later.
func (f pinFlags) of(images []string, others bool) (host.Pins, error) {
	return host.ParsePins(f, images, others)
}
