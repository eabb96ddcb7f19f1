package vhost

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"

	"thaw/blockmap"
)

// Features of a virtio block device (virtio 1.2, section 5.2.3), of rings (section 6),
// and the bit that vhost-user takes for itself.
const (
	featureSegMax      = 1 << 2
	featureRO          = 1 << 5
	featureBlkSize     = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureMQ          = 1 << 12
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
	featureIndirect    = 1 << 28
	featureEventIdx    = 1 << 29
	featureProtocol    = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	featureVersion1    = 1 << 32
	featureIOMMU       = 1 << 33
	featurePacked      = 1 << 34
)

// features are those of a device. CONFIG_WCE is not offered: a front end does not say
// again what the guest has chosen when it connects to the process that follows a crash,
// so that process would take a writethrough cache for a writeback one.
func features(writable bool) uint64 {
	f := uint64(featureSegMax | featureBlkSize | featureTopology | featureMQ | featureIndirect | featureEventIdx | featureProtocol | featureVersion1)
	if writable {
		return f | featureFlush | featureDiscard | featureWriteZeroes
	}
	return f | featureRO
}

// checkFeatures fails where the front end has taken a feature that changes what bytes mean
// and that was not offered. It may take others for itself that it knows of.
func checkFeatures(f uint64) error {
	switch {
	case f&featurePacked != 0:
		return errors.New("packed rings are not offered")
	case f&featureIOMMU != 0:
		return errors.New("VIRTIO_F_ACCESS_PLATFORM is not offered: start the virtual machine without an IOMMU for this device")
	}
	return nil
}

// The configuration space (section 5.2.4):
//
//	0   u64  capacity, in sectors
//	8   u32  size_max
//	12  u32  seg_max
//	16  u16  cylinders, u8 heads, u8 sectors
//	20  u32  blk_size
//	24  u8   physical_block_exp: log2 of logical blocks in a physical one
//	25  u8   alignment_offset
//	26  u16  min_io_size, in logical blocks
//	28  u32  opt_io_size, in logical blocks
//	32  u8   writeback
//	33  u8   unused
//	34  u16  num_queues
//	36  u32  max_discard_sectors
//	40  u32  max_discard_seg
//	44  u32  discard_sector_alignment
//	48  u32  max_write_zeroes_sectors
//	52  u32  max_write_zeroes_seg
//	56  u8   write_zeroes_may_unmap
//	57       padding
const (
	configLen = 60
	// maxConfig is VHOST_USER_MAX_CONFIG_SIZE of QEMU.
	maxConfig = 256

	// The payload of GET_CONFIG and SET_CONFIG: u32 offset, u32 size, u32 flags, and
	// the bytes.
	configHeaderLen = 12

	// mmioConfig is where the configuration space begins in the registers of a virtio-mmio
	// device. Cloud Hypervisor before 51 takes it for the offset of the first byte.
	mmioConfig = 0x100

	sectorShift = 9
	sectorSize  = 1 << sectorShift

	// segMax is how many buffers with data a request may have: with header and status,
	// those of a queue of 128 descriptors, which is the smallest that front ends make.
	segMax = 126

	// Larger ranges are divided by the driver. A request to zero is done as a whole.
	maxDiscardSectors = 1 << 30 >> sectorShift
	maxDiscardSegs    = 32
)

// config returns the configuration space of a device of size bytes.
func config(size int64, queues int, writable bool) []byte {
	c := make([]byte, configLen)
	le := binary.LittleEndian
	le.PutUint64(c, uint64(size)>>sectorShift)
	le.PutUint32(c[12:], segMax)
	// A device takes any part of a block. Whole blocks are quicker to write, which the
	// physical block says.
	le.PutUint32(c[20:], sectorSize)
	c[24] = 3
	le.PutUint16(c[26:], blockmap.BlockSize/sectorSize)
	le.PutUint16(c[34:], uint16(queues))
	if writable {
		c[32] = 1
		le.PutUint32(c[36:], maxDiscardSectors)
		le.PutUint32(c[40:], maxDiscardSegs)
		le.PutUint32(c[44:], blockmap.BlockSize/sectorSize)
		le.PutUint32(c[48:], maxDiscardSectors)
		le.PutUint32(c[52:], maxDiscardSegs)
		c[56] = 1
	}
	return c
}

// getConfig is the reply to GET_CONFIG: as many bytes as were asked for, and zeros beyond
// the configuration space. It is empty where the request makes no sense, which reports
// an error.
func (m *message) getConfig(space []byte) []byte {
	if len(m.payload) < configHeaderLen {
		return nil
	}
	off := binary.LittleEndian.Uint32(m.payload)
	size := binary.LittleEndian.Uint32(m.payload[4:])
	if size > maxConfig || off > maxConfig || len(m.payload) != configHeaderLen+int(size) {
		return nil
	}
	p := make([]byte, len(m.payload))
	copy(p, m.payload[:configHeaderLen])
	if off == mmioConfig {
		off = 0
	}
	if int(off) < len(space) {
		copy(p[configHeaderLen:], space[off:])
	}
	return p
}

// idLen is the length of what GET_ID returns (section 5.2.6).
const idLen = 20

// deviceID is the serial number of the device: the name of its export, or what
// stands for a name that is longer.
func deviceID(name string) (id [idLen]byte) {
	if len(name) > idLen {
		sum := sha256.Sum256([]byte(name))
		name = hex.EncodeToString(sum[:idLen/2])
	}
	copy(id[:], name)
	return id
}

// extent is the bytes of n sectors from sector on, within a device of size bytes.
func extent(sector uint64, n, size int64) (blockmap.Extent, error) {
	if sector > math.MaxInt64>>sectorShift || n > math.MaxInt64-int64(sector)<<sectorShift {
		return blockmap.Extent{}, blockmap.ErrOutOfRange
	}
	e := blockmap.Range(int64(sector)<<sectorShift, n)
	return e, e.Check(size)
}
