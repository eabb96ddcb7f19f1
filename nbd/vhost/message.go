package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A message of the vhost-user protocol ("Message Specification") is a header and a
// payload, in the byte order of the machine, which is little-endian here:
//
//	0   u32  request
//	4   u32  flags: bits 0 and 1 the version, which is 1; bit 2 a reply; bit 3 needs a reply
//	8   u32  size of the payload
//	12       payload
//
// File descriptors come as ancillary data with the first byte.
const (
	headerLen = 12

	flagVersion     = 0x1
	flagVersionMask = 0x3
	flagReply       = 0x4
	flagNeedReply   = 0x8

	// maxFDs is how many descriptors a message can carry: those of a memory table.
	maxFDs = maxRegions
	// maxPayload is that of the largest message, a configuration space.
	maxPayload = max(memTableLen+maxRegions*regionLen, configHeaderLen+maxConfig)
)

// requestID is the kind of a message ("Front-end message types").
type requestID uint32

const (
	getFeatures         requestID = 1
	setFeatures         requestID = 2
	setOwner            requestID = 3
	resetOwner          requestID = 4
	setMemTable         requestID = 5
	setVringNum         requestID = 8
	setVringAddr        requestID = 9
	setVringBase        requestID = 10
	getVringBase        requestID = 11
	setVringKick        requestID = 12
	setVringCall        requestID = 13
	setVringErr         requestID = 14
	getProtocolFeatures requestID = 15
	setProtocolFeatures requestID = 16
	getQueueNum         requestID = 17
	setVringEnable      requestID = 18
	getConfig           requestID = 24
	setConfig           requestID = 25
	getInflightFD       requestID = 31
	setInflightFD       requestID = 32
	resetDevice         requestID = 34
)

var requestNames = map[requestID]string{
	getFeatures: "GET_FEATURES", setFeatures: "SET_FEATURES", setOwner: "SET_OWNER", resetOwner: "RESET_OWNER",
	setMemTable: "SET_MEM_TABLE", setVringNum: "SET_VRING_NUM", setVringAddr: "SET_VRING_ADDR", setVringBase: "SET_VRING_BASE",
	getVringBase: "GET_VRING_BASE", setVringKick: "SET_VRING_KICK", setVringCall: "SET_VRING_CALL", setVringErr: "SET_VRING_ERR",
	getProtocolFeatures: "GET_PROTOCOL_FEATURES", setProtocolFeatures: "SET_PROTOCOL_FEATURES", getQueueNum: "GET_QUEUE_NUM",
	setVringEnable: "SET_VRING_ENABLE", getConfig: "GET_CONFIG", setConfig: "SET_CONFIG", getInflightFD: "GET_INFLIGHT_FD",
	setInflightFD: "SET_INFLIGHT_FD", resetDevice: "RESET_DEVICE",
}

func (r requestID) String() string {
	if s := requestNames[r]; s != "" {
		return s
	}
	return fmt.Sprintf("message %d", uint32(r))
}

// Protocol features ("Protocol features").
const (
	protocolMQ          = 1 << 0
	protocolReplyAck    = 1 << 3
	protocolConfig      = 1 << 9
	protocolInflight    = 1 << 12
	protocolResetDevice = 1 << 13

	protocolOffered = protocolMQ | protocolReplyAck | protocolConfig | protocolInflight | protocolResetDevice
)

// message is what the front end sends. It owns its descriptors until takeFD.
type message struct {
	id      requestID
	flags   uint32
	payload []byte
	fds     []int
}

// takeFD hands over the only descriptor of m.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("it has %d file descriptors, want 1", len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

// close closes the descriptors that nobody has taken.
func (m *message) close() {
	for _, fd := range m.fds {
		unix.Close(fd)
	}
	m.fds = nil
}

// size fails unless the payload has n bytes.
func (m *message) size(n int) error {
	if len(m.payload) != n {
		return fmt.Errorf("its payload has %d bytes, want %d", len(m.payload), n)
	}
	return nil
}

// u64 is the payload of a message that is one number.
func (m *message) u64() (uint64, error) {
	if err := m.size(8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(m.payload), nil
}

// vringState is the payload of messages about a ring: its index and a number.
func (m *message) vringState() (index, num uint32, err error) {
	if err := m.size(8); err != nil {
		return 0, 0, err
	}
	return binary.LittleEndian.Uint32(m.payload), binary.LittleEndian.Uint32(m.payload[4:]), nil
}

// vringAddr is the payload of SET_VRING_ADDR:
//
//	0   u32  index of the ring
//	4   u32  flags
//	8   u64  user address of the descriptor table
//	16  u64  of the used ring
//	24  u64  of the available ring
//	32  u64  guest address for the log of dirty pages, which is not offered
type vringAddr struct {
	desc, used, avail uint64
}

const vringAddrLen = 40

func (m *message) vringAddr() (index uint32, a vringAddr, err error) {
	if err := m.size(vringAddrLen); err != nil {
		return 0, a, err
	}
	p := m.payload
	return binary.LittleEndian.Uint32(p), vringAddr{
		desc:  binary.LittleEndian.Uint64(p[8:]),
		used:  binary.LittleEndian.Uint64(p[16:]),
		avail: binary.LittleEndian.Uint64(p[24:]),
	}, nil
}

// vringFD is the payload of messages that bring an eventfd of a ring: its index in bits
// 0 to 7, and bit 8 where there is no descriptor. fd is -1 then.
func (m *message) vringFD() (index uint32, fd int, err error) {
	n, err := m.u64()
	if err != nil {
		return 0, -1, err
	}
	index, fd = uint32(n&0xff), -1
	if n&0x100 == 0 {
		fd, err = m.takeFD()
	}
	return index, fd, err
}

// payloadTime is how long the rest of a message may take, and a reply. Front ends send a
// message with one system call.
const payloadTime = 5 * time.Second

// receive reads the next message. The caller closes it.
func receive(nc *net.UnixConn) (m message, err error) {
	var head [headerLen]byte
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	n, oobn, flags, _, err := nc.ReadMsgUnix(head[:], oob)
	if err != nil {
		return m, err
	}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	if m.fds, err = parseFDs(oob[:oobn]); err != nil {
		return m, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return m, fmt.Errorf("a message has more than %d file descriptors", maxFDs)
	}
	if n == 0 {
		return m, io.EOF
	}
	_ = nc.SetReadDeadline(time.Now().Add(payloadTime))
	if n < headerLen {
		if _, err := io.ReadFull(nc, head[n:]); err != nil {
			return m, cut(err)
		}
	}
	m.id, m.flags = requestID(binary.LittleEndian.Uint32(head[:])), binary.LittleEndian.Uint32(head[4:])
	if v := m.flags & flagVersionMask; v != flagVersion {
		return m, fmt.Errorf("%v: it is of version %d of the protocol, want %d", m.id, v, flagVersion)
	}
	if m.flags&flagReply != 0 {
		return m, fmt.Errorf("%v: it is a reply, and nothing was asked", m.id)
	}
	size := binary.LittleEndian.Uint32(head[8:])
	if size > maxPayload {
		return m, fmt.Errorf("%v: its payload has %d bytes, of at most %d", m.id, size, maxPayload)
	}
	m.payload = make([]byte, size)
	if _, err := io.ReadFull(nc, m.payload); err != nil {
		return m, cut(err)
	}
	return m, nil
}

// cut is the error of a message that has begun.
func cut(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("the rest of a message has not arrived within %v", payloadTime)
	case err == io.EOF:
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseFDs returns the descriptors in ancillary data. On an error it has closed them.
func parseFDs(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	all, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ancillary data: %w", err)
	}
	for i := range all {
		// Ancillary data of another kind carry no descriptors.
		if f, err := unix.ParseUnixRights(&all[i]); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds, nil
}

// reply answers the message id.
func reply(nc *net.UnixConn, id requestID, payload []byte, fds ...int) error {
	b := make([]byte, headerLen, headerLen+len(payload))
	binary.LittleEndian.PutUint32(b, uint32(id))
	binary.LittleEndian.PutUint32(b[4:], flagVersion|flagReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	b = append(b, payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_ = nc.SetWriteDeadline(time.Now().Add(payloadTime))
	n, _, err := nc.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = nc.Write(b[n:])
	}
	return err
}

func u64(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
