package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// A lease is what a DHCP server has granted.
type lease struct {
	prefix   netip.Prefix
	server   netip.Addr
	routes   []route
	dns      []netip.Addr
	domain   string
	mtu      uint16
	duration time.Duration // 0 is forever
	renew    time.Duration // from the grant on
}

const (
	firstWait = 2 * time.Second // for an answer; it doubles with each try
	longWait  = 64 * time.Second
	leastWait = 10 * time.Second // between tries to renew
)

// keepLease gets an address for a device and renews it, until ctx ends. It calls ready whenever the device has an address.
func (n *network) keepLease(ctx context.Context, l link, ready func()) {
	var have *lease
	for ctx.Err() == nil {
		next, err := acquire(ctx, l)
		if err == nil {
			err = n.use(l, next, have)
		}
		if err != nil {
			if ctx.Err() == nil {
				n.log("network %s: %v", l.name, err)
				sleep(ctx, leastWait)
			}
			continue
		}
		have = next
		ready()
		for have.duration > 0 {
			granted := time.Now()
			sleep(ctx, have.renew)
			next, err := n.renew(ctx, l, have, granted.Add(have.duration))
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				err = n.use(l, next, have)
			}
			if err != nil {
				n.log("network %s: the lease of %v ends: %v", l.name, have.prefix, err)
				n.drop(l, have)
				have = nil
				break
			}
			have = next
		}
		if have != nil {
			return // it is forever
		}
	}
}

// renew asks until the lease ends, or the server refuses.
func (n *network) renew(ctx context.Context, l link, have *lease, end time.Time) (*lease, error) {
	for {
		left := time.Until(end)
		if left <= 0 {
			return nil, errors.New("no server has renewed it")
		}
		next, err := exchange(ctx, l, time.Now().Add(min(left, leastWait)), func(s *socket, xid uint32) (*lease, error) {
			return s.ask(message{kind: dhcpRequest, xid: xid, mac: l.mac, client: have.prefix.Addr()}, dhcpAck)
		})
		if err == nil || errors.Is(err, errRefused) || ctx.Err() != nil {
			return next, err
		}
		sleep(ctx, min(left, max(leastWait, left/4)))
	}
}

// acquire asks for a new lease, until it gets one.
func acquire(ctx context.Context, l link) (*lease, error) {
	for pause := firstWait; ; pause = min(2*pause, longWait) {
		got, err := exchange(ctx, l, time.Now().Add(pause), func(s *socket, xid uint32) (*lease, error) {
			offer, err := s.ask(message{kind: dhcpDiscover, xid: xid, mac: l.mac}, dhcpOffer)
			if err != nil {
				return nil, err
			}
			return s.ask(message{kind: dhcpRequest, xid: xid, mac: l.mac, wanted: offer.prefix.Addr(), server: offer.server}, dhcpAck)
		})
		if err == nil || !errors.Is(err, errNoAnswer) {
			return got, err
		}
	}
}

var (
	errNoAnswer = errors.New("no answer")
	errRefused  = errors.New("the server refuses the address")
)

// exchange has one transaction on a socket of its own.
func exchange(ctx context.Context, l link, end time.Time, do func(s *socket, xid uint32) (*lease, error)) (*lease, error) {
	s, err := listen(ctx, l, end)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s.fd)
	var b [4]byte
	_, _ = rand.Read(b[:]) // it never fails
	return do(s, binary.BigEndian.Uint32(b[:]))
}

// A socket sends and receives on one device, which need not have an address: it is an ordinary UDP socket, so the kernel
// needs no packet sockets, which may be a module.
type socket struct {
	ctx context.Context
	fd  int
	l   link
	end time.Time
}

func listen(ctx context.Context, l link, end time.Time) (*socket, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("DHCP socket: %w", err)
	}
	for _, o := range []int{unix.SO_REUSEADDR, unix.SO_BROADCAST} {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, 1)
		}
	}
	if err == nil {
		err = unix.BindToDevice(fd, l.name)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: clientPort})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("DHCP socket: %w", err)
	}
	return &socket{ctx: ctx, fd: fd, l: l, end: end}, nil
}

// ask sends a request, and waits for the answer that it is to have.
func (s *socket) ask(m message, want byte) (*lease, error) {
	all := &unix.SockaddrInet4{Port: serverPort, Addr: [4]byte{255, 255, 255, 255}}
	if err := unix.Sendto(s.fd, m.encode(), 0, all); err != nil && !errors.Is(err, unix.ENETDOWN) && !errors.Is(err, unix.ENETUNREACH) {
		return nil, fmt.Errorf("send a DHCP request: %w", err)
	}
	buf := make([]byte, 4096)
	for {
		// In short steps, so that the end of ctx is seen.
		left := min(time.Until(s.end), 200*time.Millisecond)
		if left <= 0 || s.ctx.Err() != nil {
			return nil, errNoAnswer
		}
		poll := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, int(left/time.Millisecond)+1); err != nil && err != unix.EINTR {
			return nil, fmt.Errorf("wait for a DHCP answer: %w", err)
		} else if n <= 0 {
			continue
		}
		n, _, err := unix.Recvfrom(s.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			continue
		}
		kind, got, err := parseReply(buf[:n], m.xid, m.mac)
		switch {
		case err != nil: // of another client, or broken
		case kind == want:
			return got, nil
		case kind == dhcpNak && want == dhcpAck:
			return nil, errRefused
		}
	}
}

// sleep waits for d or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
