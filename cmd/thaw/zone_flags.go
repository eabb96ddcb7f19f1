package main

import (
	"path/filepath"

	"github.com/spf13/pflag"

	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/zone"
)

// zoneFlags are the flags that make a server a member of a zone. A command that may start a
// server in the background hands them to it.
type zoneFlags struct {
	o      host.ZoneOptions
	allow  []string
	memory size
}

func (z *zoneFlags) add(f *pflag.FlagSet) {
	f.StringVar(&z.o.Name, "zone", "", "share chunks with the hosts of the zone of this `NAME` (default: none)")
	f.StringVar(&z.o.Listen, "zone-listen", "", "`ADDRESS` for the other hosts of the zone, HOST:PORT, by TCP and UDP; without --zone-cert, HOST is a loopback address")
	f.StringArrayVar(&z.o.Join, "zone-join", nil, "find other hosts of the zone at `ADDRESS`: HOST:PORT, dns:NAME[:PORT] for all addresses of a name, or file:PATH for a file with one in each line (repeatable)")
	f.StringVar(&z.o.Host, "zone-host", "", "`NAME` of this host in the zone, which must be in its certificate (default: the first one there; without TLS the address)")
	f.StringVar(&z.o.Cert, "zone-cert", "", "require TLS in the zone; `FILE` has this host's certificate chain, for servers and clients")
	f.StringVar(&z.o.Key, "zone-key", "", "`FILE` with the key of --zone-cert")
	f.StringVar(&z.o.CA, "zone-ca", "", "`FILE` with the authorities that issue the certificates of the zone's hosts")
	f.StringVar(&z.o.Secret, "zone-secret", "", "encrypt the zone's gossip with the secret in `FILE`; required with --zone-cert")
	f.StringArrayVar(&z.allow, "zone-allow", nil, "let peers have this host open repositories that match `PATTERN` (repeatable; default: those of --allow and of the registries of this host's images)")
	z.memory = zone.StoredMemory
	f.Var(&z.memory, "zone-memory", "largest `SIZE` of the compressed chunks that this host keeps in memory for peers; what it does not keep, it sends uncompressed")
}

// options are the settings of the flags. clients are the patterns of --allow.
func (z *zoneFlags) options(clients []string) host.ZoneOptions {
	o := z.o
	switch z.memory {
	case zone.StoredMemory:
	case 0:
		o.Memory = -1
	default:
		o.Memory = int64(z.memory)
	}
	o.Allow, o.Clients, o.Version = z.allow, clients, thisVersion().Version
	return o
}

func (z *zoneFlags) check() error {
	o := z.options(nil)
	return o.Check()
}

// set reports whether a zone is named.
func (z *zoneFlags) set() bool { return z.o.Name != "" }

// args are the flags for a server with another working directory.
func (z *zoneFlags) args() (args []string, err error) {
	if !z.set() {
		return nil, nil
	}
	for _, f := range []struct {
		name, value string
		file        bool
	}{
		{"zone", z.o.Name, false}, {"zone-listen", z.o.Listen, false}, {"zone-host", z.o.Host, false},
		{"zone-cert", z.o.Cert, true}, {"zone-key", z.o.Key, true}, {"zone-ca", z.o.CA, true}, {"zone-secret", z.o.Secret, true},
	} {
		if f.value == "" {
			continue
		}
		if f.file {
			if f.value, err = filepath.Abs(f.value); err != nil {
				return nil, err
			}
		}
		args = append(args, "--"+f.name, f.value)
	}
	for _, j := range z.o.Join {
		if j, err = absoluteSeed(j); err != nil {
			return nil, err
		}
		args = append(args, "--zone-join", j)
	}
	for _, p := range z.allow {
		args = append(args, "--zone-allow", p)
	}
	if z.memory != zone.StoredMemory {
		args = append(args, "--zone-memory", z.memory.String())
	}
	return args, nil
}
