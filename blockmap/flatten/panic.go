package flatten

import (
	"fmt"
	"runtime/debug"
)

// recovered is deferred by every worker of a build. It makes the panic of a worker
// an error of the build, so that the build ends as it does by any other error: it
// cancels its uploads and removes its temporary files. A panic would end the
// process at once.
func recovered(err *error) {
	if v := recover(); v != nil {
		*err = fmt.Errorf("a worker of the build panicked, which is a bug in thaw: %v\n%s", v, debug.Stack())
	}
}

// guarded is f, with an error in the place of a panic: for a goroutine.
func guarded(f func() error) func() error {
	return func() (err error) {
		defer recovered(&err)
		return f()
	}
}
