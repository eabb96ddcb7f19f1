package main

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"thaw/blockmap/flatten"
)

// progress shows how a build goes on stderr: a bar a layer on a terminal, a
// line a layer elsewhere.
type progress struct {
	layers []*layerProgress
	bars   *mpb.Progress // nil where lines are printed

	mu  sync.Mutex // of out
	out io.Writer
}

type layerProgress struct {
	name  string
	total int64
	read  atomic.Int64
	push  atomic.Int64 // size of the stream; 0 until it is on its way
	sent  atomic.Int64
	end   atomic.Int32
	bar   *mpb.Bar
}

// The values of end.
const (
	underWay = iota
	converted
	reused
)

func newProgress(a *app, src *flatten.Source) *progress {
	p := &progress{out: a.stderr}
	if a.terminal() {
		p.bars = mpb.New(mpb.WithOutput(a.stderr), mpb.WithWidth(40))
	}
	for i, l := range src.Layers {
		lp := &layerProgress{name: fmt.Sprintf("layer %d/%d %.12s", i+1, len(src.Layers), l.Digest.Hex), total: l.Size}
		if p.bars != nil {
			lp.bar = p.bars.AddBar(max(l.Size, 1),
				mpb.PrependDecorators(decor.Name(lp.name, decor.WCSyncSpaceR)),
				mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return " " + lp.status() })))
		}
		p.layers = append(p.layers, lp)
	}
	return p
}

func (l *layerProgress) status() string {
	switch {
	case l.end.Load() == reused:
		return "there already"
	case l.end.Load() == converted:
		return "done, " + bytesString(l.push.Load()) + " stored"
	case l.push.Load() > 0:
		return fmt.Sprintf("pushing %s of %s", bytesString(l.sent.Load()), bytesString(l.push.Load()))
	}
	return fmt.Sprintf("converting %s of %s", bytesString(l.read.Load()), bytesString(l.total))
}

// Read implements flatten.Progress, as the methods below do.
func (p *progress) Read(layer int, n int64) {
	l := p.layers[layer]
	l.read.Add(n)
	if l.bar != nil {
		// The last step is Done's: a full bar is over.
		l.bar.SetCurrent(min(l.read.Load(), max(l.total, 1)-1))
	}
}

func (p *progress) Push(layer int, size int64) { p.layers[layer].push.Store(size) }

func (p *progress) Pushed(layer int, sent int64) { p.layers[layer].sent.Store(sent) }

func (p *progress) Done(layer int, wasThere bool) {
	l := p.layers[layer]
	l.end.Store(converted)
	if wasThere {
		l.end.Store(reused)
	}
	if l.bar != nil {
		l.bar.SetCurrent(max(l.total, 1))
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "%s: %s\n", l.name, l.status())
}

// end leaves the terminal as the bars stand, finished or not.
func (p *progress) end() {
	if p.bars == nil {
		return
	}
	for _, l := range p.layers {
		if !l.bar.Completed() {
			l.bar.Abort(false)
		}
	}
	p.bars.Wait()
}
