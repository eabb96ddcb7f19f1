package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The generic netlink family of the kernel's nbd driver, of linux/nbd-netlink.h.
const (
	nbdFamily = "nbd"

	nbdConnect     = 1
	nbdDisconnect  = 2
	nbdReconfigure = 3

	nbdAttrIndex      = 1
	nbdAttrSize       = 2
	nbdAttrBlockSize  = 3
	nbdAttrTimeout    = 4 // seconds that a request may take
	nbdAttrFlags      = 5 // the transmission flags of the protocol
	nbdAttrSockets    = 7
	nbdAttrDeadTime   = 8  // seconds that requests wait for a new socket where none is left
	nbdAttrIdentifier = 10 // who may reconfigure it; Linux 5.14

	nbdSockItem = 1
	nbdSockFD   = 1
)

// nbdPatience bounds a command that waits for nobody outside the kernel.
const nbdPatience = 15 * time.Second

// nbdCommand gives a command to the driver. The kernel carries it out while it is sent,
// and no deadline ends that: a command that hangs leaves a goroutine behind. fds are the
// kernel's ends of connections, which the command may name: nbdCommand closes them when
// the kernel has looked at them.
func nbdCommand(ctx context.Context, what string, command uint8, fds []int, encode func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	type outcome struct {
		reply []genetlink.Message
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		reply, err := nbdExecute(command, func(a *netlink.AttributeEncoder) {
			encode(a)
			if len(fds) > 0 {
				encodeSockets(a, fds)
			}
		})
		for _, fd := range fds {
			unix.Close(fd)
		}
		done <- outcome{reply, err}
	}()
	limit := time.NewTimer(nbdPatience)
	defer limit.Stop()
	var err error
	select {
	case o := <-done:
		if o.err == nil {
			return o.reply, nil
		}
		err = o.err
	case <-limit.C:
		err = fmt.Errorf("the kernel does not answer within %v", nbdPatience)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return nil, fmt.Errorf("netlink: %s: %w", what, err)
}

func nbdExecute(command uint8, encode func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	defer c.Close()
	family, err := c.GetFamily(nbdFamily)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoFamily
	}
	if err != nil {
		return nil, fmt.Errorf("find the netlink family of nbd: %w", err)
	}
	a := netlink.NewAttributeEncoder()
	encode(a)
	data, err := a.Encode()
	if err != nil {
		return nil, err
	}
	flags := netlink.Request
	if command != nbdConnect { // which has a reply
		flags |= netlink.Acknowledge
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: family.Version}, Data: data}
	return c.Execute(m, family.ID, flags)
}

// errNoFamily: there is no such netlink family. The module is not loaded, or this is not the
// network namespace of the host.
var errNoFamily = fmt.Errorf("the kernel has no netlink family nbd, and no device of nbd: load the kernel module by `modprobe nbd`: %w", ErrUnavailable)

// encodeSockets adds the kernel's ends of connections.
func encodeSockets(a *netlink.AttributeEncoder, fds []int) {
	a.Nested(nbdAttrSockets, func(a *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			a.Nested(nbdSockItem, func(a *netlink.AttributeEncoder) error {
				a.Uint32(nbdSockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
}

// nbdIndex finds the number of the device in the reply to a connect.
func nbdIndex(reply []genetlink.Message) (index uint32, err error) {
	for _, m := range reply {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, fmt.Errorf("nbd: the reply of the kernel: %w", err)
		}
		for d.Next() {
			if d.Type() == nbdAttrIndex && d.Len() > 0 {
				index = d.Uint32()
				if err := d.Err(); err != nil {
					return 0, fmt.Errorf("nbd: the reply of the kernel: %w", err)
				}
				return index, nil
			}
		}
		if err := d.Err(); err != nil {
			return 0, fmt.Errorf("nbd: the reply of the kernel: %w", err)
		}
	}
	return 0, errors.New("nbd: the reply of the kernel has no number of a device")
}
