package zone

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/time/rate"
)

// Member is a host of the zone.
type Member struct {
	Name string
	Addr string // HOST:PORT of its server
}

// members knows who is in the zone. memberlist finds out who has joined and who has left
// or died; the seeds say where to find the first others, and those behind a partition that
// is over.
type members struct {
	self    Member
	port    uint16
	seeds   []Seed
	changed func([]Member) // called when members have come or gone, this host included
	log     *slog.Logger
	list    *memberlist.Memberlist
	keys    func() ([][]byte, error) // the newest secrets; nil: none
	keyring *memberlist.Keyring

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	kick   chan struct{}  // members have come or gone
	hurry  chan struct{}  // so many have gone that it may be a partition
	warned rate.Sometimes // of gossip that cannot be read

	mu struct {
		sync.Mutex
		all     map[string]Member
		alone   bool
		told    int   // how many members there were when tell was last called
		failed  error // why nobody can be joined
		settled bool  // the first round of seeds is over
		stale   error // of keys
	}
}

// How often members look for others: often while there are none.
const (
	joinFirst   = 250 * time.Millisecond
	joinAlone   = 5 * time.Second
	joinEvery   = 10 * time.Second
	joinTime    = 5 * time.Second // of a look-up
	joinRound   = time.Minute     // of all tries, until somebody is found
	joinsAtOnce = 8
	leaveTime   = time.Second
	// maxJoinErrors bounds what an error tells.
	maxJoinErrors = 3
	// settleTime is how long members collect changes before they tell of them.
	settleTime = 50 * time.Millisecond
)

// membersOptions are the settings of members.
type membersOptions struct {
	zone      string
	self      Member
	transport *transport
	seeds     []Seed
	keys      func() ([][]byte, error)
	changed   func([]Member)
	log       *slog.Logger
	timing    func(*memberlist.Config) // for tests
}

func newMembers(o membersOptions) (*members, error) {
	m := &members{
		self: o.self, port: o.transport.at.Port(), seeds: o.seeds, changed: o.changed, log: o.log, keys: o.keys,
		kick: make(chan struct{}, 1), hurry: make(chan struct{}, 1), warned: rate.Sometimes{Interval: time.Minute},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.mu.all = map[string]Member{o.self.Name: o.self}
	m.mu.alone = true
	c := memberlist.DefaultLANConfig()
	loopback := o.transport.credentials == nil
	if loopback {
		c = memberlist.DefaultLocalConfig()
	}
	c.Name, c.Label = o.self.Name, "thaw "+o.zone
	c.Transport, c.BindPort, c.AdvertisePort = o.transport, int(m.port), int(m.port)
	c.Logger = log.New(m, "", 0)
	c.Events, c.Alive, c.Conflict = m, alive{m, o.transport.at.Addr(), loopback}, m
	// A host that was moved, or made anew, has its name again after this time.
	c.DeadNodeReclaimTime = 30 * time.Second
	c.RequireNodeNames = false // the seeds have none
	if o.keys != nil {
		keys, err := o.keys()
		if err == nil {
			m.keyring, err = memberlist.NewKeyring(keys, keys[0])
		}
		if err != nil {
			return nil, err
		}
		c.Keyring = m.keyring
	}
	if o.timing != nil {
		o.timing(c)
	}
	var err error
	if m.list, err = memberlist.Create(c); err != nil {
		return nil, fmt.Errorf("join the zone: %w", err)
	}
	m.tell()
	m.wg.Go(m.join)
	m.wg.Go(m.watch)
	return m, nil
}

// close leaves the zone.
func (m *members) close() {
	m.cancel()
	_ = m.list.Leave(leaveTime) // the others find out by themselves
	_ = m.list.Shutdown()
	m.wg.Wait()
}

// snapshot returns the members by name, this host included.
func (m *members) snapshot() []Member {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Member, 0, len(m.mu.all))
	for _, x := range m.mu.all {
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// alone returns whether there is no other member, and why if that is known.
func (m *members) alone() (alone bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.mu.all) <= 1, m.mu.failed
}

// NotifyJoin implements memberlist.EventDelegate.
func (m *members) NotifyJoin(n *memberlist.Node) { m.set(n) }

// NotifyUpdate implements memberlist.EventDelegate.
func (m *members) NotifyUpdate(n *memberlist.Node) { m.set(n) }

// NotifyLeave implements memberlist.EventDelegate.
func (m *members) NotifyLeave(n *memberlist.Node) {
	if n.Name == m.self.Name {
		return
	}
	m.mu.Lock()
	delete(m.mu.all, n.Name)
	m.mu.Unlock()
	m.log.Debug("a member of the zone has left", "peer", n.Name)
	m.signal()
}

func (m *members) set(n *memberlist.Node) {
	if n.Name == m.self.Name {
		return
	}
	m.mu.Lock()
	m.mu.all[n.Name] = Member{n.Name, n.Address()}
	m.mu.Unlock()
	m.log.Debug("a host has joined the zone", "peer", n.Name, "address", n.Address())
	m.signal()
}

// NotifyConflict implements memberlist.ConflictDelegate.
func (m *members) NotifyConflict(existing, other *memberlist.Node) {
	m.warned.Do(func() {
		m.log.Warn("two hosts have the same name in the zone; give each a name of its own", "name", existing.Name, "address", existing.Address(), "other", other.Address())
	})
}

// maxMembers bounds the members that a host knows. Each of them takes memory, and time for
// each run whose owner is looked up; a single one can announce any number of others.
const maxMembers = 32 << 10

// alive refuses members that cannot be ones.
type alive struct {
	of       *members
	self     netip.Addr
	loopback bool // there is no TLS
}

// NotifyAlive implements memberlist.AliveDelegate.
func (a alive) NotifyAlive(n *memberlist.Node) error {
	ip, ok := netip.AddrFromSlice(n.Addr)
	ip = ip.Unmap()
	switch {
	case !ValidName(n.Name):
		return errors.New("it has no name that a member can have")
	case !ok || n.Port == 0 || ip.IsUnspecified() || ip.IsMulticast() || ip == broadcast:
		return errors.New("it has no address that a member can have")
	case a.loopback && !ip.IsLoopback():
		return errExposed
	case ip.IsLoopback() && !a.self.IsLoopback(), ip.IsLinkLocalUnicast() && !a.self.IsLinkLocalUnicast():
		// This host would connect to services of its own, or of its link: those of a cloud
		// that tell a host its secrets are there.
		return errors.New("its address, loopback or link-local, means another machine on each host")
	}
	return a.of.room(n.Name)
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// room fails if there are too many members for one more of that name.
func (m *members) room(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.mu.all[name]; !known && len(m.mu.all) >= maxMembers {
		return fmt.Errorf("the zone has %d members already", maxMembers)
	}
	return nil
}

// signal says that members have come or gone. memberlist holds its locks.
func (m *members) signal() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// watch tells of changes. When a zone starts, or is partitioned, there are thousands at
// once.
func (m *members) watch() {
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.kick:
		}
		t := time.NewTimer(settleTime)
		select {
		case <-m.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		m.tell()
	}
}

// tell says who is a member now, and logs whether this host is alone.
func (m *members) tell() {
	all := m.snapshot()
	m.mu.Lock()
	was, before := m.mu.alone, m.mu.told
	m.mu.alone, m.mu.told = len(all) <= 1, len(all)
	m.mu.Unlock()
	if len(all) <= before/2 {
		select {
		case m.hurry <- struct{}{}:
		default:
		}
	}
	switch {
	case was && len(all) > 1:
		m.log.Info("joined the zone", "members", len(all))
	case !was && len(all) <= 1:
		m.log.Warn("no other member of the zone can be reached; this host works alone, and asks the registry for everything")
	}
	m.changed(all)
}

// join looks for others, until the end.
func (m *members) join() {
	wait := joinFirst
	warned := make(map[string]bool)
	for {
		m.round(warned)
		m.updateKeys()
		alone, err := m.alone()
		m.mu.Lock()
		first := !m.mu.settled
		m.mu.settled = true
		m.mu.Unlock()
		if first && alone && len(m.seeds) > 0 {
			m.log.Warn("no other member of the zone can be reached; this host works alone until one can", "err", err)
		}
		if alone && len(m.seeds) > 0 {
			wait = min(2*wait, joinAlone)
		} else {
			wait = joinEvery
		}
		// Hosts that start at once do not ask at once.
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-m.ctx.Done():
			t.Stop()
			return
		case <-m.hurry:
			t.Stop()
			wait = joinFirst
		case <-t.C:
		}
	}
}

// round tries addresses of the seeds that are not those of members at present. A member that is
// behind a partition is found again in this way.
func (m *members) round(warned map[string]bool) {
	known := make(map[string]bool)
	for _, x := range m.snapshot() {
		known[x.Addr] = true
	}
	alone := len(known) <= 1
	var found []string
	var errs []error
	for _, s := range m.seeds {
		ctx, cancel := context.WithTimeout(m.ctx, joinTime)
		all, err := s.addresses(ctx, m.port)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s, err))
			if !warned[s.String()] && m.ctx.Err() == nil {
				m.log.Warn("cannot find out where the members of the zone are", "join", s.String(), "err", err)
			}
		}
		warned[s.String()] = err != nil
		for _, a := range all {
			if !known[a.String()] {
				known[a.String()] = true
				found = append(found, a.String())
			}
		}
	}
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	// Who is a member already tries a few of those that are none. Who is alone tries one
	// address after the other until somebody is there: most may be those of hosts that are gone.
	if !alone {
		found = found[:min(len(found), joinsAtOnce)]
	}
	next := make(chan string)
	ctx, cancel := context.WithTimeout(m.ctx, joinRound)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range min(len(found), joinsAtOnce) {
		wg.Go(func() {
			for addr := range next {
				_, err := m.list.Join([]string{addr})
				mu.Lock()
				if err == nil && alone {
					cancel()
				}
				if err != nil && len(errs) < maxJoinErrors {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	for _, addr := range found {
		select {
		case next <- addr:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	wg.Wait()
	err := errors.Join(errs...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.failed = err
}

// updateKeys takes over new secrets.
func (m *members) updateKeys() {
	if m.keyring == nil {
		return
	}
	keys, err := m.keys()
	if err != nil {
		return // whoever reads the file says so
	}
	for _, k := range keys {
		if err := m.keyring.AddKey(k); err != nil {
			return
		}
	}
	_ = m.keyring.UseKey(keys[0])
	for _, k := range m.keyring.GetKeys() {
		if !slices.ContainsFunc(keys, func(x []byte) bool { return string(x) == string(k) }) {
			_ = m.keyring.RemoveKey(k)
		}
	}
}

// Write takes a line of memberlist's log. Peers, and others who send packets, can cause any
// number of lines.
func (m *members) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if strings.Contains(text, "ecrypt") || strings.Contains(text, "label") {
		m.warned.Do(func() {
			m.log.Warn("gossip cannot be read: another zone, or another --zone-secret", "err", shortened(text))
		})
	}
	m.log.Debug(shortened(text))
	return len(line), nil
}
