package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// progress shows how a build goes, on stderr. A terminal gets a row for each layer
// that is being worked on and one for the whole build, see [screen]. Anything else
// gets a line when a layer is done, and one at times while none is.
type progress struct {
	layers   []*layerProgress
	from, to string // what reads and pushes wait for

	began  time.Time
	total  meter
	screen *screen      // nil: lines are printed
	log    *slog.Logger // takes the lines if that is not nil
	stop   func()

	mu  sync.Mutex // guards out
	out io.Writer
}

// layerProgress is how far a layer is. Times are in nanoseconds since 1970.
type layerProgress struct {
	number, of int
	digest     string
	size       int64 // of the layer as it is stored

	state atomic.Int32
	read  atomic.Int64
	push  atomic.Int64 // size of the stream; 0 until the layer is converted
	sent  atomic.Int64
	asked atomic.Int64 // since when a read waits for the source; 0: none does
	moved atomic.Int64 // when the target last took bytes of the stream
	rate  meter
}

// The states of a layer.
const (
	queued = iota // or looked up in the target
	underWay
	converted
	reused
)

const (
	// lull is how long nothing may move before a row says what it waits for.
	lull = time.Second
	// lineInterval is the time between lines that say how far the build is.
	lineInterval = 15 * time.Second
)

// newProgress begins to show the build of src, from one place to another. It wraps
// the layers' Open, so as to know what they wait for. It is to be ended.
func newProgress(a *app, log *slog.Logger, src *flatten.Source, from, to registry.Ref) *progress {
	p := &progress{out: a.stderr, from: placeName(from), to: placeName(to), began: time.Now()}
	for i, d := range src.Layers {
		l := &layerProgress{number: i + 1, of: len(src.Layers), digest: d.Digest.Hex, size: max(d.Size, 0)}
		p.layers = append(p.layers, l)
		src.Layers[i].Open = func(ctx context.Context) (io.ReadCloser, error) { return l.open(ctx, d.Open) }
		if from := d.OpenFrom; from != nil {
			src.Layers[i].OpenFrom = func(ctx context.Context, off int64, before io.Reader) (io.ReadCloser, error) {
				return l.open(ctx, func(ctx context.Context) (io.ReadCloser, error) { return from(ctx, off, before) })
			}
		}
	}
	if s, ok := a.stderr.(*screen); ok {
		p.screen = s
		s.start(p.rows)
		p.stop = s.stop
		return p
	}
	if a.logFormat == "json" {
		p.log = log
	}
	p.total.rate(p.began, 0)
	ended, left := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(left)
		p.lines(ended)
	}()
	p.stop = func() {
		close(ended)
		select {
		case <-left:
		case <-time.After(stuckAfter):
		}
	}
	return p
}

// placeName names the place of ref in a few characters.
func placeName(ref registry.Ref) string { return cmp.Or(ref.Registry, ref.Layout, ref.Archive) }

// end shows nothing more. It leaves no row on the screen.
func (p *progress) end() { p.stop() }

func (l *layerProgress) open(ctx context.Context, open func(context.Context) (io.ReadCloser, error)) (io.ReadCloser, error) {
	l.read.Store(0)
	l.push.Store(0)
	l.sent.Store(0)
	l.state.Store(underWay)
	l.asked.Store(time.Now().UnixNano())
	defer l.asked.Store(0)
	rc, err := open(ctx)
	if err != nil {
		return nil, err
	}
	return &watchedLayer{rc, l}, nil
}

// watchedLayer notes while a read waits for the source.
type watchedLayer struct {
	io.ReadCloser
	l *layerProgress
}

func (w *watchedLayer) Read(p []byte) (int, error) {
	w.l.asked.Store(time.Now().UnixNano())
	defer w.l.asked.Store(0)
	return w.ReadCloser.Read(p)
}

// Read implements flatten.Progress, as the methods below do.
func (p *progress) Read(layer int, n int64) { p.layers[layer].read.Add(n) }

func (p *progress) Push(layer int, size int64) {
	l := p.layers[layer]
	l.moved.Store(time.Now().UnixNano())
	l.push.Store(size)
}

func (p *progress) Pushed(layer int, sent int64) {
	l := p.layers[layer]
	l.moved.Store(time.Now().UnixNano())
	l.sent.Store(sent)
}

func (p *progress) Done(layer int, wasThere bool) {
	l := p.layers[layer]
	state := int32(converted)
	if wasThere {
		state = reused
	}
	l.state.Store(state)
	if p.screen != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.log != nil {
		p.log.Info("layer done", "layer", l.number, "layers", l.of, "digest", "sha256:"+l.digest, "reused", wasThere, "stored_bytes", l.push.Load())
		return
	}
	what := "stored as " + bytesString(l.push.Load())
	if wasThere {
		what = "already there"
	}
	fmt.Fprintf(p.out, "layer %s %.12s: %s\n", l.name(), l.digest, what)
}

// lines prints how far the build is from time to time, until ended is closed.
func (p *progress) lines(ended <-chan struct{}) {
	t := time.NewTicker(lineInterval)
	defer t.Stop()
	for {
		select {
		case <-ended:
			return
		case now := <-t.C:
			s := p.sum(now)
			p.mu.Lock()
			if p.log != nil {
				p.log.Info("building", "layers_done", s.done, "layers", len(p.layers), "read_bytes", s.read, "bytes", s.size, "status", s.text(p))
			} else {
				fmt.Fprintf(p.out, "%s: %s\n", s.count(p), s.text(p))
			}
			p.mu.Unlock()
		}
	}
}

// sum is how far all layers are together.
type sum struct {
	done, reused, running int
	read, size            int64 // of the layers as they are stored
	sent, push            int64 // of the streams that are being pushed
	part                  float64
	rate                  float64 // bytes a second, read and sent
	reading               bool
	waiting               string // what all that runs waits for
}

func (p *progress) sum(now time.Time) (s sum) {
	var moved int64
	waiting := make(map[string]bool)
	for _, l := range p.layers {
		s.size += l.size
		read, sent := l.read.Load(), l.sent.Load()
		moved += read + sent
		switch l.state.Load() {
		case queued:
			s.reading = true // or will be
			continue
		case underWay:
			s.running++
			s.read += min(read, l.size)
			s.part += l.part() * float64(l.size)
			if push := l.push.Load(); push > 0 {
				s.push += push
				s.sent += sent
			} else {
				s.reading = true
			}
			waiting[l.waitsFor(p, now)] = true
			continue
		case reused:
			s.reused++
		}
		s.done++
		s.read += l.size
		s.part += float64(l.size)
	}
	if s.size > 0 {
		s.part /= float64(s.size)
	}
	if len(waiting) == 1 {
		for s.waiting = range waiting {
		}
	}
	s.rate = p.total.rate(now, moved)
	return s
}

func (s sum) count(p *progress) string {
	text := fmt.Sprintf("%d of %d layers", s.done, len(p.layers))
	if s.reused > 0 {
		text += fmt.Sprintf(" (%d reused)", s.reused)
	}
	return text
}

// text says what the build does.
func (s sum) text(p *progress) string {
	switch {
	case s.done == len(p.layers):
		return "assembling the filesystem"
	case s.waiting != "":
		return "waiting for " + s.waiting
	case s.running == 0:
		return "looking for converted layers in " + p.to
	case s.reading:
		return amount(s.read, s.size) + rateString(s.rate)
	}
	return "pushing " + amount(s.sent, s.push) + rateString(s.rate)
}

// rows are what the screen shows: the layers that are worked on, at most most of
// them, and the sum of all below.
func (p *progress) rows(now time.Time, width, most int) []string {
	var rows []string
	more := 0
	s := p.sum(now)
	for _, l := range p.layers {
		if l.state.Load() != underWay {
			continue
		}
		if row := l.row(p, now, width); len(rows) < most-2 || s.running <= most-1 {
			rows = append(rows, row)
		} else {
			more++
		}
	}
	if more > 0 {
		rows = append(rows, fit(width, fmt.Sprintf("and %d more", more)))
	}
	if most < 2 {
		rows = nil
	}
	count, text := s.count(p), s.text(p)
	bar := bar(s.part)
	short := fmt.Sprintf("%d/%d", s.done, len(p.layers)) + bar
	return append(rows, fit(width, count+bar+text, short+text, short+amount(s.read, s.size), text))
}

// row is what the screen shows of a layer that is being worked on.
func (l *layerProgress) row(p *progress, now time.Time, width int) string {
	read, push, sent := l.read.Load(), l.push.Load(), l.sent.Load()
	verb, short := "converting ", amount(read, l.size)
	if push > 0 {
		verb, short = "pushing ", amount(sent, push)
	}
	long := short + rateString(l.rate.rate(now, read+sent))
	if w := l.waitsFor(p, now); w != "" {
		verb, short = "", "waiting for "+w
		long = short
	}
	name, bar := fmt.Sprintf("%*s", 2*len(fmt.Sprint(l.of))+1, l.name()), bar(l.part())
	full := fmt.Sprintf("layer %s %.12s", name, l.digest)
	return fit(width, full+bar+verb+long, full+bar+long, name+bar+verb+long, name+bar+long, name+bar+short, name+" "+short)
}

func (l *layerProgress) name() string { return fmt.Sprintf("%d/%d", l.number, l.of) }

// part is how much of the work at a layer is done: half of it is to convert it, and
// half to push it.
func (l *layerProgress) part() (part float64) {
	if l.size > 0 {
		part = float64(min(l.read.Load(), l.size)) / float64(l.size)
	}
	if push := l.push.Load(); push > 0 {
		part = 1 + float64(min(l.sent.Load(), push))/float64(push)
	}
	return part / 2
}

// waitsFor is what has not moved the layer on for a while, or nothing.
func (l *layerProgress) waitsFor(p *progress, now time.Time) string {
	since := func(t *atomic.Int64) bool { n := t.Load(); return n > 0 && now.UnixNano()-n > int64(lull) }
	switch {
	case l.push.Load() > 0:
		if since(&l.moved) {
			return p.to
		}
	case since(&l.asked):
		return p.from
	}
	return ""
}

// meter measures a rate over the last few seconds.
type meter struct {
	marks []mark
}

type mark struct {
	at time.Time
	n  int64
}

// meterWindow is what a rate is the mean of.
const meterWindow = 5 * time.Second

// rate is how many bytes a second came lately, of n by now. It is for one
// goroutine.
func (m *meter) rate(now time.Time, n int64) float64 {
	for len(m.marks) > 1 && now.Sub(m.marks[1].at) >= meterWindow {
		m.marks = m.marks[1:]
	}
	if k := len(m.marks); k > 0 && n < m.marks[k-1].n {
		m.marks = nil // begun again
	}
	m.marks = append(m.marks, mark{now, n})
	first := m.marks[0]
	if d := now.Sub(first.at).Seconds(); d > 0 {
		return float64(n-first.n) / d
	}
	return 0
}

// amount is "12.0 of 48.5 MiB".
func amount(n, of int64) string {
	a, b := bytesString(n), bytesString(of)
	x, xu, _ := strings.Cut(a, " ")
	if _, u, _ := strings.Cut(b, " "); u == xu {
		a = x
	}
	return a + " of " + b
}

func rateString(rate float64) string {
	if rate < 1 {
		return ""
	}
	return ", " + bytesString(int64(rate)) + "/s"
}

func bar(part float64) string {
	const width = 10
	full := min(max(int(part*width), 0), width)
	return " [" + strings.Repeat("#", full) + strings.Repeat(".", width-full) + "] "
}

// fit is the first of texts that is not wider than width, or what fits of the last.
func fit(width int, texts ...string) string {
	for _, t := range texts {
		if len(t) <= width {
			return t
		}
	}
	return texts[len(texts)-1][:max(width, 0)]
}
