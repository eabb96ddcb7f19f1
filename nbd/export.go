package nbd

import (
	"context"
	"errors"
	"net"
	"slices"

	"thaw/blockmap"
)

// Export is a device under a name. A client sees a read-only device unless
// Device is a [blockmap.WritableDevice] and ReadOnly is false.
type Export struct {
	Name        string // the canonical name, which LIST shows
	Description string // for humans; may be empty
	Device      blockmap.Device
	ReadOnly    bool

	// Clients are names. A client may open the export only if its verified
	// certificate carries one of them. An empty list admits every client.
	Clients []string
}

// writable returns the device to write to, nil on a read-only export.
func (e *Export) writable() blockmap.WritableDevice {
	if e.ReadOnly {
		return nil
	}
	w, _ := e.Device.(blockmap.WritableDevice)
	return w
}

// Transmission returns the size and the transmission flags of e, which a handshake
// tells a client. A client of [Server.ServeTransmission] learns them by other means:
// the kernel takes them as NBD_ATTR_SIZE_BYTES and NBD_ATTR_SERVER_FLAGS.
func (e *Export) Transmission() (size int64, flags uint16) {
	return e.Device.Size(), e.flags(false)
}

// flags are the transmission flags of e. DF belongs to structured replies.
//
// More than one connection is always welcome: a read-only device has nothing
// to flush, and the Flush of a writable one covers the writes of all.
func (e *Export) flags(structured bool) uint16 {
	f := flagHasFlags | flagMultiConn | flagCache
	if e.writable() == nil {
		f |= flagReadOnly
	} else {
		f |= flagFlush | flagFUA | flagTrim | flagWriteZeroes | flagFastZero
	}
	if structured {
		f |= flagDF
	}
	return f
}

// ClientInfo is what is known of a client when it asks for an export.
type ClientInfo struct {
	Addr  net.Addr // where it connects from
	TLS   bool     // the connection is encrypted
	Names []string // the common name and the alternative names of its verified certificate, addresses as text
}

// Named reports whether the client has proved to have one of the names. Names are
// compared as a whole, each with each, whatever field of the certificate they come
// from:
//
//   - IP addresses as addresses: ::1 is 0:0:0:0:0:0:0:1, and ::ffff:10.0.0.1 is
//     10.0.0.1.
//   - DNS names, and the domains of e-mail addresses, without regard to the case
//     of ASCII letters and to a dot at the end.
//   - All else byte by byte: URIs, the part of an e-mail address before the @, and
//     common names that are not made like a DNS name.
//
// There are no patterns: an asterisk matches an asterisk, in a certificate as well.
func (c ClientInfo) Named(names ...string) bool {
	return slices.ContainsFunc(names, func(n string) bool {
		return slices.ContainsFunc(c.Names, func(m string) bool { return sameName(n, m) })
	})
}

// Exports is what a [Server] serves. Its methods may be called at once by any
// number of connections.
type Exports interface {
	// Open returns the export of that name; "" is the default export. It may
	// take until ctx ends to make one. The server calls release once, when the
	// connection no longer uses the export; release may be nil. A client is
	// told ErrUnknownExport, ErrDenied and ErrTLSRequired by code, and any
	// other error by its text.
	Open(ctx context.Context, name string, c ClientInfo) (e *Export, release func(), err error)

	// List returns the exports to show to c, and opens none. The server looks
	// at their names and descriptions only, and at Clients, to leave out what
	// c may not open.
	List(ctx context.Context, c ClientInfo) ([]Export, error)
}

// Errors for [Exports] to return, as they are or wrapped.
var (
	ErrUnknownExport = errors.New("no such export")
	ErrDenied        = errors.New("not allowed for this client")
	ErrTLSRequired   = errors.New("TLS is required")
)

// Static is a fixed list of exports. The first one is the default.
type Static []Export

// Open finds name in the list.
func (s Static) Open(_ context.Context, name string, _ ClientInfo) (*Export, func(), error) {
	for i := range s {
		if s[i].Name == name || name == "" {
			return &s[i], nil, nil
		}
	}
	return nil, nil, ErrUnknownExport
}

// List returns the list.
func (s Static) List(context.Context, ClientInfo) ([]Export, error) { return s, nil }
