package flatten

// What layers do to each other.
var layerCases = []treeCase{
	{
		name: "pseudo-links of aufs",
		layers: layers(
			lines(dir(".wh..wh.plnk"), reg(".wh..wh.plnk/123.456", "aufs"), symlink(".wh..wh.plnk/7.8", "f"), reg(".wh..wh.aufs", ""), dir(".wh..wh.orph"),
				dir("usr"), hardlink("usr/a", "/.wh..wh.plnk/123.456"), hardlink("usr/b", ".wh..wh.plnk/123.456"), hardlink("s", "./.wh..wh.plnk/7.8"), reg("f", "x")),
			lines(hardlink("usr/c", "usr/a"), whiteout("usr/a")),
		),
		want:    map[string]string{"usr/a": gone, "usr/b": text("aufs"), "usr/c": text("aufs"), "f": text("x"), ".wh..wh.plnk": gone, ".wh..wh.aufs": gone},
		noUmoci: "it does not know them", noTar: "it does not know them",
	},
	{
		name: "whiteouts",
		layers: layers(
			lines(dir("d"), reg("d/keep", "1"), reg("d/gone", "2"), reg("gone", "3"), dir("tree"), dir("tree/sub"), reg("tree/sub/f", "4"), symlink("link", "d"), dir("spare")),
			lines(whiteout("d/gone"), whiteout("gone"), whiteout("tree"), whiteout("link"), whiteout("never there"), whiteout("nor/here")),
		),
		want: map[string]string{"d/gone": gone, "gone": gone, "tree": gone, "link": gone, "d/keep": text("1"), "nor": gone},
	},
	{
		name: "a whiteout of a symlink to a directory leaves the directory",
		layers: layers(
			lines(dir("d"), reg("d/f", "1"), symlink("l", "d")),
			lines(whiteout("l")),
		),
		want: map[string]string{"l": gone, "d/f": text("1")},
	},
	{
		name: "added again after a whiteout",
		layers: layers(
			lines(reg("f", "1"), dir("d").with(mode(0o700)), reg("d/old", "2")),
			lines(whiteout("f"), whiteout("d")),
			lines(reg("f", "new"), dir("d"), reg("d/new", "3")),
		),
		want: map[string]string{"f": text("new"), "d/old": gone, "d/new": text("3")},
	},
	{
		name: "a whiteout does not touch its own layer",
		layers: layers(
			lines(reg("before", "old"), reg("behind", "old"), dir("d"), reg("d/old", "x"), dir("e"), reg("e/old", "x")),
			lines(whiteout("before"), reg("before", "new"), reg("behind", "new"), whiteout("behind"),
				whiteout("d"), dir("d"), reg("d/new", "y"), dir("e"), reg("e/new", "y"), whiteout("e")),
		),
		want:    map[string]string{"before": text("new"), "behind": text("new"), "d/old": gone, "d/new": text("y"), "e/old": gone, "e/new": text("y")},
		touched: []string{"d", "e"},
	},
	{
		name: "opaque, first",
		layers: layers(
			lines(dir("d").with(mode(0o700)), reg("d/old", "1"), dir("d/sub"), reg("d/sub/old", "2"), reg("d/both", "old"), reg("other", "x")),
			lines(dir("d"), opaque("d"), reg("d/new", "3"), dir("d/sub"), reg("d/sub/new", "4"), reg("d/both", "new")),
		),
		want: map[string]string{"d/old": gone, "d/sub/old": gone, "d/new": text("3"), "d/sub/new": text("4"), "d/both": text("new"), "other": text("x")},
	},
	{
		name: "opaque, last",
		layers: layers(
			lines(dir("d").with(mode(0o700)), reg("d/old", "1"), dir("d/sub"), reg("d/sub/old", "2"), reg("d/both", "old"), reg("other", "x")),
			lines(dir("d"), reg("d/new", "3"), dir("d/sub"), reg("d/sub/new", "4"), reg("d/both", "new"), opaque("d")),
		),
		want:    map[string]string{"d/old": gone, "d/sub/old": gone, "d/new": text("3"), "d/sub/new": text("4"), "d/both": text("new"), "other": text("x")},
		touched: []string{"d/sub"},
	},
	{
		name: "opaque without its directory listed",
		layers: layers(
			lines(dir("d").with(mode(0o711)), reg("d/old", "1")),
			lines(opaque("d"), reg("d/new", "2")),
		),
		want: map[string]string{"d/old": gone, "d/new": text("2")},
	},
	{
		name: "an opaque root",
		layers: layers(
			lines(dir("d"), reg("d/f", "1"), reg("f", "2")),
			lines(reg("new", "3"), opaque("."), dir("d")),
		),
		want: map[string]string{"d/f": gone, "f": gone, "new": text("3"), "d": "dir"},
	},
	{
		name: "opaque where nothing is, and where a file is",
		layers: layers(
			lines(reg("file", "x")),
			lines(opaque("nothing"), dir("new"), opaque("new"), reg("new/f", "1")),
		),
		want:    map[string]string{"file": text("x"), "new/f": text("1"), "nothing": gone},
		noUmoci: "it makes the directory that an opaque whiteout is in",
	},
	{
		name: "hidden from below, first and last",
		layers: layers(
			lines(dir("first").with(mode(0o700)), dir("first/sub").with(mode(0o700)), reg("first/sub/old", "1"),
				dir("last").with(mode(0o700)), dir("last/sub").with(mode(0o700)), reg("last/sub/old", "1"),
				dir("white").with(mode(0o700)), dir("white/sub").with(mode(0o700)), reg("white/old", "1")),
			// What is hidden takes its mode and owner along, wherever in the
			// layer the whiteout stands.
			lines(opaque("first"), reg("first/sub/new", "2"), reg("last/sub/new", "2"), opaque("last"), reg("white/sub/new", "2"), whiteout("white")),
		),
		implied: []string{"first/sub", "last/sub", "white", "white/sub"},
		want:    map[string]string{"first/sub/old": gone, "last/sub/old": gone, "white/old": gone, "white/sub/new": text("2")},

		touched: []string{"first", "last"},
	},
	{
		name: "bookkeeping of aufs",
		layers: layers(
			lines(reg("f", "1")),
			lines(dir(".wh..wh.plnk"), reg(".wh..wh.plnk/1.2", "x"), reg(".wh..wh.aufs", ""), dir(".wh..wh.orph")),
		),
		noUmoci: "it takes them for whiteouts of .wh.plnk and the like",
		want:    map[string]string{"f": text("1"), ".wh..wh.plnk": gone, ".wh..wh.aufs": gone},
	},
	{
		name: "types that change",
		layers: layers(
			lines(reg("to dir", "1"), dir("to file"), dir("to file/sub"), reg("to file/sub/f", "2"), dir("to link"), reg("to link/f", "3"), symlink("to fifo", "x"),
				fifo("to symlink"), device('3', "to regular", 1, 3), reg("to device", "x")),
			lines(dir("to dir"), reg("to dir/f", "4"), reg("to file", "5"), symlink("to link", "to dir"), fifo("to fifo"),
				symlink("to symlink", "to file"), reg("to regular", "6"), device('4', "to device", 7, 8)),
		),
		want: map[string]string{"to dir/f": text("4"), "to file": text("5"), "to link": "-> to dir", "to fifo": "fifo", "to regular": text("6"), "to device": "7:8"},
	},
	{
		name: "there and back",
		layers: layers(
			lines(dir("d"), reg("d/one", "1")),
			lines(reg("d", "a file")),
			lines(dir("d"), reg("d/two", "2")),
		),
		want: map[string]string{"d/one": gone, "d/two": text("2")},
	},
	{
		name: "a file in the way of a parent",
		layers: layers(
			lines(reg("a", "1")),
			lines(reg("a/b", "2")),
		),
		implied: []string{"a"},
		noUmoci: "it fails", noTar: "it fails",
		want: map[string]string{"a": "dir", "a/b": text("2")},
	},
	{
		name: "duplicates in one layer",
		layers: layers(lines(
			reg("f", "1"), reg("f", "2"), reg("f", "three"), dir("d").with(mode(0o700)), reg("d/f", "x"), dir("d").with(mode(0o711)),
			symlink("s", "a"), symlink("s", "b"), reg("t", "x"), symlink("t", "f"), symlink("u", "f"), reg("u", "not f"),
			dir("v"), reg("v/f", "x"), reg("w", "x"), dir("w"), reg("w/f", "y"),
		)),
		want: map[string]string{"f": text("three"), "d/f": text("x"), "s": "-> b", "t": "-> f", "u": text("not f"), "w/f": text("y")},
	},
	{
		name:   "a directory and then a file of one name in one layer",
		layers: layers(lines(dir("v"), reg("v/f", "x"), reg("v", "y"))),
		want:   map[string]string{"v": text("y"), "v/f": gone},
		noTar:  "it fails",
	},
	{
		name: "hard links",
		layers: layers(lines(
			reg("a", "1"), hardlink("b", "a"), hardlink("c", "b"), symlink("s", "a"), hardlink("t", "s"), fifo("p"), hardlink("q", "p"),
			device('3', "n", 1, 3), hardlink("m", "n"), dir("d"), hardlink("d/a", "a"), hardlink("./d/./b", "/a"), reg("empty", ""), hardlink("empty2", "empty"),
		)),
		want: map[string]string{"t": "-> a", "c": text("1"), "d/b": text("1")},
	},
	{
		name: "hard links across layers",
		layers: layers(
			lines(reg("a", "1").with(owner(1, 2)), reg("other", "x"), dir("d"), reg("d/f", "2")),
			lines(hardlink("b", "a"), hardlink("other", "d/f"), hardlink("e/f", "d/f")),
			lines(hardlink("c", "b")),
		),
		implied: []string{"e"},
		want:    map[string]string{"b": text("1"), "c": text("1"), "other": text("2"), "e/f": text("2")},
	},
	{
		name: "a hard link to what is replaced later",
		layers: layers(
			lines(reg("a", "old"), hardlink("b", "a"), reg("gone", "kept by its link"), hardlink("kept", "gone"), reg("x", "old x"), hardlink("y", "x")),
			lines(reg("a", "new"), whiteout("gone"), hardlink("z", "y"), reg("x", "new x"), reg("y", "new y")),
		),
		want: map[string]string{"a": text("new"), "b": text("old"), "gone": gone, "kept": text("kept by its link"),
			"x": text("new x"), "y": text("new y"), "z": text("old x")},
	},
	{
		name: "a hard link binds to what its target is then",
		layers: layers(
			lines(reg("f", "1")),
			lines(reg("f", "2"), hardlink("g", "f"), reg("f", "3")),
			lines(reg("f", "4")),
		),
		want: map[string]string{"g": text("2"), "f": text("4")},
	},
	{
		name: "a hard link over a file, a symlink and a link to the same",
		layers: layers(
			lines(reg("f", "1"), reg("g", "2"), symlink("s", "g"), hardlink("h", "f"), dir("d")),
			lines(hardlink("g", "f"), hardlink("s", "f"), hardlink("h", "f")),
		),
		want: map[string]string{"g": text("1"), "s": text("1"), "h": text("1")},
	},
	{
		name: "a hard link whose entry has other metadata",
		layers: layers(lines(
			reg("f", "1").with(mode(0o600)).with(owner(1, 2)), hardlink("g", "f").with(mode(0o777)).with(owner(3, 4)),
		)),
		want: map[string]string{"g": text("1")},
	},
	{
		name:   "the same layer twice",
		layers: layers(lines(dir("d"), reg("d/f", noiseFile)), lines(hardlink("link", "d/f")), lines(dir("d"), reg("d/f", noiseFile))),
		want:   map[string]string{"d/f": text(noiseFile), "link": text(noiseFile)},
	},
	{
		name:   "empty layers",
		layers: layers(nil, lines(reg("f", "x")), nil, nil),
		want:   map[string]string{"f": text("x")},
	},
	{
		name:   "one empty layer",
		layers: layers(nil),
	},
	{
		name:    "no layer",
		layers:  layers(),
		noUmoci: "it wants one", noTar: "there is nothing to unpack",
		want: map[string]string{"": "dir"},
	},
	{
		name:   "one layer of whiteouts alone",
		layers: layers(lines(reg("f", "x")), lines(whiteout("f"))),
		want:   map[string]string{"f": gone},
	},
}

var noiseFile = noise(99, 300_000)
