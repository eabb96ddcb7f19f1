package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

var testMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}

const testXID = 0x01020304

// reply builds an answer by hand.
func reply(granted [4]byte, options ...byte) []byte {
	b := make([]byte, optionsAt)
	b[0], b[1], b[2] = 2, 1, 6
	binary.BigEndian.PutUint32(b[4:], testXID)
	copy(b[16:], granted[:])
	copy(b[28:], testMAC[:])
	binary.BigEndian.PutUint32(b[optionsAt-4:], cookie)
	return append(b, options...)
}

// The bytes of requests, as other servers see them.
func TestRequests(t *testing.T) {
	header := func(flags, client string) string {
		return "01010600010203040000" + flags + client + strings.Repeat("00", 12) + "525400123456" + strings.Repeat("00", 202) + "63825363"
	}
	broadcast := header("8000", "00000000")
	wish := "370801" + "03060f1a333a79"
	for _, c := range []struct {
		m    message
		want string
	}{
		{message{kind: dhcpDiscover, xid: testXID, mac: testMAC}, broadcast + "350101" + "3d0701525400123456" + "390205dc" + wish + "ff"},
		{message{kind: dhcpRequest, xid: testXID, mac: testMAC, wanted: netip.MustParseAddr("10.0.2.15"), server: netip.MustParseAddr("10.0.2.2")},
			broadcast + "350103" + "3d0701525400123456" + "390205dc" + wish + "32040a00020f" + "36040a000202" + "ff"},
		{message{kind: dhcpRequest, xid: testXID, mac: testMAC, client: netip.MustParseAddr("10.0.2.15")},
			header("0000", "0a00020f") + "350103" + "3d0701525400123456" + "390205dc" + wish + "ff"},
	} {
		got := c.m.encode()
		if h := hex.EncodeToString(got); !strings.HasPrefix(h, c.want) || strings.Trim(h[len(c.want):], "0") != "" || len(got) < leastMessage {
			t.Errorf("%+v:\n%s, want\n%s", c.m, h, c.want)
		}
	}
}

func TestReplies(t *testing.T) {
	at := [4]byte{10, 0, 2, 15}
	prefix := netip.MustParsePrefix("10.0.2.15/24")
	gateway, dns := netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("10.0.2.3")
	ack := []byte{optKind, 1, dhcpAck}
	with := func(more ...byte) []byte { return append(bytes.Clone(ack), more...) }
	for _, c := range []struct {
		name string
		b    []byte
		want *lease // nil if the reply cannot be used
	}{
		{"qemu's", reply(at, with(1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 2, 2, 6, 4, 10, 0, 2, 3, 51, 4, 0, 1, 0x51, 0x80, 54, 4, 10, 0, 2, 2, 255)...),
			&lease{prefix: prefix, server: gateway, routes: []route{{gateway: gateway}}, dns: []netip.Addr{dns}, duration: 24 * time.Hour, renew: 12 * time.Hour}},
		{"no mask", reply(at, with()...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32")}},
		{"forever", reply(at, with(51, 4, 255, 255, 255, 255)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32")}},
		{"short time", reply(at, with(51, 4, 0, 0, 0, 1)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32"), duration: time.Minute, renew: 30 * time.Second}},
		{"T1", reply(at, with(51, 4, 0, 0, 1, 0, 58, 4, 0, 0, 0, 20)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32"), duration: 256 * time.Second, renew: 20 * time.Second}},
		{"routes instead of the router", reply(at, with(1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 2, 9, 121, 19, 0, 10, 0, 2, 2, 24, 192, 168, 1, 10, 0, 2, 3, 8, 11, 0, 0, 0, 0)...),
			&lease{prefix: prefix, routes: []route{{gateway: gateway}, {to: netip.MustParsePrefix("192.168.1.0/24"), gateway: dns}, {to: netip.MustParsePrefix("11.0.0.0/8")}}}},
		{"an option in two parts", reply(at, with(6, 2, 10, 0, 6, 2, 2, 3)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32"), dns: []netip.Addr{dns}}},
		{"MTU and domain", reply(at, with(26, 2, 5, 0x78, 15, 8, 'a', '.', 'e', 'x', 'a', 'm', 0, 0)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32"), mtu: 1400, domain: "a.exam"}},
		{"a tiny MTU, a domain with a newline", reply(at, with(26, 2, 0, 68, 15, 3, 'a', '\n', 'b')...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32")}},
		{"broken routes", reply(at, with(121, 5, 33, 1, 2, 3, 4)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32")}},
		{"padding", reply(at, append([]byte{0, 0, 0}, ack...)...), &lease{prefix: netip.MustParsePrefix("10.0.2.15/32")}},
		{"a mask with holes", reply(at, with(1, 4, 255, 0, 255, 0)...), nil},
		{"a mask of nothing", reply(at, with(1, 4, 0, 0, 0, 0)...), nil},
		{"no address", reply([4]byte{}, with()...), nil},
		{"broadcast address", reply([4]byte{255, 255, 255, 255}, with()...), nil},
		{"loopback", reply([4]byte{127, 0, 0, 1}, with()...), nil},
		{"an option is cut", reply(at, with(3, 4, 1)...), nil},
		{"no length", reply(at, with(3)...), nil},
		{"no type", reply(at, 255), nil},
		{"too short", reply(at)[:200], nil},
	} {
		_, got, err := parseReply(c.b, testXID, testMAC)
		if c.want == nil {
			if err == nil {
				t.Errorf("%s: %+v", c.name, got)
			}
		} else if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
	// Options in the fields for names.
	b := reply(at, with(52, 1, 3)...)
	copy(b[108:], []byte{1, 4, 255, 255, 255, 0, 255})
	copy(b[44:], []byte{6, 4, 10, 0, 2, 3, 255})
	if _, got, err := parseReply(b, testXID, testMAC); err != nil || got.prefix != prefix || len(got.dns) != 1 {
		t.Errorf("overloaded: %+v, %v", got, err)
	}
	if _, _, err := parseReply(reply(at, ack...), testXID+1, testMAC); err == nil {
		t.Error("the reply to another transaction was taken")
	}
	if _, _, err := parseReply(reply(at, ack...), testXID, [6]byte{1}); err == nil {
		t.Error("the reply to another client was taken")
	}
	if kind, _, err := parseReply(reply([4]byte{}, optKind, 1, dhcpNak), testXID, testMAC); err != nil || kind != dhcpNak {
		t.Errorf("refusal: %d, %v", kind, err)
	}
}

func FuzzReply(f *testing.F) {
	f.Add(reply([4]byte{10, 0, 2, 15}, optKind, 1, dhcpAck, 1, 4, 255, 255, 255, 0, 121, 5, 0, 10, 0, 2, 2, 255))
	f.Add(reply([4]byte{10, 0, 2, 15}, optKind, 1, dhcpOffer, 52, 1, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, l, err := parseReply(b, testXID, testMAC)
		if err != nil || kind == dhcpNak {
			return
		}
		if !usable(l.prefix.Addr()) || l.prefix.Bits() < 1 {
			t.Errorf("%v", l.prefix)
		}
		if l.duration > 0 && (l.renew < leastWait || l.renew >= l.duration) {
			t.Errorf("renewal after %v of %v", l.renew, l.duration)
		}
		for _, r := range l.routes {
			if r.to.IsValid() && r.to != r.to.Masked() {
				t.Errorf("route to %v", r.to)
			}
		}
		if strings.ContainsAny(l.domain, "\n ") {
			t.Errorf("domain %q", l.domain)
		}
	})
}
