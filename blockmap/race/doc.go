// Package race tells the race detector which memory a compressor reads or writes.
//
// scripts/test compiles the compressors of other modules without -race: their loops are about half of
// what a test takes that builds an image. Their own memory is theirs; the buffers that they are given
// are thaw's. Who gives a compressor a buffer says so here:
//
//	race.Read(content)
//	frame = enc.EncodeAll(content, nil)
//
// A goroutine that writes to content meanwhile is reported then. That holds for code in assembly as
// well, which -race does not see either. Without -race the functions do nothing.
package race
