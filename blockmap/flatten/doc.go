// Package flatten makes a block image of a container image: the layers, which
// are tar archives, become one ext4 filesystem whose blocks lie in streams.
//
//	layer tar ────convert─────▶ stream: the contents of its files, in chunks  ──▶ target
//	                       └──▶ TOC: its entries, and where their contents are ──▶ target
//	TOCs, lowest first ──tree──▶ file tree ──ext4.Layout──▶ stream 0: metadata ──▶ target
//	                                                    └──▶ Index, manifest   ──▶ target
//
// A stream and a TOC depend on their layer alone. So a build converts several
// layers at once, and does not read a layer whose conversion is in the target
// already. It reads the contents once and never unpacks them: it keeps only names,
// and the places of contents, in memory.
//
// When all layers are converted, the build looks up the program of the image's
// config in the file tree. The program, and the files that a linker or an
// interpreter reads for it, become the guess of what a start will read:
// [AnnotationGuess] on the manifest.
//
// [Build] does all of this. [Commit] makes an image of a device that was written to: the
// streams of its base, and one with the blocks that were written. [Streams] and
// [StreamWriter] write one stream, and [Assemble] makes and pushes an image of streams:
// both use them. [ParseImage] reads the manifest of an image, and [Verify] checks an image
// against the [Policy] of its kind.
package flatten
