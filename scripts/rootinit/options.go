package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// options are what the kernel command line says. scripts/rootfs --help describes each.
type options struct {
	exec     string // thaw.exec
	noServe  bool   // thaw.service=off
	after    after  // thaw.after; "" is the default
	console  consoleKind
	hostname string
	address  address
	readOnly bool // "ro"
}

// after is what follows the end of the service.
type after string

const (
	afterPowerOff after = "poweroff"
	afterReboot   after = "reboot"
	afterStay     after = "stay"
	afterRestart  after = "restart"
)

// consoleKind is what runs on serial consoles.
type consoleKind string

const (
	consoleShell consoleKind = "shell"
	consoleLogin consoleKind = "login"
	consoleOff   consoleKind = "off"
)

// address is where the first network device gets its address from; further ones use DHCP. The zero address means DHCP.
type address struct {
	off     bool
	prefix  netip.Prefix // a fixed address with the length of its network
	gateway netip.Addr
	dns     netip.Addr
}

// parseOptions also returns what it does not understand, with the reason.
func parseOptions(line string) (options, []string) {
	var o options
	var bad []string
	for _, word := range words(line) {
		if word == "--" {
			break // arguments of init follow
		}
		name, value, _ := strings.Cut(word, "=")
		var err error
		switch name {
		case "ro":
			o.readOnly = true
		case "rw":
			o.readOnly = false
		case "thaw.exec":
			o.exec = value
		case "thaw.service":
			if o.noServe = value == "off"; !o.noServe && value != "on" {
				err = errors.New("it must be on or off")
			}
		case "thaw.after":
			switch a := after(value); a {
			case afterPowerOff, afterReboot, afterStay, afterRestart:
				o.after = a
			default:
				err = errors.New("it must be poweroff, reboot, stay or restart")
			}
		case "thaw.console":
			switch k := consoleKind(value); k {
			case consoleShell, consoleLogin, consoleOff:
				o.console = k
			default:
				// A typing error gives nobody a shell.
				o.console, err = consoleOff, errors.New("it must be shell, login or off; taken as off")
			}
		case "thaw.hostname":
			if o.hostname = value; !validHostname(value) {
				o.hostname, err = "", errors.New("it is not a hostname")
			}
		case "thaw.ip":
			o.address, err = parseAddress(value)
		default:
			if strings.HasPrefix(name, "thaw.") {
				err = errors.New("there is no such option")
			}
		}
		if err != nil {
			bad = append(bad, fmt.Sprintf("%s: %v", word, err))
		}
	}
	if o.console == "" {
		// The output of a command would be mixed with that of a shell.
		if o.console = consoleShell; o.exec != "" {
			o.console = consoleOff
		}
	}
	return o, bad
}

// words splits a command line as the kernel does: at spaces outside of double quotes. Quotes around a value, or around a whole
// word, are removed.
func words(line string) []string {
	var all []string
	for {
		line = strings.TrimLeft(line, " \t\n\r\v\f")
		if line == "" {
			return all
		}
		end, quoted := 0, false
		for ; end < len(line); end++ {
			if line[end] == '"' {
				quoted = !quoted
			} else if !quoted && strings.IndexByte(" \t\n\r\v\f", line[end]) >= 0 {
				break
			}
		}
		word := line[:end]
		line = line[end:]
		if strings.HasPrefix(word, `"`) {
			word = strings.TrimSuffix(word[1:], `"`)
		} else if name, value, ok := strings.Cut(word, "="); ok && strings.HasPrefix(value, `"`) {
			word = name + "=" + strings.TrimSuffix(value[1:], `"`)
		}
		all = append(all, word)
	}
}

// parseAddress parses dhcp, off, or ADDRESS/BITS[,GATEWAY[,DNS]].
func parseAddress(s string) (address, error) {
	switch s {
	case "dhcp":
		return address{}, nil
	case "off":
		return address{off: true}, nil
	}
	const form = "it must be dhcp, off, or ADDRESS/BITS[,GATEWAY[,DNS]]"
	parts := strings.Split(s, ",")
	if len(parts) > 3 {
		return address{}, errors.New(form)
	}
	var a address
	var err error
	if a.prefix, err = netip.ParsePrefix(parts[0]); err != nil {
		return address{}, errors.New(form)
	}
	for i, to := range []*netip.Addr{&a.gateway, &a.dns} {
		if len(parts) > i+1 && parts[i+1] != "" {
			if *to, err = netip.ParseAddr(parts[i+1]); err != nil {
				return address{}, errors.New(form)
			}
		}
	}
	if a.gateway.IsValid() && a.gateway.Is4() != a.prefix.Addr().Is4() {
		return address{}, errors.New("the gateway is of another family than the address")
	}
	return a, nil
}
