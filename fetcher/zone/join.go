package zone

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Seed says where a member finds others: at an address, at the addresses of a name in DNS,
// or at those in a file.
type Seed struct {
	kind seedKind
	what string // HOST:PORT, NAME:PORT or PATH; a port of "" is this member's own
}

type seedKind uint8

const (
	seedAddress seedKind = iota
	seedDNS
	seedFile
)

// ParseSeed reads HOST[:PORT], dns:NAME[:PORT] or file:PATH.
func ParseSeed(s string) (Seed, error) {
	if path, ok := strings.CutPrefix(s, "file:"); ok {
		if path == "" {
			return Seed{}, errors.New("file: needs a path, as in file:/etc/thaw/zone")
		}
		return Seed{seedFile, path}, nil
	}
	name, dns := strings.CutPrefix(s, "dns:")
	kind := seedAddress
	if dns {
		kind = seedDNS
	}
	if _, _, err := splitAddress(name); err != nil {
		return Seed{}, fmt.Errorf("%q is not HOST:PORT, dns:NAME[:PORT] or file:PATH: %w", s, err)
	}
	return Seed{kind, name}, nil
}

// splitAddress reads HOST[:PORT]. A port of 0 means that none is given.
func splitAddress(s string) (host string, port uint16, err error) {
	host = s
	if h, p, err := net.SplitHostPort(s); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return "", 0, fmt.Errorf("the port %q is not a number from 1 to 65535", p)
		}
		host, port = h, uint16(n)
	} else if strings.Count(s, ":") == 1 {
		return "", 0, err
	}
	host = strings.Trim(host, "[]")
	if host == "" || len(host) > maxName || strings.ContainsAny(host, "/ \t@,") {
		return "", 0, errors.New("it names no host")
	}
	return host, port, nil
}

// Bounds on what a file or DNS may say.
const (
	maxSeedFile = 1 << 20
	maxSeeds    = 20000
)

// addresses are those that the seed stands for at present. own is the port of this member.
func (s Seed) addresses(ctx context.Context, own uint16) ([]netip.AddrPort, error) {
	if s.kind != seedFile {
		return lookUp(ctx, s.what, own)
	}
	lines, err := readSeeds(s.what)
	if err != nil {
		return nil, err
	}
	var all []netip.AddrPort
	var errs []error
	for _, l := range lines {
		found, err := lookUp(ctx, l, own)
		if err != nil {
			errs = append(errs, err)
		}
		all = append(all, found...)
	}
	if len(all) > 0 {
		return all, nil
	}
	return nil, errors.Join(errs[:min(len(errs), 3)]...)
}

// lookUp returns the addresses of HOST[:PORT].
func lookUp(ctx context.Context, address string, own uint16) (all []netip.AddrPort, err error) {
	host, port, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	if port == 0 {
		port = own
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), port)}, nil
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	for _, ip := range found[:min(len(found), maxSeeds)] {
		all = append(all, netip.AddrPortFrom(ip.Unmap(), port))
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all), nil
}

// readSeeds reads a file with an address in each line. What follows a # is a comment.
func readSeeds(path string) (lines []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file", path), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSeedFile+1))
	if err != nil {
		return nil, err
	}
	return parseSeeds(path, b)
}

func parseSeeds(path string, b []byte) (lines []string, err error) {
	if len(b) > maxSeedFile {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxSeedFile)
	}
	in := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; in.Scan(); n++ {
		line, _, _ := strings.Cut(in.Text(), "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if _, _, err := splitAddress(line); err != nil {
			return nil, fmt.Errorf("%s: line %d: %w", path, n, err)
		}
		if lines = append(lines, line); len(lines) > maxSeeds {
			return nil, fmt.Errorf("%s has more than %d addresses", path, maxSeeds)
		}
	}
	return lines, in.Err()
}

func (s Seed) String() string {
	return [...]string{"", "dns:", "file:"}[s.kind] + s.what
}
