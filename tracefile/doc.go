// Package tracefile records which blocks of a device a start reads, and turns
// such recordings into the order in which to fetch the chunks of the next
// start.
//
// A [Trace] is ranges of device blocks with the time since the first read, in
// the order in which they were first touched. It has no names, no contents and
// no addresses; what ties it to an image is the digest of the image's index.
// The one idea: a program starts in nearly the same way each time, so the next start
// need not wait for the chunks that an earlier one has waited for.
//
//	serve ──▶ Recorder ──▶ Image          a Device around a Device: hits and misses alike
//	             │
//	             ▼ Writer
//	        trace file ──▶ Read ──▶ Trace ──┐
//	        trace file ──▶ Read ──▶ Trace ──┼─▶ Merge ──▶ NewPlan ──▶ Plan.Wants ──▶ Prefetch
//	older:  trace file ──▶ Read ──▶ Translate                   └───▶ Plan.Pack ──▶ a bundle
//
// A [Recorder] stands between a transport and the device that it serves. A hit
// costs one look at a bitmap. All writing happens on a goroutine of its own, behind a
// bounded buffer. When the buffer is full, the recorder drops touches and counts them.
//
// Several traces of one image become one by [Merge], which puts first what most
// starts touch. A trace of another version of the image becomes one of this
// version by [Translate], which finds the content that they share. A [Plan] is
// the leaves that a trace needs, each once, in order; a [Bundle] has them in one
// blob.
//
// [Summary] describes a trace in numbers. [Trace.Points] and [Trace.Curve] are for
// pictures. Exports are an iolog that fio replays, and text like blkparse's.
//
// The file format of a trace is drawn in format.go, that of a bundle in bundle.go. A
// trace file that was cut anywhere is readable up to its last complete frame. [Read]
// trusts nothing in it.
package tracefile
