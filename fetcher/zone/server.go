package zone

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// Store is what a zone asks of its host, on behalf of peers.
type Store interface {
	// Allows fails with ErrAbsent if peers may not have this host open the image. It does no
	// I/O.
	Allows(image string) error
	// Stream finds a stream of an image, and opens the image's index if needed. The caller
	// calls release when it does not use the stream any more. It fails with ErrAbsent if
	// the image has no such stream, if peers may not have this host open the image, or if
	// peers have it open too many images.
	Stream(ctx context.Context, image string, stream blockmap.Digest) (s StoredStream, release func(), err error)
	// Blob reads n bytes at off of a blob in the repository of the image, from this host or
	// from the registry. It fails as Stream does.
	Blob(ctx context.Context, image string, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// StoredStream is a stream of an image that a Store has opened.
type StoredStream interface {
	Stream() *blockmap.Stream
	// FetchOwned makes chunks first to last resident. It asks the registry, and never a
	// peer.
	FetchOwned(ctx context.Context, first, last int) error
	// InFlight returns a function that waits for this host's own fetches of the absent ones
	// of chunks first to last. ok is false if one of them is not being fetched.
	InFlight(first, last int) (wait func(context.Context) error, ok bool)
}

// ErrAbsent is the error of a Store that does not have, and will not get, what a peer asks
// for.
var ErrAbsent = errors.New("not to be had from this host")

// Bounds of a server.
const (
	headerTimeout = 5 * time.Second // also of a TLS handshake
	idleTimeout   = 2 * time.Minute
	maxRequest    = 8 << 10 // of a header, in bytes; net/http adds 4 KiB

	maxUploads     = 256 // requests at a time
	maxUploadsPeer = 48  // of these, of one peer

	// AnswerTime bounds how long a member waits for an answer. OriginTime bounds the wait
	// for the registry, so that the one that asks learns that it was the registry that has
	// failed. HolderTime bounds the wait for this host's own fetch from another member: a
	// lie of that member, or a disagreement about who owns what, costs no more.
	AnswerTime = 10 * time.Second
	OriginTime = AnswerTime - time.Second
	HolderTime = time.Second
	// A peer that waits is told that this host is alive after FirstSign, and then each
	// SignEvery.
	FirstSign = 50 * time.Millisecond
	SignEvery = 500 * time.Millisecond
)

// server answers the requests of peers. All are GET. They name things by digest, so there
// is nothing that a peer can change.
type server struct {
	zone, name, version string
	store               Store
	credentials         func() *Credentials // nil: no TLS
	owner               owner
	grants              granter
	pieces              *pieces
	stored              *storedChunks
	traffic             *traffic
	log                 *slog.Logger

	http     *http.Server
	uploads  uploads
	turns    turns
	asked    asked
	owned    owned
	life     context.Context // ends with the server
	die      context.CancelFunc
	handlers sync.WaitGroup

	mu struct {
		sync.Mutex
		stopped bool // no handler begins any more
	}
}

// owner says which runs this host owns. Router is one.
type owner interface{ Owns(run Run) bool }

// granter says who gets a run from this host, and who is sent to others. Grants is one.
type granter interface {
	Ask(run Run, from string, now time.Time) (serve bool, holders []string)
	Done(run Run, from string, ok bool, now time.Time)
}

// asked counts requests by their ends.
type asked struct {
	served, referred, absent, refused, busy, failed atomic.Int64
}

// connState is what a server knows of a connection.
type connState struct {
	sync.Mutex
	by    *Credentials // that the peer's certificate was verified with
	party string
	conn  *conn // below TLS; nil without it
}

type connStateKey struct{}

func (s *server) start(l *listener, gossip func(net.Conn)) {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(s.credentials != nil)
	s.life, s.die = context.WithCancel(context.Background())
	s.uploads.by, s.turns = make(map[string]int), make(turns, writers)
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.answer),
		ReadHeaderTimeout:            headerTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxRequest,
		DisableGeneralOptionsHandler: true,
		Protocols:                    &protocols,
		HTTP2:                        &http.HTTP2Config{MaxConcurrentStreams: maxUploadsPeer, MaxReadFrameSize: 16 << 10, SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			st := new(connState)
			if _, ok := c.(*tls.Conn); ok {
				st.conn = connOf(c)
			}
			return context.WithValue(ctx, connStateKey{}, st)
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			x := connOf(c)
			switch {
			case x == nil:
			case state == http.StateActive: // after the handshake, in which a peer shows its certificate
				x.busy()
			case state == http.StateIdle:
				x.idle()
			}
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // peers can cause any number of lines
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){
			gossipProtocol: func(_ *http.Server, c *tls.Conn, _ http.Handler) {
				if x := connOf(c); x != nil {
					x.busy()
				}
				gossip(c)
			},
		},
	}
	serve := func() error { return s.http.Serve(l) }
	if s.credentials != nil {
		s.http.TLSConfig = &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2", "http/1.1", gossipProtocol},
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.credentials().asServer(), nil },
		}
		serve = func() error { return s.http.ServeTLS(l, "", "") }
	}
	l.wg.Go(func() {
		if err := serve(); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.log.Warn("the server of the zone has failed", "err", err)
		}
	})
}

// stop ends the server. Uploads that are under way may take some time.
func (s *server) stop(within time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	s.mu.Lock()
	s.mu.stopped = true
	s.mu.Unlock()
	s.die()
	s.handlers.Wait()
}

// enter begins a handler, which calls handlers.Done when it ends.
func (s *server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.stopped {
		s.handlers.Add(1)
	}
	return !s.mu.stopped
}

// refusal is an answer that is no success.
type refusal struct {
	code    int
	holders []string // 503: who has it
	text    string
}

func (e *refusal) Error() string { return e.text }

func refuse(code int, format string, args ...any) error {
	return &refusal{code: code, text: fmt.Sprintf(format, args...)}
}

// answer answers a request.
func (s *server) answer(w http.ResponseWriter, r *http.Request) {
	if !s.enter() {
		return
	}
	defer s.handlers.Done()
	err := s.serve(w, r)
	if err == nil {
		return
	}
	var x *refusal
	if !errors.As(err, &x) {
		// A part of the body has been sent.
		s.asked.failed.Add(1)
		s.log.Debug("an upload to a peer has ended early", "peer", r.RemoteAddr, "err", err)
		panic(http.ErrAbortHandler)
	}
	switch x.code {
	case http.StatusNotFound:
		s.asked.absent.Add(1)
	case http.StatusServiceUnavailable:
		if len(x.holders) > 0 {
			s.asked.referred.Add(1)
		} else {
			s.asked.busy.Add(1)
		}
		w.Header().Set("Retry-After", "1")
		if len(x.holders) > 0 {
			w.Header().Set("Thaw-Holders", strings.Join(x.holders, ","))
		}
	case http.StatusBadGateway:
		s.asked.failed.Add(1)
	default:
		s.asked.refused.Add(1)
	}
	if x.code == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", "GET")
	}
	c := http.NewResponseController(w)
	if r.ContentLength != 0 { // the body is not read
		w.Header().Set("Connection", "close")
		_ = c.SetReadDeadline(time.Now())
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	text := shortened(x.text) + "\n"
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	_ = c.SetWriteDeadline(time.Now().Add(leastTime))
	w.WriteHeader(x.code)
	_, _ = io.WriteString(w, text)
}

// maxRefusal bounds the text of a refusal, in bytes.
const maxRefusal = 400

// shortened is a text of bounded length without control characters.
func shortened(s string) string {
	if len(s) > maxRefusal {
		s = s[:maxRefusal] + "…"
	}
	return printable(strings.ToValidUTF8(s, "?"))
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) error {
	switch {
	case r.Method != http.MethodGet:
		return refuse(http.StatusMethodNotAllowed, "peers only GET")
	case r.ContentLength != 0:
		return refuse(http.StatusBadRequest, "the request has a body")
	case len(r.URL.Path) > maxPath:
		return refuse(http.StatusRequestURITooLong, "the path has more than %d bytes", maxPath)
	}
	bad := func(err error) error {
		if err == errPath {
			return refuse(http.StatusNotFound, "%v", err)
		}
		return refuse(http.StatusBadRequest, "%v", err)
	}
	switch {
	case r.URL.Path == "/v1/health":
		a, _, err := parseAsk(r, false)
		if err != nil {
			return bad(err)
		}
		if _, err := s.admit(r, a); err != nil {
			return err
		}
		return s.health(w)
	case strings.HasPrefix(r.URL.Path, "/v1/streams/"):
		q, err := parseChunks(r)
		if err != nil {
			return bad(err)
		}
		return s.upload(r, q.ask, func() error { return s.chunks(w, r, q) })
	case strings.HasPrefix(r.URL.Path, "/v1/blobs/"):
		q, err := parsePiece(r)
		if err != nil {
			return bad(err)
		}
		return s.upload(r, q.ask, func() error { return s.piece(w, r, q) })
	}
	return refuse(http.StatusNotFound, "%v", errPath)
}

// admit checks who asks, and returns whom to count the request for. Names of members are
// names in certificates. Without TLS, anybody on this machine can have any name.
func (s *server) admit(r *http.Request, a ask) (party string, err error) {
	if a.zone != s.zone {
		return "", refuse(http.StatusForbidden, "this host is a member of another zone")
	}
	if s.credentials == nil {
		return a.from, nil
	}
	st, _ := r.Context().Value(connStateKey{}).(*connState)
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || st == nil {
		return "", refuse(http.StatusForbidden, "the connection has no certificate of a member")
	}
	leaf := r.TLS.PeerCertificates[0]
	if err := leaf.VerifyHostname(strings.Trim(a.from, "[]")); err != nil {
		return "", refuse(http.StatusForbidden, "the certificate does not have the name %s", a.from)
	}
	// A connection can outlive the certificates that it was made with.
	now := s.credentials()
	st.Lock()
	defer st.Unlock()
	if st.by != now || time.Now().After(leaf.NotAfter) {
		if err := now.verify(r.TLS.PeerCertificates, x509.ExtKeyUsageClientAuth, ""); err != nil {
			return "", refuse(http.StatusForbidden, "the certificate is not valid any more: %v", err)
		}
		sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
		st.by, st.party = now, string(sum[:])
	}
	return st.party, nil
}

// uploads counts the requests under way.
type uploads struct {
	mu  sync.Mutex
	all int
	by  map[string]int
}

func (u *uploads) begin(party string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.all >= maxUploads || u.by[party] >= maxUploadsPeer {
		return false
	}
	u.all++
	u.by[party]++
	return true
}

func (u *uploads) end(party string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all--
	if u.by[party]--; u.by[party] == 0 {
		delete(u.by, party)
	}
}

func (u *uploads) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.all
}

// upload does what a request asks for, if there are not too many.
func (s *server) upload(r *http.Request, a ask, do func() error) error {
	party, err := s.admit(r, a)
	if err != nil {
		return err
	}
	if !s.uploads.begin(party) {
		return refuse(http.StatusServiceUnavailable, "too many requests at a time")
	}
	defer s.uploads.end(party)
	return do()
}

// stored maps an error of the Store.
func stored(err error) error {
	if errors.Is(err, ErrAbsent) {
		return refuse(http.StatusNotFound, "%v", err)
	}
	return refuse(http.StatusBadGateway, "%v", err)
}

// source says where an answer comes from.
type source string

const (
	fromMemory source = "memory"
	fromDisk   source = "disk"
	fromOrigin source = "origin"
)

// ready sends the header of a body of n bytes.
func ready(w http.ResponseWriter, r *http.Request, n int64, from source, as form) *sender {
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	h.Set("Thaw-Source", string(from))
	if as != (form{}) {
		h.Set(formHeader, as.String())
	}
	return newSender(w, r)
}

// chunks sends chunks of a stream, each as soon as it is resident.
func (s *server) chunks(w http.ResponseWriter, r *http.Request, q chunksAsk) error {
	ctx := r.Context()
	var of StoredStream
	var release func()
	// The index of the image may have to come from the registry.
	err := waiting(w, false, func() (err error) {
		of, release, err = s.store.Stream(ctx, q.image, q.stream)
		return err
	})
	if err != nil {
		return stored(err)
	}
	defer func() { release() }()
	u := &chunkUpload{chunksAsk: q, of: of, stream: of.Stream(), memory: s.stored, file: sendsFiles(r), from: fromDisk}
	size, err := u.size()
	if err != nil {
		return err
	}
	run := Run{Of: q.stream, Number: uint32(q.first / RunChunks)}
	u.owns = q.origin || s.owner.Owns(run)
	u.kept = u.takeStored()
	defer func() { u.kept.release() }()
	if !u.allHere() && !u.owns {
		if _, ok := of.InFlight(q.first, q.last); !ok && !u.allHere() {
			return refuse(http.StatusNotFound, "this host does not have the chunks, and does not own them")
		}
	}
	err = s.granted(run, q.from, func() error {
		if u.owns {
			defer s.owned.begin(run)()
		}
		if u.owns && u.first < u.last && !u.allHere() {
			// All of them in one request; the upload then waits for one after the other.
			fetching, cancel := context.WithTimeout(ctx, OriginTime)
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			wg.Go(func() { _ = of.FetchOwned(fetching, q.first, q.last) })
		}
		var to *sender
		for i := q.first; i <= q.last; i++ {
			part, err := u.hold(ctx, i, func(do func() error) error { return waiting(w, to != nil, do) })
			if err != nil && to == nil {
				return err
			}
			if err != nil {
				return errors.New("after " + strconv.FormatInt(to.sent, 10) + " bytes: " + err.Error()) // not a refusal any more
			}
			if to == nil {
				if u.from == fromDisk && part.inMemory() {
					u.from = fromMemory
				}
				first := u.firstLeaves(ctx)
				u.form = form{stored: part.stored != nil, leaves: first != nil}
				to = ready(w, r, u.form.length(size, q.stored, q.leaves), u.from, u.form)
				defer func() { s.traffic.sent(q.from, to.sent, u.form.stored) }()
				if q.stored > 0 {
					s.stored.looked(u.form.stored)
				}
				if err := to.leaves(first); err != nil {
					part.release()
					return err
				}
			}
			if err := s.sendPart(ctx, to, u, i, &part); err != nil {
				return err
			}
		}
		return nil
	})
	if referred(err) && u.owns && !u.allHere() {
		done := release
		release = func() {}
		s.fetchLater(run, func(ctx context.Context) { _ = of.FetchOwned(ctx, q.first, q.last) }, done)
	}
	return err
}

// referred reports whether an error sends the peer to others.
func referred(err error) bool {
	var x *refusal
	return errors.As(err, &x) && len(x.holders) > 0
}

// waiting does what may take long. Until the header has been sent, it tells the peer now
// and then that this host is alive. What takes a moment, as a rule, starts no goroutine.
func waiting(w http.ResponseWriter, begun bool, do func() error) error {
	c := http.NewResponseController(w)
	_ = c.SetWriteDeadline(time.Time{}) // see sender.rest
	if begun {
		return do()
	}
	var mu sync.Mutex // of w, and of what follows
	var t *time.Timer
	over := false
	sign := func() {
		mu.Lock()
		defer mu.Unlock()
		if over {
			return
		}
		_ = c.SetWriteDeadline(time.Now().Add(leastTime))
		w.WriteHeader(http.StatusProcessing)
		_ = c.SetWriteDeadline(time.Time{})
		t.Reset(SignEvery)
	}
	mu.Lock()
	t = time.AfterFunc(FirstSign, sign)
	mu.Unlock()
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		t.Stop()
	}()
	return do()
}

// chunkUpload is chunks on their way to a peer.
type chunkUpload struct {
	chunksAsk
	of     StoredStream
	stream *blockmap.Stream
	memory *storedChunks
	owns   bool
	file   bool         // the connection can take a file
	from   source       // of the first chunk
	form   form         // of the chunk, if only one is asked for
	kept   *storedChunk // taken and not yet held
}

// takeStored returns the chunk in the form in which the registry has it, if the peer takes
// that and it is in memory.
func (u *chunkUpload) takeStored() *storedChunk {
	if u.stored == 0 {
		return nil
	}
	return u.memory.take(chunkKey{stream: u.chunksAsk.stream, chunk: u.first}, u.stored)
}

func (u *chunkUpload) allHere() bool {
	for i := u.first; i <= u.last && u.kept == nil; i++ {
		if !u.stream.Has(i) {
			return false
		}
	}
	return true
}

// hold makes chunk i resident, and pins it.
func (u *chunkUpload) hold(ctx context.Context, i int, wait func(func() error) error) (held, error) {
	waited := false
	// What has come may be evicted before it is pinned.
	for range 4 {
		if u.kept == nil {
			u.kept = u.takeStored()
		}
		if part := (held{stored: u.kept}); part.stored != nil {
			u.kept = nil
			return part, nil
		}
		if u.stream.Has(i) {
			if part, ok := hold(ctx, u.stream, u.stream.ChunkRange(i), u.file); ok {
				return part, nil
			}
		}
		if u.owns {
			fetching, cancel := context.WithTimeout(ctx, OriginTime)
			err := wait(func() error { return u.of.FetchOwned(fetching, i, i) })
			cancel()
			if err != nil {
				return held{}, refuse(http.StatusBadGateway, "%v", err)
			}
			u.from = fromOrigin
			continue
		}
		own, ok := u.of.InFlight(i, i)
		if waited || !ok && !u.stream.Has(i) {
			return held{}, refuse(http.StatusNotFound, "this host does not have the chunks")
		}
		if ok {
			waited = true
			bound, cancel := context.WithTimeout(ctx, HolderTime)
			err := wait(func() error { return own(bound) })
			cancel()
			if err != nil {
				return held{}, refuse(http.StatusNotFound, "this host has not got the chunks in time")
			}
		}
	}
	return held{}, refuse(http.StatusServiceUnavailable, "the cache of this host has no room for the chunks")
}

// size is how many bytes the chunks have.
func (u *chunkUpload) size() (n int64, err error) {
	chunks := u.stream.Table().Chunks
	switch {
	case u.last >= len(chunks):
		return 0, refuse(http.StatusNotFound, "the stream has %d chunks", len(chunks))
	case !chunks[u.first].All().Contains(u.leaves):
		return 0, refuse(http.StatusNotFound, "the chunk has %d leaves", chunks[u.first].Leaves())
	}
	for i := u.first; i <= u.last; i++ {
		n += int64(chunks[i].Size())
	}
	return n, nil
}

// firstLeaves returns the leaves that are to be sent first, or nil if there are none or if
// they are not at hand. The caller sends them.
func (u *chunkUpload) firstLeaves(ctx context.Context) *leavesFirst {
	e := u.leavesRange()
	if e.Len() == 0 || e.Len() > maxFirst {
		return nil
	}
	x := new(leavesFirst)
	if x.digests = u.digests(ctx); x.digests == nil {
		return nil
	}
	var ok bool
	if x.part, ok = hold(ctx, u.stream, e, u.file); !ok {
		return nil
	}
	return x
}

// leavesRange is where the leaves lie in the stream that the peer wants first.
func (u *chunkUpload) leavesRange() blockmap.Extent {
	c := u.stream.ChunkRange(u.first)
	e := leavesOf(u.leaves, c.Len())
	return blockmap.Extent{Start: c.Start + e.Start, End: c.Start + e.End}
}

// rest returns what of chunk i follows in plain form, as ranges of the stream.
func (u *chunkUpload) rest(i int) []blockmap.Extent {
	c := u.stream.ChunkRange(i)
	if !u.form.leaves {
		return []blockmap.Extent{c}
	}
	e := u.leavesRange()
	return []blockmap.Extent{{Start: c.Start, End: e.Start}, {Start: e.End, End: c.End}}
}

// digests returns the digests of all leaves of the chunk, or nil if the chunk is not
// resident or damaged.
func (u *chunkUpload) digests(ctx context.Context) []byte {
	c := &u.stream.Table().Chunks[u.first]
	k := chunkKey{stream: u.chunksAsk.stream, chunk: u.first, digests: true}
	if kept := u.memory.take(k, digestsOf(int64(c.Size()))); kept != nil {
		defer kept.release()
		return kept.bytes // they are few
	}
	v, ok := u.stream.LoadRange(ctx, u.stream.ChunkRange(u.first))
	if !ok {
		return nil
	}
	defer v.Release()
	list, err := leafDigests(&v)
	if err != nil || blockmap.ListDigest(list) != c.Digest {
		return nil
	}
	b := make([]byte, 0, digestsOf(int64(c.Size())))
	for i := range list {
		b = append(b, list[i][:]...)
	}
	u.memory.put(k, b)
	return b
}

// granted sends a run if it is the peer's turn, or else names others that have it.
func (s *server) granted(run Run, from string, send func() error) error {
	serve, holders := s.grants.Ask(run, from, time.Now())
	if !serve {
		return &refusal{code: http.StatusServiceUnavailable, holders: holders, text: "others have it"}
	}
	err := errors.New("it has not ended")
	defer func() { s.grants.Done(run, from, err == nil, time.Now()) }()
	if err = send(); err == nil {
		s.asked.served.Add(1)
	}
	return err
}

// piece sends a piece of a blob.
func (s *server) piece(w http.ResponseWriter, r *http.Request, q pieceAsk) error {
	// What is in memory may be of an image of this host that is not for peers.
	if err := s.store.Allows(q.image); err != nil {
		return stored(err)
	}
	ctx := r.Context()
	key, n := pieceKey{repositoryOf(q.image), q.blob, q.e.Start}, q.e.Len()
	run := Run{Of: q.blob, Number: uint32(q.e.Start / PieceBytes)}
	b, here := s.pieces.find(key, n)
	from := fromMemory
	own := func(ctx context.Context) (err error) {
		defer s.owned.begin(run)()
		b, _, err = s.pieces.get(ctx, key, n, true, func(ctx context.Context) ([]byte, string, error) {
			b, err := s.readPiece(ctx, q)
			return b, "", err
		})
		return err
	}
	bring := func() error {
		fetching, cancel := context.WithTimeout(ctx, OriginTime)
		defer cancel()
		from = fromOrigin
		if err := own(fetching); err != nil {
			return stored(err)
		}
		return nil
	}
	owns := q.origin || s.owner.Owns(run)
	if !here && !owns {
		inFlight, ok := s.pieces.inFlight(key, n)
		if !ok {
			return refuse(http.StatusNotFound, "this host does not have the piece, and does not own it")
		}
		bring = func() (err error) {
			bound, cancel := context.WithTimeout(ctx, HolderTime)
			defer cancel()
			if b, err = inFlight(bound); err != nil {
				return refuse(http.StatusNotFound, "this host has not got the piece in time")
			}
			return nil
		}
	}
	err := s.granted(run, q.from, func() error {
		if !here {
			if err := waiting(w, false, bring); err != nil {
				return err
			}
		}
		to := ready(w, r, int64(len(b)), from, form{})
		defer func() { s.traffic.sent(q.from, to.sent, true) }()
		to.rest()
		done, err := s.turns.take(ctx)
		if err != nil {
			return err
		}
		defer done()
		return to.bytes(b)
	})
	if referred(err) && owns && !here {
		s.fetchLater(run, func(ctx context.Context) { _ = own(ctx) }, func() {})
	}
	return err
}

// sendPart sends chunk i, or what is left of it, when it is its turn. What waits for its
// turn is not pinned in the cache, which may need the room.
func (s *server) sendPart(ctx context.Context, to *sender, u *chunkUpload, i int, part *held) error {
	defer part.release()
	done, ok := s.turns.try()
	if !ok {
		if part.stored == nil {
			part.release()
		}
		to.rest()
		var err error
		if done, err = s.turns.take(ctx); err != nil {
			return err
		}
	}
	defer done()
	if part.stored != nil || ok && !u.form.leaves {
		return to.part(part)
	}
	part.release()
	for _, e := range u.rest(i) {
		if e.Len() == 0 {
			continue
		}
		if *part, ok = hold(ctx, u.stream, e, u.file); !ok {
			return errEvicted
		}
		if err := to.part(part); err != nil {
			return err
		}
		part.release()
	}
	return nil
}

// readPiece reads a piece from the registry.
func (s *server) readPiece(ctx context.Context, q pieceAsk) ([]byte, error) {
	body, err := s.store.Blob(ctx, q.image, q.blob, q.e.Start, q.e.Len())
	if err != nil {
		return nil, err
	}
	defer body.Close()
	b := make([]byte, q.e.Len())
	if _, err := io.ReadFull(body, b); err != nil {
		return nil, fmt.Errorf("read bytes %v of blob %s: %w", q.e, q.blob, err)
	}
	// Only a blob of one piece can be verified; what is in a larger one is verified by those
	// who ask for it.
	if !mayBe(q.blob, q.e.Start, b) {
		return nil, fmt.Errorf("blob %s: the registry has sent %d other bytes", q.blob, len(b))
	}
	return b, nil
}

// Health is what a member tells of itself.
type Health struct {
	Name    string `json:"name"`
	Zone    string `json:"zone"`
	Version string `json:"version,omitempty"`
	Uploads int    `json:"uploads"` // under way
	Sent    int64  `json:"sent_bytes"`
}

func (s *server) health(w http.ResponseWriter) error {
	b, err := json.Marshal(Health{s.name, s.zone, s.version, s.uploads.count(), s.traffic.all.Load()})
	if err != nil {
		return refuse(http.StatusInternalServerError, "%v", err)
	}
	b = append(b, '\n')
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(leastTime))
	_, err = w.Write(b)
	return err
}
