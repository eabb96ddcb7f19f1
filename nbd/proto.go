package nbd

import (
	"encoding/binary"
	"syscall"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// The wire format, after doc/proto.md of the NBD project (referred to as "the
// spec" throughout). All integers are big-endian. What go-nbd's protocol
// package has a name for is taken from there; the rest is defined here.
//
// # Handshake (spec: "Fixed newstyle negotiation")
//
//	server  u64 "NBDMAGIC"  u64 "IHAVEOPT"  u16 handshake flags
//	client  u32 client flags
//	client  u64 "IHAVEOPT"  u32 option  u32 length  data              any number of times
//	server  u64 0x3e889045565a9  u32 option  u32 reply type  u32 length  data   one or more for each
//
// Data of the options:
//
//	EXPORT_NAME   name; answered with  u64 size  u16 transmission flags  [124]zero unless NO_ZEROES
//	INFO, GO      u32 n  name[n]  u16 count  u16 info type × count
//	*_META_*      u32 n  export[n]  u32 count  (u32 n  query[n]) × count
//	others        none
//
// Data of the replies:
//
//	SERVER        u32 n  name[n]  description
//	INFO EXPORT       u16 0  u64 size  u16 transmission flags
//	INFO NAME         u16 1  name
//	INFO DESCRIPTION  u16 2  description
//	INFO BLOCK_SIZE   u16 3  u32 minimum  u32 preferred  u32 maximum payload
//	META_CONTEXT  u32 id  name
//	ERR_*         a sentence for a human
//
// # Transmission (spec: "Transmission")
//
//	request          u32 0x25609513  u16 command flags  u16 command  u64 cookie  u64 offset  u32 length  payload of a WRITE
//	simple reply     u32 0x67446698  u32 error  u64 cookie  payload of a READ
//	structured chunk u32 0x668e33ef  u16 flags  u16 type  u64 cookie  u32 length  then by type:
//
//	NONE           nothing
//	OFFSET_DATA    u64 offset  data
//	OFFSET_HOLE    u64 offset  u32 size
//	BLOCK_STATUS   u32 context id  (u32 length  u32 status flags) × n
//	ERROR          u32 error  u16 n  message[n]
//	ERROR_OFFSET   u32 error  u16 n  message[n]  u64 offset

// Lengths of the fixed parts.
const (
	clientFlagsLen  = 4
	optionHeaderLen = 16
	requestLen      = 28
	simpleReplyLen  = 16
	chunkLen        = 20
	holePayloadLen  = 12
	exportPadding   = 124 // zeros after the reply to EXPORT_NAME
)

// Bounds. maxPayload is what the spec asks every server to take and what
// INFO_BLOCK_SIZE announces; maxString is the spec's limit on any string.
const (
	minBlock       = 1
	preferredBlock = 4096
	maxPayload     = 32 << 20
	maxString      = 4096
	maxExtents     = 1 << 20 // in one BLOCK_STATUS chunk
)

const (
	magicServer  = protocol.NEGOTIATION_MAGIC_OLDSTYLE
	magicOption  = protocol.NEGOTIATION_MAGIC_OPTION
	magicReply   = protocol.NEGOTIATION_MAGIC_REPLY
	magicRequest = protocol.TRANSMISSION_MAGIC_REQUEST
	magicSimple  = protocol.TRANSMISSION_MAGIC_REPLY
	magicChunk   = uint32(0x668e33ef)
)

// Handshake flags, and the client flags that answer them with the same bits.
const (
	flagFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = uint16(1 << 1)
)

// Transmission flags.
const (
	flagHasFlags    = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	flagReadOnly    = uint16(1 << 1)
	flagFlush       = uint16(1 << 2)
	flagFUA         = uint16(1 << 3)
	flagTrim        = uint16(1 << 5)
	flagWriteZeroes = uint16(1 << 6)
	flagDF          = uint16(1 << 7)
	flagMultiConn   = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	flagCache       = uint16(1 << 10)
	flagFastZero    = uint16(1 << 11)
)

// Options.
const (
	optExportName      = uint32(1)
	optAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT
	optList            = protocol.NEGOTIATION_ID_OPTION_LIST
	optStartTLS        = uint32(5)
	optInfo            = protocol.NEGOTIATION_ID_OPTION_INFO
	optGo              = protocol.NEGOTIATION_ID_OPTION_GO
	optStructuredReply = uint32(8)
	optListMetaContext = uint32(9)
	optSetMetaContext  = uint32(10)
)

// Types of the replies to options.
const (
	repAck         = protocol.NEGOTIATION_TYPE_REPLY_ACK
	repServer      = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	repInfo        = protocol.NEGOTIATION_TYPE_REPLY_INFO
	repMetaContext = uint32(4)
	repErrUnsup    = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	repErrPolicy   = uint32(1<<31 | 2)
	repErrInvalid  = uint32(1<<31 | 3)
	repErrTLSReqd  = uint32(1<<31 | 5)
	repErrUnknown  = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	repErrShutdown = uint32(1<<31 | 7)
	repErrTooBig   = uint32(1<<31 | 9)
)

// Information types of INFO and GO.
const (
	infoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	infoName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	infoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	infoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Commands.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)
)

// Command flags.
const (
	cmdFlagFUA      = uint16(1 << 0)
	cmdFlagNoHole   = uint16(1 << 1)
	cmdFlagDF       = uint16(1 << 2)
	cmdFlagReqOne   = uint16(1 << 3)
	cmdFlagFastZero = uint16(1 << 4)
)

// Structured replies: the flag of the last chunk, and the types.
const (
	chunkDone        = uint16(1 << 0)
	chunkNone        = uint16(0)
	chunkData        = uint16(1)
	chunkHole        = uint16(2)
	chunkStatus      = uint16(5)
	chunkError       = uint16(1<<15 | 1)
	chunkErrorOffset = uint16(1<<15 | 2)
)

// Status flags of base:allocation, and the one of x-thaw:resident.
const (
	stateHole     = uint32(1 << 0)
	stateZero     = uint32(1 << 1)
	stateResident = uint32(1 << 0)
)

// errno is an error value of the protocol (spec: "Error values"). They are the
// numbers that Linux uses on x86, on every platform.
type errno uint32

const (
	ePerm     = errno(1)
	eIO       = errno(5)
	eNoMem    = errno(12)
	eInval    = errno(22)
	eNoSpace  = errno(28)
	eOverflow = errno(75)
	eNotSup   = errno(95)
	eShutdown = errno(108)
)

// wireErrno is the protocol's value for what Errno returns.
func wireErrno(e syscall.Errno) errno {
	switch e {
	case 0:
		return 0
	case syscall.EPERM:
		return ePerm
	case syscall.ENOMEM:
		return eNoMem
	case syscall.EINVAL:
		return eInval
	case syscall.ENOSPC:
		return eNoSpace
	case syscall.ESHUTDOWN:
		return eShutdown
	}
	return eIO
}

func (e errno) String() string {
	switch e {
	case ePerm:
		return "operation not permitted"
	case eIO:
		return "input/output error"
	case eNoMem:
		return "out of memory"
	case eInval:
		return "invalid argument"
	case eNoSpace:
		return "no space left on device"
	case eOverflow:
		return "value too large"
	case eNotSup:
		return "operation not supported"
	case eShutdown:
		return "the server is shutting down"
	}
	return "ok"
}

// request is a request's header.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	offset uint64
	length uint32
}

// parseRequest decodes the first requestLen bytes of p; ok is false where the
// magic is wrong, after which nothing on the connection can be trusted.
func parseRequest(p []byte) (r request, ok bool) {
	_ = p[requestLen-1]
	return request{
		flags:  binary.BigEndian.Uint16(p[4:]),
		cmd:    binary.BigEndian.Uint16(p[6:]),
		cookie: binary.BigEndian.Uint64(p[8:]),
		offset: binary.BigEndian.Uint64(p[16:]),
		length: binary.BigEndian.Uint32(p[24:]),
	}, binary.BigEndian.Uint32(p) == magicRequest
}

// within reports whether r lies inside a device of size bytes.
func (r *request) within(size int64) bool {
	return r.offset <= uint64(size) && uint64(r.length) <= uint64(size)-r.offset
}

// op is the kind of r for Errno.
func (r *request) op() Op {
	switch r.cmd {
	case cmdRead:
		return OpRead
	case cmdWrite, cmdWriteZeroes:
		return OpWrite
	}
	return OpOther
}

func appendSimpleReply(p []byte, cookie uint64, e errno) []byte {
	p = append(p, make([]byte, simpleReplyLen)...) // one look at the capacity
	h := p[len(p)-simpleReplyLen:]
	binary.BigEndian.PutUint32(h, magicSimple)
	binary.BigEndian.PutUint32(h[4:], uint32(e))
	binary.BigEndian.PutUint64(h[8:], cookie)
	return p
}

func appendChunk(p []byte, cookie uint64, flags, typ uint16, length uint32) []byte {
	p = append(p, make([]byte, chunkLen)...)
	h := p[len(p)-chunkLen:]
	binary.BigEndian.PutUint32(h, magicChunk)
	binary.BigEndian.PutUint16(h[4:], flags)
	binary.BigEndian.PutUint16(h[6:], typ)
	binary.BigEndian.PutUint64(h[8:], cookie)
	binary.BigEndian.PutUint32(h[16:], length)
	return p
}
