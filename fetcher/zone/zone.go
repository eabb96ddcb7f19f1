package zone

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"thaw/blockmap"
)

// Options are the settings of a Zone.
type Options struct {
	// Zone is the name of the zone. Hosts of other zones are refused.
	Zone string
	// Name is the name of this host in the zone. With TLS it defaults to the first name in
	// the certificate, and without TLS to the address that the host listens on.
	Name string
	// Listen is HOST:PORT, for peers by TCP and UDP. Without TLS it is a loopback address.
	Listen string
	// Join says where to find other members. The first host of a zone needs none.
	Join []Seed
	// TLS returns the newest credentials. It is nil for a zone on one machine without TLS.
	TLS func() *Credentials
	// Secrets returns the newest secrets that gossip is encrypted with: see ReadSecrets. It
	// is required with TLS.
	Secrets func() ([]string, error)
	// Store has the chunks of this host, and brings those that it owns.
	Store Store
	// Memory is how many bytes of chunks are kept in memory as the registry has them, for
	// peers. 0 stands for StoredMemory; if it is negative, none are.
	Memory  int64
	Version string // of the program, which peers are told
	Log     *slog.Logger

	Router RouterOptions
	Grants GrantOptions

	timing func(*memberlist.Config) // for tests
	lost   func(addr string) bool   // for tests: who cannot be reached
}

// Zone is this host's membership in a zone: it asks peers for chunks, and answers theirs.
// Its methods are safe for concurrent use.
type Zone struct {
	o      Options
	self   Member
	log    *slog.Logger
	router *Router
	grants *Grants
	client *Client
	peers  *Peers
	pieces *pieces
	stored *storedChunks

	traffic  traffic
	listener *listener
	gossip   *transport
	server   *server
	members  *members

	known  atomic.Pointer[map[string]string] // addresses by name
	cancel context.CancelFunc
	wg     sync.WaitGroup
	close  sync.Once
}

// Open makes this host a member. It does not wait for others: a zone that cannot reach
// anybody works alone, says so in its Status and in the log, and goes on trying. The caller
// closes it.
func Open(ctx context.Context, o Options) (*Zone, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	at, err := resolveListen(ctx, o.Listen, o.TLS != nil)
	if err != nil {
		return nil, err
	}
	z := &Zone{o: o, log: o.Log}
	if z.log == nil {
		z.log = slog.New(slog.DiscardHandler)
	}
	tcp, udp, err := listen(ctx, at)
	if err != nil {
		return nil, err
	}
	port := tcp.Addr().(*net.TCPAddr).AddrPort()
	advertised, err := advertise(port)
	if err == nil {
		err = z.name(advertised)
	}
	if err != nil {
		tcp.Close()
		udp.Close()
		return nil, err
	}
	z.known.Store(new(map[string]string))
	o.Router.Zone = o.Zone
	z.router, z.grants, z.pieces = NewRouter(z.self.Name, o.Router), NewGrants(o.Grants), newPieces(pieceMemory)
	z.stored = newStoredChunks(max(cmp.Or(o.Memory, StoredMemory), 0))
	clientOptions := ClientOptions{Self: z.self.Name, Zone: o.Zone, Address: z.address}
	if o.TLS != nil {
		clientOptions.TLS = func(peer string) *tls.Config { return o.TLS().toPeer(peer) }
	}
	z.client = NewClient(clientOptions)
	z.peers = NewPeers(z.router, z.client)
	z.gossip = newTransport(udp, advertised, o.TLS)
	z.gossip.lost = o.lost
	z.server = &server{
		zone: o.Zone, name: z.self.Name, version: o.Version, store: o.Store, credentials: o.TLS, owner: z.router, grants: z.grants,
		pieces: z.pieces, stored: z.stored, traffic: &z.traffic, log: z.log,
	}
	z.listener = newListener(tcp, o.TLS == nil, z.gossip.take)
	z.server.start(z.listener, z.gossip.take)
	z.gossip.start()
	var keys func() ([][]byte, error)
	if o.Secrets != nil {
		keys = func() ([][]byte, error) { return gossipKeys(o.Zone, o.Secrets) }
	}
	var background context.Context
	background, z.cancel = context.WithCancel(context.Background())
	z.members, err = newMembers(membersOptions{
		zone: o.Zone, self: z.self, transport: z.gossip, seeds: o.Join, keys: keys, changed: z.changed, log: z.log, timing: o.timing,
	})
	if err != nil {
		_ = z.gossip.Shutdown()
		z.Close()
		return nil, err
	}
	z.wg.Go(func() { z.tend(background) })
	return z, nil
}

func (o *Options) check() error {
	switch {
	case !ValidName(o.Zone) || len(o.Zone) > maxZone:
		return fmt.Errorf("zone %q: its name has 1 to %d letters, digits, dots, dashes and underscores", o.Zone, maxZone)
	case o.Name != "" && !ValidName(o.Name):
		return fmt.Errorf("host %q: its name has 1 to %d letters, digits, dots, dashes and underscores", o.Name, maxName)
	case o.TLS != nil && o.Secrets == nil:
		return errors.New("a zone with TLS needs a secret, with which its gossip is encrypted: pass --zone-secret FILE")
	}
	return nil
}

// maxZone bounds the name of a zone: memberlist has a byte for the length of its label.
const maxZone = 128

// resolveListen returns the address to listen on. Without TLS other hosts must not reach
// it.
func resolveListen(ctx context.Context, address string, secure bool) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("listen for the zone on %q: want HOST:PORT: %w", address, err)
	}
	ip, err := netip.ParseAddr(host)
	if err != nil && host != "" {
		found, lookErr := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if lookErr != nil {
			return "", fmt.Errorf("listen for the zone on %q: %w", address, lookErr)
		}
		ip = found[0]
	}
	if !secure && !ip.Unmap().IsLoopback() {
		return "", fmt.Errorf("cannot listen for the zone on %s without TLS, because other hosts can reach it: pass --zone-cert, --zone-key and --zone-ca, or a loopback address", address)
	}
	if !ip.IsValid() {
		return net.JoinHostPort("", port), nil
	}
	return net.JoinHostPort(ip.Unmap().String(), port), nil
}

// advertise returns the address that peers reach this host at: the one that it listens on,
// or one of its interfaces if it listens on all.
func advertise(at netip.AddrPort) (netip.AddrPort, error) {
	ip := at.Addr().Unmap()
	if !ip.IsUnspecified() {
		return netip.AddrPortFrom(ip, at.Port()), nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("find the address of this host in the zone: %w", err)
	}
	// A private IPv4 address is the best, any address of the host the last choice.
	var best netip.Addr
	value := func(a netip.Addr) (n int) {
		if a.Is4() {
			n += 2
		}
		if a.IsPrivate() {
			n++
		}
		return n
	}
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		if ip := p.Addr().Unmap(); ip.IsGlobalUnicast() && (!best.IsValid() || value(ip) > value(best)) {
			best = ip
		}
	}
	if !best.IsValid() {
		return netip.AddrPort{}, errors.New("this host has no address that peers can reach: pass one, as in --zone-listen 10.0.0.7:7946")
	}
	return netip.AddrPortFrom(best, at.Port()), nil
}

// name sets the name of this host.
func (z *Zone) name(at netip.AddrPort) (err error) {
	z.self = Member{z.o.Name, at.String()}
	switch {
	case z.o.TLS != nil:
		z.self.Name, err = z.o.TLS().nameIn(z.o.Name)
	case z.self.Name == "":
		z.self.Name = strings.NewReplacer("[", "", "]", "").Replace(at.String())
	}
	if err == nil && !ValidName(z.self.Name) {
		err = fmt.Errorf("%q cannot be the name of a host in a zone: pass another with --zone-host", z.self.Name)
	}
	return err
}

// changed takes over the members of the zone.
func (z *Zone) changed(all []Member) {
	now := make(map[string]string, len(all))
	names := make([]string, 0, len(all))
	for _, m := range all {
		now[m.Name] = m.Addr
		names = append(names, m.Name)
	}
	before := z.known.Swap(&now)
	z.router.SetMembers(names)
	for name := range *before {
		if _, ok := now[name]; !ok {
			z.grants.Drop(name)
		}
	}
}

// address returns where a member is.
func (z *Zone) address(name string) (addr string, ok bool) {
	addr, ok = (*z.known.Load())[name]
	return addr, ok
}

// tend drops what nobody uses any more.
func (z *Zone) tend(ctx context.Context) {
	t := time.NewTicker(pieceIdle / 4)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			z.pieces.expire(now.Add(-pieceIdle))
			z.stored.expire(now.Add(-storedIdle))
		}
	}
}

// stopTime is how long uploads that are under way may take at the end.
const stopTime = 500 * time.Millisecond

// Close leaves the zone. Requests that are under way fail soon.
func (z *Zone) Close() {
	z.close.Do(func() {
		z.cancel()
		if z.members != nil {
			z.members.close()
		}
		z.server.stop(stopTime)
		z.listener.shutdown()
		z.client.Close()
		z.pieces.close()
		z.stored.close()
		z.wg.Wait()
	})
}

// Name is the name of this host in the zone.
func (z *Zone) Name() string { return z.self.Name }

// Addr is HOST:PORT that peers reach this host at.
func (z *Zone) Addr() string { return z.self.Addr }

// Alone reports whether there is no other member at present.
func (z *Zone) Alone() bool { return z.peers.Alone() }

// Route is the way of a run of an image through the zone. The run is the one of that
// number of a stream or of a blob.
func (z *Zone) Route(image string, of blockmap.Digest, number uint32) *Route {
	return z.peers.Route(image, of, number)
}

// Keep keeps a chunk of a stream in memory as the registry has it, for peers that ask for it
// soon. The caller has verified it, and no longer changes its bytes. A host that is alone
// keeps nothing.
func (z *Zone) Keep(stream blockmap.Digest, chunk int, stored []byte) {
	if !z.Alone() {
		z.stored.put(chunkKey{stream: stream, chunk: chunk}, stored)
	}
}

// Piece returns n bytes at off of a blob, and which peer has sent them: from the memory of
// this host, or by fetch, which says so. "" stands for the registry. It keeps them for
// peers. owned says that fetch asks the registry and nobody else: then peers that ask for
// the piece wait for the same request.
func (z *Zone) Piece(ctx context.Context, image string, blob blockmap.Digest, off, n int64, owned bool, fetch func(context.Context) ([]byte, string, error)) ([]byte, string, error) {
	return z.pieces.get(ctx, pieceKey{repositoryOf(image), blob, off}, n, owned, fetch)
}

// Judged says whether the bytes of a piece have been verified. A wrong piece is dropped.
func (z *Zone) Judged(image string, blob blockmap.Digest, off int64, right bool) {
	z.pieces.judge(pieceKey{repositoryOf(image), blob, off}, right)
}

// Bounds on the secrets of a zone, in bytes.
const (
	minSecret     = 16
	maxSecretFile = 4 << 10
	maxSecrets    = 8
)

// ReadSecrets reads a file with a secret in each line. Gossip is encrypted with the first
// one; gossip that was encrypted with any of them is read. So a zone changes its secret in
// three steps: add the new one as the second line on all hosts, make it the first line on
// all, and remove the other.
func ReadSecrets(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("secret of the zone: %w", err)
	}
	secrets, err := parseSecrets(b)
	if err != nil {
		return nil, fmt.Errorf("secret of the zone: %s %w", path, err)
	}
	return secrets, nil
}

func parseSecrets(b []byte) (secrets []string, err error) {
	if len(b) > maxSecretFile {
		return nil, fmt.Errorf("has more than %d bytes", maxSecretFile)
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "":
		case len(line) < minSecret:
			return nil, fmt.Errorf("has a secret of %d bytes: the least is %d, as of: openssl rand -hex 32", len(line), minSecret)
		case len(secrets) == maxSecrets:
			return nil, fmt.Errorf("has more than %d secrets", maxSecrets)
		default:
			secrets = append(secrets, line)
		}
	}
	if len(secrets) == 0 {
		return nil, errors.New("has no secret: make one with: openssl rand -hex 32")
	}
	return secrets, nil
}

// gossipKeys makes the keys of a zone. Two zones with the same secret have other keys.
func gossipKeys(zone string, read func() ([]string, error)) (keys [][]byte, err error) {
	secrets, err := read()
	if err != nil {
		return nil, err
	}
	for _, s := range secrets {
		k := sha256.Sum256([]byte("thaw zone gossip 1\x00" + zone + "\x00" + s))
		keys = append(keys, k[:])
	}
	if len(keys) == 0 {
		return nil, errors.New("the zone has no secret")
	}
	return keys, nil
}
