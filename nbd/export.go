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

	// Clients are the names, one of which a client's verified certificate
	// must carry for the client to open the export. Where there are none,
	// anyone may who can connect.
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

// Transmission returns the size and the transmission flags of e, as a handshake tells
// them to a client. A client of [Server.ServeTransmission] is told them by other
// means: the kernel with NBD_ATTR_SIZE_BYTES and NBD_ATTR_SERVER_FLAGS.
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
	// Open returns the export of that name; "" is the default export. It
	// may take its time, within ctx, to make one. The server calls release
	// once when no connection uses the export any more that this call has
	// given it to; release may be nil. Errors that a client is told apart
	// are ErrUnknownExport, ErrDenied and ErrTLSRequired; for any other it
	// reads the error's text.
	Open(ctx context.Context, name string, c ClientInfo) (e *Export, release func(), err error)

	// List returns what there is to show to c without opening anything.
	// Only names and descriptions are looked at, and Clients to leave out
	// what c may not open.
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
