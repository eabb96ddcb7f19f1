package zone

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// Client asks peers for chunks and for pieces of blobs. It believes nothing that they
// say: lengths must be those that were asked for, headers are bounded, and a peer that
// does not answer or trickles is given up. It is safe for concurrent use.
//
// It speaks HTTP/1.1, one request at a time on a connection. A body of HTTP/2 passes through
// three goroutines of net/http and a buffer of its own on its way: a leaf took a third longer,
// and a chunk a sixth more of the processor. Without TLS it connects to loopback addresses
// only.
type Client struct {
	o         ClientOptions
	scheme    string
	transport *http.Transport
	stored    atomic.Int64 // bytes that have come as the registry has them

	ctx  context.Context // of requests that were given up
	stop context.CancelFunc
	wg   sync.WaitGroup
	mu   struct {
		sync.Mutex
		closed bool
	}
}

// ClientOptions are the settings of a Client. Zero durations mean the default.
type ClientOptions struct {
	Self, Zone string // names of this host and of the zone
	// Address returns HOST:PORT of a peer, or false if there is no such member.
	Address func(peer string) (addr string, ok bool)
	// TLS returns the settings of a connection to a peer, which must verify the peer's
	// name; nil for no TLS.
	TLS func(peer string) *tls.Config

	// To connect, with the handshake. It defaults to 2 s. A request does not wait for that
	// longer than for its first sign.
	Dial time.Duration
	// To the answer, or from one sign that it will come to the next, at most: a Router gives
	// peers less. It defaults to 2 s.
	FirstSign time.Duration
	Answer    time.Duration // to the answer in all; defaults to AnswerTime
	Stall     time.Duration // in which a body must bring LeastBytes; defaults to 2 s
	Body      time.Duration // for all of a body; defaults to 20 s
}

const (
	// leastBytes is how much a body must bring in each ClientOptions.Stall.
	leastBytes = 64 << 10
	// maxHeader bounds the header of an answer.
	maxHeader = 16 << 10
	// maxText bounds what is read of an answer that is a refusal, and textTime how long that
	// may take.
	maxText  = 512
	textTime = time.Second
	// maxSigns bounds the answers before the answer: a peer that works sends one each
	// SignEvery. net/http bounds their size, and not how many there are.
	maxSigns = 4 * int(AnswerTime/SignEvery)
	// maxHealth bounds what a peer says of its health.
	maxHealth = 64 << 10
	// maxConns bounds the connections to a peer, and maxIdle those that wait for a request.
	maxConns = 64
	maxIdle  = 8
)

// NewClient makes a Client. The caller closes it.
func NewClient(o ClientOptions) *Client {
	o.Dial = cmp.Or(o.Dial, 2*time.Second)
	o.FirstSign = cmp.Or(o.FirstSign, 2*time.Second)
	o.Answer = cmp.Or(o.Answer, AnswerTime)
	o.Stall = cmp.Or(o.Stall, 2*time.Second)
	o.Body = cmp.Or(o.Body, 20*time.Second)
	c := &Client{o: o, scheme: "http"}
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.transport = &http.Transport{
		DialContext:            c.dial,
		DisableCompression:     true,
		MaxIdleConns:           1024,
		MaxIdleConnsPerHost:    maxIdle,
		MaxConnsPerHost:        maxConns,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: maxHeader,
		Protocols:              new(http.Protocols),
	}
	c.transport.Protocols.SetHTTP1(true)
	if o.TLS != nil {
		c.scheme = "https"
		c.transport.DialTLSContext = c.dialTLS
	}
	return c
}

// Close closes the connections that are not in use, and ends what is left of requests that
// were given up.
func (c *Client) Close() {
	c.mu.Lock()
	c.mu.closed = true
	c.mu.Unlock()
	c.stop()
	c.wg.Wait()
	c.transport.CloseIdleConnections()
}

// Names of peers are not always names of hosts as URLs have them, so the host of a URL is
// the name in hexadecimal.
func hostOf(peer string) string { return hex.EncodeToString([]byte(peer)) }

func (c *Client) dial(ctx context.Context, network, hostport string) (net.Conn, error) {
	_, conn, err := c.connect(ctx, network, hostport)
	return conn, err
}

func (c *Client) connect(ctx context.Context, network, hostport string) (peer string, conn net.Conn, err error) {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		return "", nil, err
	}
	name, err := hex.DecodeString(host)
	if err != nil {
		return "", nil, err
	}
	peer = string(name)
	addr, ok := c.o.Address(peer)
	if !ok {
		return "", nil, fmt.Errorf("%s is not a member of the zone", peer)
	}
	if c.o.TLS == nil {
		if err := loopback(addr); err != nil {
			return "", nil, err
		}
	}
	conn, err = (&net.Dialer{Timeout: c.o.Dial}).DialContext(ctx, network, addr)
	return peer, conn, err
}

// loopback fails if an address is not one of this host.
func loopback(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("cannot connect to %s without TLS, because it is not a loopback address", addr)
	}
	return nil
}

func (c *Client) dialTLS(ctx context.Context, network, hostport string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.Dial)
	defer cancel()
	peer, conn, err := c.connect(ctx, network, hostport)
	if err != nil {
		return nil, err
	}
	config := c.o.TLS(peer)
	if config == nil {
		conn.Close()
		return nil, errors.New("there is no certificate")
	}
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"}
	tlsConn := tls.Client(conn, config)
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, &handshakeError{err}
	}
	return tlsConn, nil
}

// handshakeError is a TLS handshake that failed.
type handshakeError struct{ err error }

func (e *handshakeError) Error() string { return "TLS handshake: " + e.err.Error() }
func (e *handshakeError) Unwrap() error { return e.err }

// PeerError is an answer of a peer, or the lack of one.
type PeerError struct {
	Peer    string
	Outcome Outcome
	Err     error
}

func (e *PeerError) Error() string { return fmt.Sprintf("peer %s: %v", e.Peer, e.Err) }
func (e *PeerError) Unwrap() error { return e.Err }

var (
	errNoAnswer = errors.New("it does not answer")
	errTrickles = errors.New("it sends hardly any bytes")
	errSigns    = errors.New("it sends too many signs that it will answer")
)

// ChunksAsk says which chunks a Client asks for.
type ChunksAsk struct {
	Stream      blockmap.Digest
	First, Last int
	Size        int64 // of all of them, uncompressed
	// Of a single chunk: the bytes that it has in the registry, if it is also taken in that
	// form, and the leaves that are wanted first, which are neighbours. 0 is for neither.
	Stored int64
	Leaves blockmap.LeafSet
}

// Chunks asks a peer for chunks. The body has their contents, in the form that Body.Form
// says, and not verified. owner says that the peer is asked as their owner.
func (c *Client) Chunks(ctx context.Context, peer, image string, a ChunksAsk, owner bool) (*Body, error) {
	q := c.query(image, owner)
	if a.Stored > 0 {
		q.Set("stored", strconv.FormatInt(a.Stored, 10))
	}
	if e := leavesOf(a.Leaves, a.Size); e.Len() > 0 {
		q.Set("leaves", fmt.Sprintf("%d-%d", e.Start/blockmap.LeafSize, (e.End-1)/blockmap.LeafSize))
	}
	length := func(x form) (n int64, ok bool) {
		return x.length(a.Size, a.Stored, a.Leaves), (!x.stored || a.Stored > 0) && (!x.leaves || a.Leaves != 0)
	}
	b, err := c.get(ctx, peer, fmt.Sprintf("/v1/streams/%s/chunks/%d-%d", a.Stream, a.First, a.Last), q, length)
	if err == nil && b.form.leaves {
		b.leaves = a.Leaves
	}
	return b, err
}

// Piece asks a peer for n bytes of a blob from off on.
func (c *Client) Piece(ctx context.Context, peer, image string, blob blockmap.Digest, off, n int64, owner bool) (*Body, error) {
	b, err := c.get(ctx, peer, fmt.Sprintf("/v1/blobs/%s/%d-%d", blob, off, off+n), c.query(image, owner), func(x form) (int64, bool) { return n, x == form{} })
	if err == nil {
		b.compressed = true
	}
	return b, err
}

func (c *Client) query(image string, owner bool) url.Values {
	q := url.Values{"image": {image}, "zone": {c.o.Zone}, "from": {c.o.Self}}
	if owner {
		q.Set("origin", "1")
	}
	return q
}

// Health asks a peer how it is, and returns its JSON.
func (c *Client) Health(ctx context.Context, peer string) ([]byte, error) {
	b, err := c.get(ctx, peer, "/v1/health", url.Values{"zone": {c.o.Zone}, "from": {c.o.Self}}, func(x form) (int64, bool) { return -1, x == form{} })
	if err != nil {
		return nil, err
	}
	defer b.Close()
	p, err := io.ReadAll(io.LimitReader(b, maxHealth+1))
	if err == nil && len(p) > maxHealth {
		err = errors.New("its answer is too long")
	}
	if err != nil {
		return nil, fmt.Errorf("health of peer %s: %w", peer, err)
	}
	return p, nil
}

// get sends a request. length returns the length that an answer of a form must have, -1 for
// any, and whether that form was asked for. Each error that get returns is a PeerError.
func (c *Client) get(ctx context.Context, peer, path string, query url.Values, length func(form) (n int64, ok bool)) (*Body, error) {
	began := time.Now()
	if !ValidName(peer) {
		return nil, &PeerError{peer, Outcome{Result: Broken}, errors.New("it has no valid name")}
	}
	// The request outlives its caller for a moment if it is given up without a sign of life.
	told, _ := ctx.Value(signsKey{}).(*signs)
	asked, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	leave := context.AfterFunc(ctx, func() { stop(context.Cause(ctx)) })
	cancel := func(cause error) {
		leave()
		stop(cause)
	}
	w := newWatch(&c.o, told, began, func() { stop(errNoAnswer) })
	signed := make(chan struct{}, 1)
	count := 0
	traced := httptrace.WithClientTrace(asked, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if count++; count > maxSigns {
				return errSigns
			}
			if code == http.StatusProcessing && w.sign(false) {
				select {
				case signed <- struct{}{}:
				default:
				}
			}
			return nil
		},
	})
	req := (&http.Request{
		Method: http.MethodGet,
		URL:    &url.URL{Scheme: c.scheme, Host: hostOf(peer), Path: path, RawQuery: query.Encode()},
		Host:   "thaw-zone",
		Header: http.Header{"User-Agent": {"thaw"}},
	}).WithContext(traced)
	done := make(chan answered, 1)
	go func() {
		resp, err := c.transport.RoundTrip(req)
		done <- answered{resp, err}
	}()
	var came answered
	select {
	case came = <-done:
	case <-w.overdue:
		if w.giveUp() {
			leave()
			c.linger(w, done, signed, stop)
			return nil, &PeerError{peer, Outcome{Result: Late, Silent: true, Took: time.Since(began)}, errNoAnswer}
		}
		came = <-done
	}
	resp, err := came.resp, came.err
	if err == nil {
		w.sign(true)
	}
	silent, longest := w.stop()
	if err != nil {
		failed := c.failed(asked, peer, err, began)
		failed.Outcome.Silent = silent
		cancel(nil)
		return nil, failed
	}
	if resp.StatusCode != http.StatusOK {
		late := time.AfterFunc(textTime, func() { stop(errTrickles) })
		refused := c.refused(resp, peer, began)
		late.Stop()
		resp.Body.Close()
		cancel(nil)
		return nil, refused
	}
	as, known := parseForm(resp.Header)
	n, wanted := length(as)
	switch {
	case !known || !wanted || resp.Header.Get("Content-Encoding") != "":
		err = errors.New("its answer has a form that was not asked for")
	case n >= 0 && resp.ContentLength != n:
		err = fmt.Errorf("its answer has %d bytes instead of %d", resp.ContentLength, n)
	}
	if err != nil {
		resp.Body.Close()
		cancel(nil)
		return nil, &PeerError{peer, Outcome{Result: Broken, Took: time.Since(began)}, err}
	}
	return &Body{client: c, peer: peer, body: resp.Body, form: as, compressed: as.stored, ctx: asked, cancel: cancel, began: began, n: n, waited: time.Since(began), longest: longest}, nil
}

// failed returns the error of a request without an answer.
func (c *Client) failed(ctx context.Context, peer string, err error, began time.Time) *PeerError {
	o := Outcome{Result: Broken, Took: time.Since(began)}
	var handshake *handshakeError
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errNoAnswer), errors.Is(cause, errTrickles):
		o.Result, err = Late, cause
	case cause != nil:
		o.Result, err = Cancelled, cause
	case errors.As(err, &handshake):
		o.Result = Refused
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, context.DeadlineExceeded) {
			o.Result = Late
		}
	}
	return &PeerError{peer, o, err}
}

// refused returns the error of an answer without what was asked for.
func (c *Client) refused(resp *http.Response, peer string, began time.Time) error {
	o := Outcome{Took: time.Since(began)}
	switch resp.StatusCode {
	case http.StatusNotFound:
		o.Result = Absent
	case http.StatusForbidden, http.StatusUnauthorized:
		o.Result = Refused
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		o.Result = Busy
		o.Holders = ParseHolders(resp.Header.Get("Thaw-Holders"))
		o.RetryAfter = retryAfter(resp.Header.Get("Retry-After"))
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		o.Result = Absent // the registry failed, and not the peer
	default:
		o.Result = Broken
	}
	// Not all of a long text is read, and the connection is closed then. An answer that
	// changes the protocol has no end, and nothing ends a Read of it.
	var text []byte
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, _ = io.ReadAll(io.LimitReader(resp.Body, maxText))
	}
	err := fmt.Errorf("it answers %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	if t := printable(string(text)); t != "" {
		err = fmt.Errorf("%w: %s", err, t)
	}
	return &PeerError{peer, o, err}
}

// retryAfter parses a Retry-After header field; it is 0 if there is none.
func retryAfter(field string) time.Duration {
	n, err := strconv.ParseInt(strings.TrimSpace(field), 10, 32)
	if err != nil || n < 0 {
		return 0
	}
	return time.Duration(n) * time.Second
}

// printable returns the text without control characters.
func printable(text string) string {
	return strings.TrimSpace(strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c == '�' {
			return ' '
		}
		return c
	}, text))
}

// Body is what a peer sends. Its bytes are not verified. It is read by one goroutine.
type Body struct {
	client *Client
	peer   string
	body   io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	began  time.Time
	n      int64 // bytes to come in all; -1 if that is not known
	got    int64

	form       form
	leaves     blockmap.LeafSet // that come first
	compressed bool             // the bytes are as the registry has them

	waited   time.Duration // for the answer, and in Read
	longest  time.Duration // pause between two signs, or in Read
	window   time.Duration // the part of it since window bytes were counted anew
	windowed int64
	closed   sync.Once
	over     sync.Once
	distrust sync.Once
	ended    func(Outcome) // called once, with the first outcome; may be nil
	wrong    func()        // called once if the bytes turn out to be wrong after that; may be nil
}

// Source returns the name of the peer.
func (b *Body) Source() string { return b.peer }

// Form says in which form a chunk comes. stored says that it comes as the registry has it,
// and else it comes uncompressed. If leaves are not 0, the digests of all leaves of the chunk
// come first, and then these leaves, uncompressed; and then the rest: all of the chunk in its
// stored form, or else the other leaves in their order.
func (b *Body) Form() (stored bool, leaves blockmap.LeafSet) { return b.form.stored, b.leaves }

// Read reads as io.Reader does. It fails with a PeerError, and with io.ErrUnexpectedEOF
// in it if the peer has sent too little. Only the time in Read counts for the bounds: a
// caller may make pauses.
func (b *Body) Read(p []byte) (int, error) {
	if b.n >= 0 && b.got == b.n {
		return 0, io.EOF
	}
	o := &b.client.o
	left := min(o.Stall-b.window, o.Answer+o.Body-b.waited)
	began := time.Now()
	t := time.AfterFunc(left, func() { b.cancel(errTrickles) })
	n, err := b.body.Read(p)
	t.Stop()
	took := time.Since(began)
	b.waited += took
	b.longest = max(b.longest, took)
	b.window += took
	b.got += int64(n)
	if b.windowed += int64(n); b.windowed >= leastBytes {
		b.window, b.windowed = 0, 0
	}
	if b.n >= 0 && b.got == b.n {
		b.end(Outcome{Result: Served})
		return n, nil
	}
	if err == io.EOF && b.n < 0 {
		return n, err
	}
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		failed := b.client.failed(b.ctx, b.peer, err, b.began)
		b.end(failed.Outcome)
		return n, failed
	}
	return n, nil
}

// Distrust records that the bytes are wrong.
func (b *Body) Distrust() {
	b.distrust.Do(func() {
		if !b.end(Outcome{Result: Wrong}) && b.wrong != nil {
			b.wrong()
		}
	})
}

// Close ends the request. What is not read yet is not waited for.
func (b *Body) Close() error {
	b.closed.Do(func() {
		b.end(Outcome{Result: Cancelled})
		b.cancel(nil)
		b.body.Close()
	})
	return nil
}

// end reports the outcome, and whether it is the first one. Others do not count.
func (b *Body) end(o Outcome) (first bool) {
	b.over.Do(func() {
		first = true
		o.Bytes, o.Took, o.Quiet = b.got, b.waited, b.longest
		if b.compressed {
			b.client.stored.Add(b.got)
		}
		if b.ended != nil {
			b.ended(o)
		}
	})
	return first
}
