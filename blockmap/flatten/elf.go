package flatten

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"

	"thaw/blockmap/ext4"
)

// elfFile holds what a dynamic linker reads of an ELF file: the program headers and the
// dynamic section. It does not use section headers, which debug/elf requires but a file
// need not have.
type elfFile struct {
	class   elf.Class
	order   binary.ByteOrder
	machine elf.Machine

	interp         string
	needed         []string
	soname         string
	rpath, runpath string

	head []span // read when the file is mapped
	body []span // read and written when the file is relocated, and where it begins to run
}

// span is a range of bytes of a file.
type span struct{ off, n int64 }

// Bounds on what an ELF file may ask for.
const (
	maxProgs   = 256
	maxDynamic = 4096 // entries
	maxNeeded  = 1024
	maxString  = 4095
	maxStrings = 64 << 10 // total bytes of the names of libraries and directories that are kept for one file

	// maxTables bounds the tables of a file that are predicted; maxWritable bounds its
	// segments of data that need relocation. Chromium has 26 and 12 MiB.
	maxTables   = 32 << 20
	maxWritable = 16 << 20

	// entryReach is the size of the prediction at the first instruction: what a kernel
	// maps and reads ahead there.
	entryReach = 128 << 10

	// The generic ABI defines these, and debug/elf does not have them yet.
	dtRELRSZ elf.DynTag = 35
	dtRELR   elf.DynTag = 36
)

var errNotELF = errors.New("not an ELF file that can be run")

// readELF reads an ELF file, which may be hostile. It reads nothing beyond the bounds
// above.
func readELF(ctx context.Context, c *contents, in *ext4.Inode) (*elfFile, error) {
	ident, err := c.read(ctx, in, 0, 64)
	if err != nil {
		return nil, err
	}
	if len(ident) < 52 || string(ident[:4]) != elf.ELFMAG {
		return nil, errNotELF
	}
	f := &elfFile{class: elf.Class(ident[elf.EI_CLASS])}
	switch elf.Data(ident[elf.EI_DATA]) {
	case elf.ELFDATA2LSB:
		f.order = binary.LittleEndian
	case elf.ELFDATA2MSB:
		f.order = binary.BigEndian
	default:
		return nil, errNotELF
	}
	var h elf.Header64
	switch f.class {
	case elf.ELFCLASS64:
		_, err = binary.Decode(ident, f.order, &h)
	case elf.ELFCLASS32:
		var s elf.Header32
		_, err = binary.Decode(ident, f.order, &s)
		h = elf.Header64{
			Type: s.Type, Machine: s.Machine, Entry: uint64(s.Entry),
			Phoff: uint64(s.Phoff), Phentsize: s.Phentsize, Phnum: s.Phnum,
		}
	default:
		return nil, errNotELF
	}
	if err != nil {
		return nil, errNotELF
	}
	if t := elf.Type(h.Type); t != elf.ET_EXEC && t != elf.ET_DYN {
		return nil, errNotELF
	}
	f.machine = elf.Machine(h.Machine)
	progs, err := f.progs(ctx, c, in, &h)
	if err != nil {
		return nil, err
	}
	f.head = append(f.head, span{0, blockSize})
	m := memory(progs)
	for _, p := range progs {
		switch elf.ProgType(p.Type) {
		case elf.PT_INTERP:
			if f.interp, err = c.stringAt(ctx, in, int64(p.Off)); err != nil {
				return nil, err
			}
		case elf.PT_DYNAMIC:
			if err := f.dynamic(ctx, c, in, m, p); err != nil {
				return nil, err
			}
		}
	}
	left := int64(maxWritable)
	for _, p := range progs {
		if elf.ProgType(p.Type) == elf.PT_LOAD && elf.ProgFlag(p.Flags)&elf.PF_W != 0 {
			n := min(int64(p.Filesz), left)
			left -= n
			f.body = append(f.body, span{int64(p.Off), n})
		}
	}
	if off, ok := m.file(h.Entry); ok && h.Entry != 0 {
		f.body = append(f.body, span{max(0, off-entryReach/4) &^ (blockSize - 1), entryReach})
	}
	return f, nil
}

// progs reads the program headers, except those that lie outside of the file.
func (f *elfFile) progs(ctx context.Context, c *contents, in *ext4.Inode, h *elf.Header64) ([]elf.Prog64, error) {
	size := binary.Size(elf.Prog64{})
	if f.class == elf.ELFCLASS32 {
		size = binary.Size(elf.Prog32{})
	}
	if int(h.Phentsize) != size || h.Phnum > maxProgs || h.Phoff > uint64(in.Size) {
		return nil, fmt.Errorf("%w: %d program headers of %d bytes at %d", errNotELF, h.Phnum, h.Phentsize, h.Phoff)
	}
	b, err := c.read(ctx, in, int64(h.Phoff), int(h.Phnum)*size)
	if err != nil {
		return nil, err
	}
	var progs []elf.Prog64
	for ; len(b) >= size; b = b[size:] {
		var p elf.Prog64
		if f.class == elf.ELFCLASS64 {
			_, err = binary.Decode(b, f.order, &p)
		} else {
			var s elf.Prog32
			_, err = binary.Decode(b, f.order, &s)
			p = elf.Prog64{
				Type: s.Type, Flags: s.Flags, Off: uint64(s.Off), Vaddr: uint64(s.Vaddr), Filesz: uint64(s.Filesz),
			}
		}
		if err != nil {
			return nil, errNotELF
		}
		if p.Off <= uint64(in.Size) && p.Filesz <= uint64(in.Size)-p.Off {
			progs = append(progs, p)
		}
	}
	return progs, nil
}

// memory lists the program headers, which say where a file is mapped.
type memory []elf.Prog64

// file returns the offset in the file of an address.
func (m memory) file(addr uint64) (int64, bool) {
	for _, p := range m {
		if elf.ProgType(p.Type) == elf.PT_LOAD && addr >= p.Vaddr && addr-p.Vaddr < p.Filesz {
			return int64(p.Off + addr - p.Vaddr), true
		}
	}
	return 0, false
}

// dynamic reads the dynamic section.
func (f *elfFile) dynamic(ctx context.Context, c *contents, in *ext4.Inode, m memory, p elf.Prog64) error {
	size := binary.Size(elf.Dyn64{})
	if f.class == elf.ELFCLASS32 {
		size = binary.Size(elf.Dyn32{})
	}
	n := int(min(p.Filesz, uint64(maxDynamic*size)))
	b, err := c.read(ctx, in, int64(p.Off), n)
	if err != nil {
		return err
	}
	f.head = append(f.head, span{int64(p.Off), int64(n)})
	values := make(map[elf.DynTag]uint64)
	var needed []uint64
	for ; len(b) >= size; b = b[size:] {
		var d elf.Dyn64
		if f.class == elf.ELFCLASS64 {
			_, err = binary.Decode(b, f.order, &d)
		} else {
			var s elf.Dyn32
			_, err = binary.Decode(b, f.order, &s)
			d = elf.Dyn64{Tag: int64(s.Tag), Val: uint64(s.Val)}
		}
		if err != nil || elf.DynTag(d.Tag) == elf.DT_NULL {
			break
		}
		if elf.DynTag(d.Tag) != elf.DT_NEEDED {
			values[elf.DynTag(d.Tag)] = d.Val
		} else if len(needed) < maxNeeded {
			needed = append(needed, d.Val)
		}
	}
	f.tables(m, values)
	str := func(at uint64) string {
		off, ok := m.file(values[elf.DT_STRTAB])
		if !ok || at >= values[elf.DT_STRSZ] || at >= uint64(in.Size-off) || err != nil {
			return ""
		}
		var s string
		s, err = c.stringAt(ctx, in, off+int64(at))
		return s
	}
	left := maxStrings
	for _, at := range needed {
		if s := str(at); s != "" {
			if left -= len(s); left < 0 {
				break
			}
			f.needed = append(f.needed, s)
		}
	}
	optional := func(tag elf.DynTag) string {
		if at, ok := values[tag]; ok {
			return str(at)
		}
		return ""
	}
	f.soname, f.rpath, f.runpath = optional(elf.DT_SONAME), optional(elf.DT_RPATH), optional(elf.DT_RUNPATH)
	return err
}

// tables finds the tables in which symbols are looked up, which are read as soon as
// another file needs this one, and the tables that list relocations.
func (f *elfFile) tables(m memory, values map[elf.DynTag]uint64) {
	left := int64(maxTables)
	add := func(l *[]span, start elf.DynTag, n uint64) {
		if addr, ok := values[start]; ok && n > 0 {
			if off, ok := m.file(addr); ok {
				n := int64(min(n, uint64(left)))
				left -= n
				*l = append(*l, span{off, n})
			}
		}
	}
	add(&f.head, elf.DT_STRTAB, values[elf.DT_STRSZ])
	// Hash tables and symbol tables do not record their length; linkers place them
	// before the strings.
	for _, t := range []elf.DynTag{elf.DT_GNU_HASH, elf.DT_HASH, elf.DT_SYMTAB, elf.DT_VERSYM, elf.DT_VERNEED} {
		n := uint64(blockSize)
		if start, end := values[t], values[elf.DT_STRTAB]; start < end && end-start < maxWritable {
			n = end - start
		}
		add(&f.body, t, n)
	}
	add(&f.body, dtRELR, values[dtRELRSZ])
	add(&f.body, elf.DT_REL, values[elf.DT_RELSZ])
	add(&f.body, elf.DT_RELA, values[elf.DT_RELASZ])
	add(&f.body, elf.DT_JMPREL, values[elf.DT_PLTRELSZ])
}

// stringAt reads a string that ends in a NUL. It returns "" if there is no NUL.
func (c *contents) stringAt(ctx context.Context, in *ext4.Inode, off int64) (string, error) {
	b, err := c.read(ctx, in, off, maxString+1)
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return string(b[:i]), err
	}
	return "", err
}
