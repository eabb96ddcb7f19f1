package zone

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"thaw/blockmap"
)

// awaitMembers waits until each zone has n members, and knows the addresses of all.
func awaitMembers(t testing.TB, n int, zones ...*Zone) {
	t.Helper()
	for _, z := range zones {
		await(t, fmt.Sprintf("%s has %d members", z.Name(), n), func() bool { return z.Status().Members == n && z.router.Ring().Len() == n })
	}
}

// cuts says which addresses cannot reach each other.
type cuts struct {
	mu   sync.Mutex
	side map[string]int
	on   bool
}

// from is Options.lost of the host with an address.
func (c *cuts) from(self string) func(addr string) bool {
	return func(addr string) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		a, errA := netip.ParseAddrPort(self)
		b, errB := netip.ParseAddrPort(addr)
		return errA == nil && errB == nil && c.on && c.side[a.Addr().String()] != c.side[b.Addr().String()]
	}
}

func (c *cuts) set(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = on
}

// Members join by any of them, own what the ring says, and go when they leave.
func TestMembersJoinAndLeave(t *testing.T) {
	a := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{})})
	if st := a.Status(); !st.Alone || st.Members != 1 || len(st.Peers) != 0 || st.Name != a.Addr() {
		t.Errorf("%+v", st)
	}
	b := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Join: []Seed{a.seed(t)}})
	c := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Join: []Seed{b.seed(t)}, Name: "host-3"})
	awaitMembers(t, 3, a, b, c)
	for i := range uint32(64) {
		run := Run{blockmap.Digest{1}, i}
		n := 0
		for _, z := range []*Zone{a, b, c} {
			if z.router.Owns(run) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("run %d has %d owners", i, n)
		}
	}
	if addr, ok := a.address("host-3"); !ok || addr != c.Addr() {
		t.Errorf("host-3 is at %s", addr)
	}
	c.Close()
	awaitMembers(t, 2, a, b)
	if st := a.Status(); len(st.Peers) != 1 || st.Peers[0].Address != b.Addr() {
		t.Errorf("%+v", st)
	}
	b.Close()
	awaitMembers(t, 1, a)
}

// A partition leaves both halves working. When it is over, they are one zone again, also
// when memberlist has given the others up.
func TestPartition(t *testing.T) {
	x := &cuts{side: map[string]int{"127.0.0.13": 1}}
	var zones []*Zone
	for i, ip := range []string{"127.0.0.11", "127.0.0.12", "127.0.0.13"} {
		o := Options{Store: newTestStore(t, blockmap.CacheOptions{}), Listen: ip + ":0", lost: x.from(ip + ":1"), timing: func(c *memberlist.Config) {
			quick(c)
			c.GossipToTheDeadTime = time.Millisecond // only the seeds can find it again
		}}
		if i > 0 {
			o.Join = []Seed{zones[0].seed(t)}
		}
		zones = append(zones, open(t, o))
	}
	awaitMembers(t, 3, zones...)
	x.set(true)
	awaitMembers(t, 2, zones[0], zones[1])
	awaitMembers(t, 1, zones[2])
	if !zones[2].Status().Alone || zones[0].Status().Alone {
		t.Error("which half is alone")
	}
	for i := range uint32(16) {
		if !zones[2].router.Owns(Run{blockmap.Digest{2}, i}) {
			t.Error("who is alone does not own everything")
		}
	}
	await(t, "who is alone says why", func() bool { return zones[2].Status().Error != "" })
	x.set(false)
	awaitMembers(t, 3, zones...)
}

// A member that is killed is found out, and its name is free for the next one.
func TestKilledMember(t *testing.T) {
	x := &cuts{side: map[string]int{"127.0.0.22": 1}}
	a := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Listen: "127.0.0.21:0", lost: x.from("127.0.0.21:1")})
	b := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Listen: "127.0.0.22:0", lost: x.from("127.0.0.22:1"), Name: "b", Join: []Seed{a.seed(t)}})
	awaitMembers(t, 2, a, b)
	x.set(true)
	awaitMembers(t, 1, a)
	b.Close()
	again := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Listen: "127.0.0.23:0", Name: "b", Join: []Seed{a.seed(t)}})
	awaitMembers(t, 2, a, again)
	if addr, _ := a.address("b"); addr != again.Addr() {
		t.Errorf("b is at %s instead of %s", addr, again.Addr())
	}
}

// A file with hosts is read again when it changes, and what is wrong in it is no member.
func TestJoinByFile(t *testing.T) {
	a := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{})})
	path := filepath.Join(t.TempDir(), "zone")
	seed, err := ParseSeed("file:" + path)
	if err != nil {
		t.Fatal(err)
	}
	b := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Join: []Seed{seed}})
	await(t, "b says that it is alone", func() bool { st := b.Status(); return st.Alone && strings.Contains(st.Error, path) })
	if err := os.WriteFile(path, []byte("# hosts\n\n127.0.0.1:1 # nobody\n"+a.Addr()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	awaitMembers(t, 2, a, b)
}

// Hosts of another zone, or with another secret, are no members.
func TestOtherZone(t *testing.T) {
	secret := func(s ...string) func() ([]string, error) { return func() ([]string, error) { return s, nil } }
	a := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Secrets: secret("the secret of the zone")})
	for what, o := range map[string]Options{
		"another zone": {Zone: "zone-2", Secrets: secret("the secret of the zone")}, "another secret": {Secrets: secret("another secret of a zone")}, "no secret": {},
	} {
		o.Store, o.Join = newTestStore(t, blockmap.CacheOptions{}), []Seed{a.seed(t)}
		b := open(t, o)
		await(t, what+": it has tried", func() bool { return b.Status().Error != "" })
		if !a.Status().Alone || !b.Status().Alone {
			t.Errorf("%s: it is a member", what)
		}
		b.Close()
	}
	b := open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Secrets: secret("the secret of the zone"), Join: []Seed{a.seed(t)}})
	awaitMembers(t, 2, a, b)
}

// A secret is replaced in three steps while the zone runs.
func TestSecretIsReplaced(t *testing.T) {
	const old, fresh = "the first secret of it", "the second secret of it"
	var mu sync.Mutex
	now := make(map[string][]string)
	secrets := func(host string) func() ([]string, error) {
		return func() ([]string, error) {
			mu.Lock()
			defer mu.Unlock()
			if now[host] == nil {
				return nil, errors.New("no secret")
			}
			return now[host], nil
		}
	}
	set := func(host string, s ...string) {
		mu.Lock()
		defer mu.Unlock()
		now[host] = s
	}
	set("a", old)
	set("b", old)
	a := open(t, Options{Name: "a", Store: newTestStore(t, blockmap.CacheOptions{}), Secrets: secrets("a")})
	b := open(t, Options{Name: "b", Store: newTestStore(t, blockmap.CacheOptions{}), Secrets: secrets("b"), Join: []Seed{a.seed(t)}})
	awaitMembers(t, 2, a, b)
	for _, step := range [][]string{{old, fresh}, {fresh, old}, {fresh}} {
		for host, z := range map[string]*Zone{"a": a, "b": b} {
			set(host, step...)
			z.members.updateKeys()
			want, err := gossipKeys(testZone, secrets(host))
			if err != nil {
				t.Fatal(err)
			}
			if got := z.members.keyring; !slices.Equal(got.GetPrimaryKey(), want[0]) || len(got.GetKeys()) != len(want) {
				t.Errorf("%s: %v: it has other keys", host, step)
			}
			st := z.Status()
			if st.Alone {
				t.Errorf("%s is alone after %v", host, step)
			}
		}
	}
	set("c", fresh)
	c := open(t, Options{Name: "c", Store: newTestStore(t, blockmap.CacheOptions{}), Secrets: secrets("c"), Join: []Seed{a.seed(t)}})
	awaitMembers(t, 3, a, b, c)
}

// What gossip says of a member is not believed if it cannot be one.
func TestImpossibleMembers(t *testing.T) {
	const here, lan, link = "127.0.0.1", "10.0.0.1", "169.254.7.7"
	for _, c := range []struct {
		self, name, ip string
		port           uint16
		loopback       bool
		ok             bool
	}{
		{here, "a", "127.0.0.1", 7946, true, true}, {here, "a", "192.0.2.1", 7946, true, false}, {lan, "a", "192.0.2.1", 7946, false, true}, {here, "a", "::1", 7946, true, true},
		{here, "a,b", "127.0.0.1", 7946, true, false}, {here, "", "127.0.0.1", 7946, true, false}, {here, "a", "127.0.0.1", 0, true, false}, {lan, "a", "0.0.0.0", 7946, false, false},
		{lan, "a", "224.0.0.1", 7946, false, false}, {lan, "a", "255.255.255.255", 7946, false, false}, {lan, "a", "::ffff:255.255.255.255", 7946, false, false},
		{here, "a\r\nb", "127.0.0.1", 7946, true, false}, {here, strings.Repeat("a", 254), "127.0.0.1", 7946, true, false},
		// Addresses that each host has for itself.
		{lan, "a", "127.0.0.1", 22, false, false}, {lan, "a", "::1", 22, false, false}, {lan, "a", "::ffff:127.0.0.1", 22, false, false}, {here, "a", "127.0.0.1", 22, false, true},
		{lan, "a", "169.254.169.254", 80, false, false}, {lan, "a", "fe80::1", 80, false, false}, {link, "a", "169.254.7.8", 7946, false, true}, {here, "a", "10.0.0.2", 7946, false, true},
	} {
		n := &memberlist.Node{Name: c.name, Addr: netip.MustParseAddr(c.ip).AsSlice(), Port: c.port}
		if err := (alive{new(members), netip.MustParseAddr(c.self), c.loopback}).NotifyAlive(n); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if (alive{new(members), netip.MustParseAddr(lan), false}).NotifyAlive(&memberlist.Node{Name: "a", Addr: []byte{1, 2, 3}, Port: 1}) == nil {
		t.Error("an address of three bytes")
	}
}

// A member that announces any number of others has a host take no more than it has room for.
func TestManyMembersAreBounded(t *testing.T) {
	m := &members{log: slog.New(slog.DiscardHandler), kick: make(chan struct{}, 1)}
	m.mu.all = make(map[string]Member)
	a := alive{m, netip.MustParseAddr("10.0.0.1"), false}
	node := func(i int) *memberlist.Node {
		return &memberlist.Node{Name: fmt.Sprint("host-", i), Addr: []byte{10, 1, 2, 3}, Port: 7946}
	}
	for i := range maxMembers + 100 {
		if err := a.NotifyAlive(node(i)); (err == nil) != (i < maxMembers) {
			t.Fatalf("%d: %v", i, err)
		} else if err == nil {
			m.NotifyJoin(node(i))
		}
	}
	if err := a.NotifyAlive(node(7)); err != nil {
		t.Errorf("one that is a member: %v", err)
	}
	m.NotifyLeave(node(7))
	if err := a.NotifyAlive(node(maxMembers + 7)); err != nil {
		t.Errorf("one has left: %v", err)
	}
}

func TestParseSeed(t *testing.T) {
	for s, want := range map[string]string{
		"10.0.0.1:7946": "10.0.0.1:7946", "10.0.0.1": "10.0.0.1:9", "[::1]:7946": "[::1]:7946", "::1": "[::1]:9", "localhost:7": "127.0.0.1:7", "dns:localhost": "127.0.0.1:9",
		"": "", "dns:": "", "file:": "", "10.0.0.1:0": "", "10.0.0.1:70000": "", "host:x": "", "a b": "", "a/b:1": "", "dns:a:b": "",
	} {
		seed, err := ParseSeed(s)
		if (err == nil) != (want != "") {
			t.Errorf("%q: %v", s, err)
		}
		if err != nil {
			continue
		}
		if seed.String() != s {
			t.Errorf("%q becomes %q", s, seed)
		}
		got, err := seed.addresses(t.Context(), 9)
		if err != nil || !slices.Contains(got, netip.MustParseAddrPort(want)) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func FuzzSeeds(f *testing.F) {
	for _, s := range []string{"", "# no\n\n10.0.0.1:7946\nhost.example # here", "a b", "[::1]:7946", "dns:x", strings.Repeat("a\n", 100)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		lines, err := parseSeeds("hosts", b)
		if err != nil {
			return
		}
		for _, l := range lines {
			if host, _, err := splitAddress(l); err != nil || host == "" {
				t.Errorf("%q: %v", l, err)
			}
		}
		if secrets, err := parseSecrets(b); err == nil && (len(secrets) == 0 || len(secrets) > maxSecrets) {
			t.Errorf("%d secrets", len(secrets))
		}
	})
}
