// Package tracefile records which blocks of a device a start reads, and turns
// such recordings into the order in which to fetch the chunks of the next
// start.
//
// A [Trace] is ranges of device blocks with the time since the first read, in
// the order in which they were first touched. It has no names, no contents and
// no addresses; what ties it to an image is the digest of the image's index.
// The one idea is that a program starts in nearly the same way each time, so
// what one start has waited for, the next one need not.
//
//	serve ──▶ Recorder ──▶ Image          a Device around a Device: hits and misses alike
//	             │
//	             ▼ Writer
//	        trace file ──▶ Read ──▶ Trace ──┐
//	        trace file ──▶ Read ──▶ Trace ──┼─▶ Merge ──▶ NewPlan ──▶ Plan.Wants ──▶ Prefetch
//	older:  trace file ──▶ Read ──▶ Translate                   └───▶ Plan.Pack ──▶ a bundle
//
// A [Recorder] is put between a transport and the device that it serves. The
// way of a hit through it is one look at a bitmap. Everything else happens on a
// goroutine of its own, behind a bounded buffer that drops and counts when it
// is full.
//
// Several traces of one image become one by [Merge], which puts first what most
// starts touch. A trace of another version of the image becomes one of this
// version by [Translate], which finds the content that they share. A [Plan] is
// the chunks that a trace needs, each once, in order; a [Bundle] has them in one
// blob.
//
// To look at a trace there are a [Summary], [Trace.Points] and [Trace.Curve] to
// draw, and exports as an iolog that fio replays and as text in the manner of
// blkparse.
//
// The file format is in format.go, that of a bundle in bundle.go. It is readable up to the last complete frame
// however it was cut, and [Read] trusts nothing in it.
package tracefile
