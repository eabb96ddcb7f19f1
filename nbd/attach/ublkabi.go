package attach

// The kernel's structures and numbers, of linux/ublk_cmd.h.

// ublkCommand is a control command (struct ublksrv_ctrl_cmd).
type ublkCommand struct {
	devID    uint32
	queueID  uint16
	len      uint16 // of the buffer at addr
	addr     uint64
	data     uint64
	pathLen  uint16
	_        uint16
	reserved uint32
}

// ublkInfo describes a device (struct ublksrv_ctrl_dev_info).
type ublkInfo struct {
	queues     uint16
	depth      uint16
	state      uint16
	_          uint16
	maxIOBytes uint32
	devID      uint32
	pid        int32 // of the server
	_          uint32
	flags      uint64
	mark       uint64 // the server's own; the kernel keeps it
	_, _       uint32 // the owner
	_          [2]uint64
}

// ublkParams are the properties of the disk (struct ublk_params).
type ublkParams struct {
	len, types uint32

	attrs                                      uint32
	logicalShift, physicalShift, optShift, min uint8
	maxSectors, _                              uint32 // and the sectors of a chunk
	sectors, _                                 uint64 // and a mask of the boundaries of segments

	_, discardGranularity        uint32 // after the alignment
	maxDiscardSectors, maxZeroes uint32
	maxDiscardSegments           uint16
	_                            uint16
}

// ublkParamsLen is len of ublkParams: the structure without its padding.
const ublkParamsLen = 60

const ublkDescLen = 24 // struct ublksrv_io_desc

// ioctl encodes a command: dir is 1 to write, 2 to read, 3 for both.
func ioctl(dir, number, size uint32) uint32 { return dir<<30 | size<<16 | 'u'<<8 | number }

var (
	ublkGetInfo     = ioctl(2, 0x02, 32)
	ublkAdd         = ioctl(3, 0x04, 32)
	ublkDelete      = ioctl(3, 0x05, 32)
	ublkStart       = ioctl(3, 0x06, 32)
	ublkStop        = ioctl(3, 0x07, 32)
	ublkSetParams   = ioctl(3, 0x08, 32)
	ublkGetParams   = ioctl(2, 0x09, 32)
	ublkBeginRecov  = ioctl(3, 0x10, 32)
	ublkEndRecov    = ioctl(3, 0x11, 32)
	ublkGetFeatures = ioctl(2, 0x13, 32)
	ublkDeleteAsync = ioctl(2, 0x14, 32) // Linux 6.9

	ublkFetch  = ioctl(3, 0x20, 16)
	ublkCommit = ioctl(3, 0x21, 16) // and fetch
)

const (
	ublkFRecovery  = 1 << 3
	ublkFReissue   = 1 << 4 // requests of a dead server are asked again
	ublkFIoctl     = 1 << 6
	ublkFUserCopy  = 1 << 7 // Linux 6.5: the server moves the bytes by read and write
	ublkFNoScan    = 1 << 18
	ublkFNeeded    = ublkFIoctl | ublkFUserCopy
	ublkFWanted    = ublkFNeeded | ublkFRecovery | ublkFReissue | ublkFNoScan
	ublkStateDead  = 0
	ublkNoQueue    = 0xffff
	ublkParamBasic = 1 << 0
	ublkParamTrim  = 1 << 1

	ublkAttrReadOnly = 1 << 0
	ublkAttrVolatile = 1 << 2
	ublkAttrFUA      = 1 << 3

	ublkRead    = 0
	ublkWrite   = 1
	ublkFlush   = 2
	ublkDiscard = 3
	ublkZeroes  = 5

	ublkIOFUA     = 1 << 13
	ublkIONoUnmap = 1 << 15 // zeros take space

	// Where the bytes of a request are in /dev/ublkcN.
	ublkBytesOff  = 0x80000000
	ublkTagShift  = 25
	ublkQueueShft = 41

	ublkMaxDepth = 4096 // the descriptors of a queue are mapped at multiples of it
	ublkSector   = 9    // log2
)
