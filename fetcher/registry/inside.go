package registry

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
)

// A registry says where to send requests: it redirects, it names its token service, and it has
// descriptors with URLs. One that
// is on another machine must not make thaw send them to services of this machine, which take
// whoever reaches them for a friend: those on loopback, and on link-local addresses, where
// clouds give out the credentials of a machine. A name may lead there too, so the address of
// the connection counts. Private addresses are not refused: object storage has them.

var errInside = errors.New("the registry, or a descriptor, directs thaw to an address of this machine, which thaw does not ask on behalf of others")

// outside says whether the registry is on another machine. The URLs of a layer have no registry
// of their own.
func (e *endpoint) outside() bool {
	if e.root.Host == "" {
		return e.away
	}
	return e.client.outside(e.root)
}

// outside says whether who wrote the descriptors of the repository may be on another machine.
// The content of files is mostly from elsewhere.
func (r *Repo) outside() bool {
	m, ok := r.reader.(*remote)
	return !ok || m.origin.outside()
}

// outside says whether a host is another machine: not this one by its name, nor by the address
// that the name led to.
func (c *Client) outside(root *url.URL) bool {
	return !isHere(root.Hostname()) && !c.dialer.isInside(addrOf(root))
}

// addrOf is the address that is dialed for a URL.
func addrOf(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// isHere says whether a host is this machine, by its name.
func isHere(host string) bool {
	if isLoopback(host) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && isInside(ip)
}

func isInside(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	return ip.IsLoopback() || ip.IsUnspecified() || ip.IsLinkLocalUnicast()
}

type outwardKey struct{}

// outward returns a context whose requests must not connect to this machine.
func outward(ctx context.Context) context.Context {
	return context.WithValue(ctx, outwardKey{}, true)
}

// checkInside notes whether a connection stays on this machine, and closes it if it must not.
func (d *dialer) checkInside(ctx context.Context, c net.Conn, addr string) (net.Conn, error) {
	at, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok || !isInside(at.AddrPort().Addr()) {
		return c, nil
	}
	if ctx.Value(outwardKey{}) == true {
		c.Close()
		return nil, errInside
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.inside) < maxSpareAddrs {
		d.inside[addr] = true
	}
	return c, nil
}

func (d *dialer) isInside(addr string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.inside[addr]
}

// proxied says whether a request goes to a proxy, which may be on this machine.
func proxied(proxy func(*http.Request) (*url.URL, error), r *http.Request) bool {
	if proxy == nil {
		return false
	}
	u, err := proxy(r)
	return u != nil || err != nil
}
