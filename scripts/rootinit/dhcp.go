package main

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"
	"time"
)

// Messages of DHCP (RFC 2131), with the options of RFC 2132:
//
//	byte   0    1 for a request, 2 for a reply
//	       1    1, Ethernet      2  6, bytes of an address     3  0
//	       4    transaction (4)  8  seconds (2)               10  flags (2): 0x8000, answer by broadcast
//	      12    the client's address (4)                      16  the address that is granted (4)
//	      20    (8)             28  the client's MAC (16)     44  names (192)
//	     236    99 130 83 99, and options: code (1), length (1), value; code 0 is padding, 255 the end
const (
	clientPort, serverPort = 68, 67

	dhcpDiscover = 1
	dhcpOffer    = 2
	dhcpRequest  = 3
	dhcpAck      = 5
	dhcpNak      = 6

	optionsAt = 240
	cookie    = 0x63825363

	optMask      = 1
	optRouter    = 3
	optDNS       = 6
	optDomain    = 15
	optMTU       = 26
	optWanted    = 50
	optTime      = 51
	optOverload  = 52
	optKind      = 53
	optServer    = 54
	optWish      = 55
	optMaxSize   = 57
	optRenew     = 58
	optClientID  = 61
	optRoutes    = 121 // RFC 3442
	optEnd       = 255
	leastMessage = 300 // bytes; some relays drop what is shorter
)

// A message is a request. Addresses that are not valid are left out.
type message struct {
	kind   byte
	xid    uint32
	mac    [6]byte
	client netip.Addr // the address that the client has
	wanted netip.Addr // the address that it wants
	server netip.Addr // whose offer it takes
}

func (m message) encode() []byte {
	b := make([]byte, optionsAt, leastMessage)
	b[0], b[1], b[2] = 1, 1, 6
	binary.BigEndian.PutUint32(b[4:], m.xid)
	b[10] = 0x80
	if m.client.IsValid() {
		copy(b[12:16], m.client.AsSlice())
		b[10] = 0 // it can be answered at its address
	}
	copy(b[28:], m.mac[:])
	binary.BigEndian.PutUint32(b[optionsAt-4:], cookie)
	add := func(code byte, value ...byte) { b = append(append(b, code, byte(len(value))), value...) }
	add(optKind, m.kind)
	add(optClientID, append([]byte{1}, m.mac[:]...)...)
	add(optMaxSize, 1500>>8, 1500&0xff)
	add(optWish, optMask, optRouter, optDNS, optDomain, optMTU, optTime, optRenew, optRoutes)
	if m.wanted.IsValid() {
		add(optWanted, m.wanted.AsSlice()...)
	}
	if m.server.IsValid() {
		add(optServer, m.server.AsSlice()...)
	}
	b = append(b, optEnd)
	return append(b, make([]byte, max(0, leastMessage-len(b)))...)
}

// parseReply parses the answer to a transaction of a client. Whatever is in the network may have sent it.
func parseReply(b []byte, xid uint32, mac [6]byte) (kind byte, l *lease, err error) {
	switch {
	case len(b) < optionsAt:
		return 0, nil, errors.New("too short")
	case b[0] != 2 || binary.BigEndian.Uint32(b[4:]) != xid || [6]byte(b[28:34]) != mac:
		return 0, nil, errors.New("for somebody else")
	case binary.BigEndian.Uint32(b[optionsAt-4:]) != cookie:
		return 0, nil, errors.New("not DHCP")
	}
	options := make(map[byte][]byte)
	if err := parseOptionList(b[optionsAt:], options); err != nil {
		return 0, nil, err
	}
	// The fields for names may have options instead: bit 0 is that of 128 bytes, bit 1 that of 64.
	if o := options[optOverload]; len(o) == 1 {
		if o[0]&1 != 0 {
			err = parseOptionList(b[108:236], options)
		}
		if o[0]&2 != 0 && err == nil {
			err = parseOptionList(b[44:108], options)
		}
		if err != nil {
			return 0, nil, err
		}
	}
	if len(options[optKind]) != 1 {
		return 0, nil, errors.New("without a type")
	}
	kind = options[optKind][0]
	if kind == dhcpNak {
		return kind, nil, nil
	}
	l, err = newLease([4]byte(b[16:20]), options)
	return kind, l, err
}

// parseOptionList adds options to those that are there. An option that is there already is continued (RFC 3396).
func parseOptionList(b []byte, options map[byte][]byte) error {
	for len(b) > 0 && b[0] != optEnd {
		if b[0] == 0 {
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return errors.New("an option is cut")
		}
		options[b[0]] = append(options[b[0]], b[2:2+int(b[1])]...)
		b = b[2+int(b[1]):]
	}
	return nil
}

func newLease(granted [4]byte, options map[byte][]byte) (*lease, error) {
	addr := netip.AddrFrom4(granted)
	bits := 32
	if m := options[optMask]; len(m) == 4 {
		mask := binary.BigEndian.Uint32(m)
		for bits = 0; mask&(1<<31) != 0; bits++ {
			mask <<= 1
		}
		if mask != 0 {
			return nil, errors.New("the mask has holes")
		}
	}
	l := &lease{prefix: netip.PrefixFrom(addr, bits), domain: domain(options[optDomain])}
	if !usable(addr) || bits == 0 {
		return nil, errors.New("the address is no host's")
	}
	if s := addresses(options[optServer]); len(s) > 0 {
		l.server = s[0]
	}
	for _, a := range addresses(options[optDNS]) {
		if usable(a) {
			l.dns = append(l.dns, a)
		}
	}
	// Where there are routes, the router is not used (RFC 3442).
	l.routes = parseRoutes(options[optRoutes])
	if r := addresses(options[optRouter]); len(l.routes) == 0 && len(r) > 0 && usable(r[0]) {
		l.routes = []route{{gateway: r[0]}}
	}
	if m := options[optMTU]; len(m) == 2 {
		// A host need not take less than 576 (RFC 791).
		if n := binary.BigEndian.Uint16(m); n >= 576 {
			l.mtu = n
		}
	}
	if seconds, ok := uint32Option(options[optTime]); ok && seconds != 0xffffffff {
		l.duration = time.Duration(max(seconds, 60)) * time.Second
		l.renew = l.duration / 2
		if t, ok := uint32Option(options[optRenew]); ok {
			if d := time.Duration(t) * time.Second; d >= leastWait && d < l.duration {
				l.renew = d
			}
		}
	}
	return l, nil
}

func uint32Option(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// usable reports whether a can be the address of another host, or of this one.
func usable(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func addresses(b []byte) []netip.Addr {
	var all []netip.Addr
	for ; len(b) >= 4; b = b[4:] {
		all = append(all, netip.AddrFrom4([4]byte(b)))
	}
	return all
}

// parseRoutes parses the list of RFC 3442: bits, the bytes of the network that they cover, the gateway. A broken list is none.
func parseRoutes(b []byte) []route {
	var all []route
	for len(b) > 0 {
		bits := int(b[0])
		n := (bits + 7) / 8
		if bits > 32 || len(b) < 1+n+4 {
			return nil
		}
		var r route
		var network [4]byte
		copy(network[:], b[1:1+n])
		if bits > 0 {
			r.to = netip.PrefixFrom(netip.AddrFrom4(network), bits).Masked()
		}
		if gateway := netip.AddrFrom4([4]byte(b[1+n:])); !gateway.IsUnspecified() {
			r.gateway = gateway
		}
		all = append(all, r)
		b = b[1+n+4:]
	}
	return all
}

// domain returns a domain that can be written to a file, or "".
func domain(b []byte) string {
	s := strings.TrimRight(string(b), "\x00.")
	if len(s) > 253 {
		return ""
	}
	for _, label := range strings.Split(s, ".") {
		if !validHostname(label) {
			return ""
		}
	}
	return s
}
