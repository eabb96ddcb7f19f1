// Package flatten makes a block image of a container image: the layers, which
// are tar archives, become one ext4 filesystem whose blocks lie in streams.
//
//	layer tar ────convert─────▶ stream: the contents of its files, in chunks  ──▶ target
//	                       └──▶ TOC: its entries, and where their contents are ──▶ target
//	TOCs, lowest first ──tree──▶ file tree ──ext4.Layout──▶ stream 0: metadata ──▶ target
//	                                                    └──▶ Index, manifest   ──▶ target
//
// A stream and a TOC depend on their layer alone, so layers are converted
// beside each other, and one that the target has already is not read at all.
// Contents go through once and are never unpacked: only the names and where
// contents lie are kept in memory.
//
// Once all layers are there, the program of the image's config is looked up in
// the file tree and, with what a linker or an interpreter reads for it, becomes
// the guess of what a start will read: [AnnotationGuess] on the manifest.
//
// [Build] is the whole; [ParseImage] reads what it has made.
package flatten
