package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A network is what the machine's network devices have been given.
type network struct {
	fixed  address
	log    func(string, ...any)
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newNetwork(fixed address, log func(string, ...any)) *network {
	return &network{fixed: fixed, log: log, cancel: func() {}}
}

// A link is a network device.
type link struct {
	name  string
	index uint32
	mac   [6]byte
}

// classNet has a directory for each network device.
const classNet = "/sys/class/net"

// links returns the Ethernet devices that are hardware, virtio devices among it, by name.
func links() ([]link, error) {
	entries, err := os.ReadDir(classNet)
	if err != nil {
		return nil, err
	}
	var all []link
	for _, e := range entries {
		dir := filepath.Join(classNet, e.Name())
		read := func(name string) string {
			b, _ := os.ReadFile(filepath.Join(dir, name)) // one without this attribute is not what is sought
			return strings.TrimSpace(string(b))
		}
		if _, err := os.Stat(filepath.Join(dir, "device")); err != nil || read("type") != "1" {
			continue
		}
		l := link{name: e.Name()}
		index, err := strconv.ParseUint(read("ifindex"), 10, 31)
		if err != nil || !parseMAC(read("address"), &l.mac) {
			continue
		}
		l.index = uint32(index)
		all = append(all, l)
	}
	return all, nil
}

func parseMAC(s string, to *[6]byte) bool {
	parts := strings.Split(s, ":")
	if len(parts) != 6 {
		return false
	}
	for i, p := range parts {
		b, err := strconv.ParseUint(p, 16, 8)
		if err != nil {
			return false
		}
		to[i] = byte(b)
	}
	return true
}

// start brings up the loopback device and all hardware. It waits for at most patience until each device has its address. A
// device that gets none goes on trying.
func (n *network) start(patience time.Duration) {
	if err := setUp(1, 0); err != nil { // the loopback device is always the first
		n.log("network lo: %v", err)
	}
	if n.fixed.off {
		return
	}
	all, err := links()
	if err != nil {
		n.log("network: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	ready := make(chan struct{}, len(all))
	for i, l := range all {
		if i == 0 && n.fixed.prefix.IsValid() {
			if err := n.setFixed(l); err != nil {
				n.log("network %s: %v", l.name, err)
			}
			ready <- struct{}{}
			continue
		}
		if err := setUp(l.index, 0); err != nil {
			n.log("network %s: %v", l.name, err)
		}
		n.wg.Go(func() {
			var once sync.Once
			n.keepLease(ctx, l, func() { once.Do(func() { ready <- struct{}{} }) })
		})
	}
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for range all {
		select {
		case <-ready:
		case <-limit.C:
			n.log("network: no answer by DHCP within %v; it goes on", patience)
			return
		}
	}
}

// stop ends what start has begun. Addresses stay.
func (n *network) stop() {
	n.cancel()
	n.wg.Wait()
}

func (n *network) setFixed(l link) error {
	if err := setUp(l.index, 0); err != nil {
		return err
	}
	if err := addAddress(l.index, n.fixed.prefix, 0); err != nil {
		return err
	}
	if n.fixed.gateway.IsValid() {
		if err := addRoute(l.index, route{gateway: n.fixed.gateway}, n.fixed.prefix); err != nil {
			return err
		}
	}
	if n.fixed.dns.IsValid() {
		if err := setResolver([]netip.Addr{n.fixed.dns}, ""); err != nil {
			return err
		}
	}
	n.log("network %s: %v", l.name, n.fixed.prefix)
	return nil
}

// use gives a device what a server has granted. old is what it had before, or nil.
func (n *network) use(l link, now, old *lease) error {
	if old != nil && old.prefix != now.prefix {
		n.drop(l, old)
	}
	if now.mtu != 0 {
		if err := setUp(l.index, now.mtu); err != nil {
			n.log("network %s: MTU %d: %v", l.name, now.mtu, err)
		}
	}
	if err := addAddress(l.index, now.prefix, now.duration); err != nil {
		return err
	}
	for _, r := range now.routes {
		if err := addRoute(l.index, r, now.prefix); err != nil {
			n.log("%v", err)
		}
	}
	if len(now.dns) > 0 {
		if err := setResolver(now.dns, now.domain); err != nil {
			n.log("%v", err)
		}
	}
	if old == nil || old.prefix != now.prefix {
		n.log("network %s: %v by DHCP", l.name, now.prefix)
	}
	return nil
}

// drop takes an address away, and the kernel its routes.
func (n *network) drop(l link, old *lease) {
	if err := deleteAddress(l.index, old.prefix); err != nil {
		n.log("network %s: %v", l.name, err)
	}
}

// setResolver writes /etc/resolv.conf, which belongs to the machine and not to the image.
func setResolver(servers []netip.Addr, domain string) error {
	var b strings.Builder
	if domain != "" {
		fmt.Fprintf(&b, "search %s\n", domain)
	}
	for _, s := range servers[:min(len(servers), 3)] { // resolvers read three
		fmt.Fprintf(&b, "nameserver %v\n", s)
	}
	return replaceFile("/etc/resolv.conf", b.String())
}

// request sends a message of rtnetlink(7): a fixed header, and attributes.
func request(kind netlink.HeaderType, flags netlink.HeaderFlags, header []byte, attributes func(*netlink.AttributeEncoder)) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	ae := netlink.NewAttributeEncoder()
	attributes(ae)
	raw, err := ae.Encode()
	if err != nil {
		return err
	}
	_, err = c.Execute(netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request | netlink.Acknowledge | flags}, Data: append(header, raw...)})
	return err
}

// setUp brings up a device, with an MTU if that is not 0. The header is a struct ifinfomsg.
func setUp(index uint32, mtu uint16) error {
	h := make([]byte, unix.SizeofIfInfomsg)
	h[0] = unix.AF_UNSPEC
	binary.NativeEndian.PutUint32(h[4:], index)
	binary.NativeEndian.PutUint32(h[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(h[12:], unix.IFF_UP)
	return request(unix.RTM_NEWLINK, 0, h, func(ae *netlink.AttributeEncoder) {
		if mtu != 0 {
			ae.Uint32(unix.IFLA_MTU, uint32(mtu))
		}
	})
}

// addAddress gives a device an address for a time; 0 is forever. The kernel takes it away then.
func addAddress(index uint32, p netip.Prefix, valid time.Duration) error {
	err := request(unix.RTM_NEWADDR, netlink.Create|netlink.Replace, addressHeader(index, p), func(ae *netlink.AttributeEncoder) {
		addressAttributes(ae, p)
		if valid > 0 {
			info := make([]byte, 16) // struct ifa_cacheinfo
			binary.NativeEndian.PutUint32(info, uint32(valid/time.Second))
			binary.NativeEndian.PutUint32(info[4:], uint32(valid/time.Second))
			ae.Bytes(unix.IFA_CACHEINFO, info)
		}
	})
	if err != nil {
		return fmt.Errorf("add the address %v: %w", p, err)
	}
	return nil
}

func deleteAddress(index uint32, p netip.Prefix) error {
	err := request(unix.RTM_DELADDR, 0, addressHeader(index, p), func(ae *netlink.AttributeEncoder) { addressAttributes(ae, p) })
	if err != nil {
		return fmt.Errorf("remove the address %v: %w", p, err)
	}
	return nil
}

// addressHeader is a struct ifaddrmsg.
func addressHeader(index uint32, p netip.Prefix) []byte {
	h := make([]byte, unix.SizeofIfAddrmsg)
	h[0], h[1] = family(p.Addr()), byte(p.Bits())
	binary.NativeEndian.PutUint32(h[4:], index)
	return h
}

func addressAttributes(ae *netlink.AttributeEncoder, p netip.Prefix) {
	ae.Bytes(unix.IFA_LOCAL, p.Addr().AsSlice())
	ae.Bytes(unix.IFA_ADDRESS, p.Addr().AsSlice())
	if p.Addr().Is4() && p.Bits() < 31 {
		b := p.Masked().Addr().As4()
		n := binary.BigEndian.Uint32(b[:]) | (1<<(32-p.Bits()) - 1)
		ae.Bytes(unix.IFA_BROADCAST, binary.BigEndian.AppendUint32(nil, n))
	}
}

// A route leads to a network by a gateway; without one, the network is on the link. The zero network is all.
type route struct {
	to      netip.Prefix
	gateway netip.Addr
}

// addRoute adds or replaces a route; local is the network of the device. The header is a struct rtmsg.
func addRoute(index uint32, r route, local netip.Prefix) error {
	h := make([]byte, unix.SizeofRtMsg)
	h[0] = family(local.Addr())
	if r.to.IsValid() {
		h[1] = byte(r.to.Bits())
	}
	h[4], h[5], h[7] = unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RTN_UNICAST
	h[6] = unix.RT_SCOPE_UNIVERSE
	if !r.gateway.IsValid() {
		h[6] = unix.RT_SCOPE_LINK
	} else if !local.Contains(r.gateway) {
		binary.NativeEndian.PutUint32(h[8:], unix.RTNH_F_ONLINK) // clouds give addresses of /32
	}
	err := request(unix.RTM_NEWROUTE, netlink.Create|netlink.Replace, h, func(ae *netlink.AttributeEncoder) {
		if h[1] > 0 {
			ae.Bytes(unix.RTA_DST, r.to.Masked().Addr().AsSlice())
		}
		if r.gateway.IsValid() {
			ae.Bytes(unix.RTA_GATEWAY, r.gateway.AsSlice())
		}
		ae.Uint32(unix.RTA_OIF, index)
	})
	if err != nil {
		return fmt.Errorf("add the route to %v by %v: %w", r.to, r.gateway, err)
	}
	return nil
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
