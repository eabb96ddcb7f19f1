package flatten

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"thaw/blockmap/ext4"
)

// tree is the file system that the layers add up to. Layers are applied from the lowest
// up, each entry in tar order, by the rules of the OCI image spec (layer.md). Where the
// spec is silent, the result is that of unpacking the layers over each other within a
// chroot:
//
//   - parents are found through symbolic links, which never leave the root;
//   - a parent that no layer lists is made: owner root, mode 0755, time 0;
//   - an entry over one of another type replaces it; a directory over a
//     directory changes its metadata and keeps its content;
//   - a hard link leads to the file that its target names at that point of that layer;
//   - a file in the directory of pseudo-links of aufs is not a file of the image, but
//     hard links of the same layer give it names.
//
// Layers may be hostile: the memory and the time of an entry are bounded by its length
// and by an allowance that grows with every entry.
type tree struct {
	root  *node
	layer int                    // the layer that is being applied, from 1
	plink map[string]*ext4.Inode // pseudo-links of the layer, by name
	plan  *ext4.Plan

	names   int // number of names in the tree
	implied int // directories without an entry of their own that may still be made
	follow  int // bytes of paths that may still be walked: targets of symbolic links, and the rest of the path after them
}

// Bounds on a tree.
const (
	// maxNames bounds the file names of an image. A build takes about a KiB of memory
	// for each.
	maxNames = 4 << 20

	// maxDepth bounds the depth of directories. Linux accepts no path to a deeper one.
	maxDepth = maxPath / 2

	// If no layer lists the parents of an entry, the build makes them. If the parents
	// are symbolic links, it walks their targets. So a few bytes of a layer could cost
	// thousands of directories and steps. Therefore an image has a base allowance of
	// each, and each of its entries adds to that. Honest images need little of it.
	impliedBase, impliedEntry = 64 << 10, 16
	followBase, followEntry   = 64 << 20, 1 << 10
)

// node is a name in the tree. Hard links are several nodes of one inode.
type node struct {
	inode *ext4.Inode
	names map[string]*node // of a directory
	layer int              // the layer that last put the name there
	seen  int              // of a directory: the last layer with an entry for it or for something below it
	bytes int64            // of a directory: what its names take in it
	own   int              // of a directory: the layer that all names below it belong to; if less than the current one, they may belong to several
}

func (n *node) isDir() bool     { return n.inode.Mode&modeType == modeDir }
func (n *node) isSymlink() bool { return n.inode.Mode&modeType == modeSymlink }

func newTree() *tree {
	return &tree{root: newDir(0), implied: impliedBase, follow: followBase, plan: new(ext4.Plan)}
}

func newDir(layer int) *node {
	return &node{inode: &ext4.Inode{Mode: modeDir | 0o755}, layer: layer, own: layer}
}

// maxFollow bounds the symbolic links that a path may lead through, as in Linux.
const maxFollow = 40

var (
	errFollow   = errors.New("too many levels of symbolic links")
	errFollowed = errors.New("the layers' paths lead through too many symbolic links")
	errImplied  = errors.New("the layers need too many directories that no layer lists")
)

// applyLayer applies a layer over those before it, from its TOC and the number and the
// blob length of its stream.
func (t *tree) applyLayer(ctx context.Context, blob []byte, stream uint32, stored int64) error {
	toc, err := openTOC(blob, stored)
	if err != nil {
		return err
	}
	defer toc.close()
	t.begin()
	defer t.end(stream, toc.table.Blocks())
	for n := 0; ; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e, err := toc.read()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := t.apply(e, stream); err != nil {
			return fmt.Errorf("layer entry %s: %w", quoted(e.name), err)
		}
	}
}

// begin begins the next layer.
func (t *tree) begin() { t.layer, t.plink = t.layer+1, nil }

// end plans the places of what the layer has added to the tree.
func (t *tree) end(stream, blocks uint32) {
	t.plan.Layer(stream, blocks)
	t.plan.Add(t.root.inode, t.root.bytes)
	t.place(t.root)
}

// place plans the places of what the layer has added below a directory: first those of
// the names in the directory, then those below each subdirectory. The tree is no deeper
// than maxDepth, so recursion is safe.
func (t *tree) place(dir *node) {
	type child struct {
		name string
		*node
	}
	var children []child
	for name, n := range dir.names {
		if n.layer == t.layer || n.seen == t.layer {
			children = append(children, child{name, n})
		}
	}
	slices.SortFunc(children, func(a, b child) int { return strings.Compare(a.name, b.name) })
	for _, c := range children {
		t.plan.Add(c.inode, c.bytes)
	}
	for _, c := range children {
		if c.isDir() && c.seen == t.layer {
			t.place(c.node)
		}
	}
}

// quoted quotes a name for an error. It shows only the end of a long name.
func quoted(name string) string {
	const most = 512
	if n := len(name) - most; n > 0 {
		return fmt.Sprintf("\"...%s, of %d bytes", strconv.Quote(name[n:])[1:], len(name))
	}
	return strconv.Quote(name)
}

// apply adds an entry of the current layer. stream is the number of the
// layer's stream.
func (t *tree) apply(e *entry, stream uint32) error {
	t.implied, t.follow = t.implied+impliedEntry, t.follow+followEntry
	switch e.kind {
	case kindWhiteout:
		dir, base := split(e.name)
		parent, err := t.walk(dir, false)
		if err != nil || parent == nil {
			return err
		}
		t.hideLower(parent, base)
		return nil
	case kindOpaque:
		dir, err := t.walk(e.name, false)
		if err != nil || dir == nil {
			return err
		}
		t.hideBelow(dir)
		return nil
	case kindHardLink:
		return t.link(e)
	}
	if e.name == "" {
		return t.setDir(t.root, e.inode)
	}
	for i := range e.inode.Data {
		e.inode.Data[i].Stream = stream
	}
	if isPlink(e.name) {
		return t.pseudo(e.name, e.inode)
	}
	dir, base := split(e.name)
	parent, err := t.walk(dir, true)
	if err != nil {
		return err
	}
	if old := parent.names[base]; old != nil && old.isDir() && e.inode.Mode&modeType == modeDir {
		return t.setDir(old, e.inode)
	}
	return t.put(parent, base, &node{inode: e.inode, own: t.layer})
}

// setDir changes the metadata of a directory.
func (t *tree) setDir(n *node, in *ext4.Inode) error {
	if in.Mode&modeType != modeDir {
		return errors.New("the root is not a directory")
	}
	in.TakePlace(n.inode)
	n.inode, n.layer, n.seen = in, t.layer, t.layer
	return nil
}

func (t *tree) put(parent *node, base string, n *node) error {
	n.layer = t.layer
	if parent.names == nil {
		parent.names = make(map[string]*node)
	}
	if old := parent.names[base]; old != nil {
		t.names -= old.count()
	} else {
		parent.bytes += ext4.EntrySize(base)
	}
	if t.names++; t.names > maxNames {
		return fmt.Errorf("the image has more than %d files", maxNames)
	}
	parent.names[strings.Clone(base)] = n
	return nil
}

// count returns the number of names at and below a node. A node is counted once, when
// it is removed, so counting names costs no more than making them.
func (n *node) count() int {
	total := 1
	for _, child := range n.names {
		total += child.count()
	}
	return total
}

// isPlink reports whether a name is that of a pseudo-link of aufs.
func isPlink(name string) bool { return strings.HasPrefix(name, plinkDir) }

// pseudo records a file that only hard links will name.
func (t *tree) pseudo(name string, in *ext4.Inode) error {
	if in.Mode&modeType == modeDir {
		return errors.New("a directory among the pseudo-links of aufs")
	}
	if t.plink == nil {
		t.plink = make(map[string]*ext4.Inode)
	}
	t.plink[strings.Clone(name)] = in
	return nil
}

// link makes another name for an existing file.
func (t *tree) link(e *entry) error {
	if e.link == "" {
		return errors.New("a hard link to the root, which is a directory")
	}
	target, err := t.target(e.link)
	if err != nil {
		return err
	}
	if isPlink(e.name) {
		return t.pseudo(e.name, target)
	}
	dir, base := split(e.name)
	if base == "" {
		return errors.New("the root is not a directory")
	}
	parent, err := t.walk(dir, true)
	if err != nil {
		return err
	}
	return t.put(parent, base, &node{inode: target, own: t.layer})
}

// target returns the inode that a hard link names.
func (t *tree) target(name string) (*ext4.Inode, error) {
	if isPlink(name) {
		if in := t.plink[name]; in != nil {
			return in, nil
		}
		return nil, fmt.Errorf("a hard link to %s, a pseudo-link of aufs that the layer does not have", quoted(name))
	}
	dir, base := split(name)
	from, err := t.walk(dir, false)
	if err != nil {
		return nil, err
	}
	var n *node
	if from != nil {
		n = from.names[base]
	}
	if n == nil {
		return nil, fmt.Errorf("a hard link to %s, which does not exist", quoted(name))
	}
	if n.isDir() {
		return nil, fmt.Errorf("a hard link to %s, which is a directory", quoted(name))
	}
	return n.inode, nil
}

// hideLower removes the files of lower layers at and under a name: a layer's whiteouts do
// not touch its own files. A directory in which the layer has put files, but which the
// layer does not list, is replaced by a new one with those files. So the place of the
// whiteout in the layer does not matter.
func (t *tree) hideLower(dir *node, name string) {
	n := dir.names[name]
	if n == nil {
		return
	}
	t.hideBelow(n)
	switch {
	case n.layer == t.layer:
	case len(n.names) == 0:
		delete(dir.names, name)
		dir.bytes -= ext4.EntrySize(name)
		t.names--
	default:
		n.inode, n.layer = newDir(t.layer).inode, t.layer
	}
}

// hideBelow calls hideLower for all names of a directory. All names that are left, and all
// that are added later, are of this layer: a second call has nothing to do, so many
// whiteouts cost no more than one.
func (t *tree) hideBelow(dir *node) {
	if dir.own == t.layer {
		return
	}
	dir.own = t.layer
	for name := range dir.names {
		t.hideLower(dir, name)
	}
}

// walk finds the directory at a clean path, and follows symbolic links in every part of
// it. If the directory does not exist, walk makes it or, if make is false, returns nil.
func (t *tree) walk(path string, make bool) (*node, error) {
	rest, followed := path, 0
	stack := []*node{t.root}
	if make {
		t.root.seen = t.layer
	}
	for rest != "" {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		switch part {
		case "", ".":
			continue
		case "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		at := stack[len(stack)-1]
		n := at.names[part]
		switch {
		case n != nil && n.isDir():
		case n != nil && n.isSymlink():
			if followed++; followed > maxFollow {
				return nil, fmt.Errorf("%s: %w", quoted(path), errFollow)
			}
			target := n.inode.Target
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			if t.follow -= len(target) + len(rest); t.follow < 0 {
				return nil, errFollowed
			}
			rest = target + "/" + rest
			continue
		case !make:
			return nil, nil
		default:
			// There is nothing here, or a file, which cannot stay.
			if t.implied--; t.implied < 0 {
				return nil, errImplied
			}
			n = newDir(t.layer)
			if err := t.put(at, part, n); err != nil {
				return nil, err
			}
		}
		if len(stack) > maxDepth {
			return nil, fmt.Errorf("directories more than %d deep", maxDepth)
		}
		stack = append(stack, n)
		if make {
			n.seen = t.layer
		}
	}
	return stack[len(stack)-1], nil
}

// find returns the node that a path leads to, and its path without symbolic links. It
// follows symbolic links to the end, never out of the root. It returns nil if there is no
// such node.
func (t *tree) find(path string) (real string, n *node) {
	if t.follow -= len(path); t.follow < 0 {
		return "", nil
	}
	stack, names, followed := []*node{t.root}, []string{}, 0
	for rest := path; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		at := stack[len(stack)-1]
		switch {
		case part == "" || part == ".":
			continue
		case !at.isDir():
			return "", nil
		case part == "..":
			k := max(0, len(names)-1)
			stack, names = stack[:k+1], names[:k]
			continue
		}
		n := at.names[part]
		switch {
		case n == nil:
			return "", nil
		case n.isSymlink():
			target := n.inode.Target
			if followed++; followed > maxFollow {
				return "", nil
			}
			if t.follow -= len(target) + len(rest); t.follow < 0 {
				return "", nil
			}
			if strings.HasPrefix(target, "/") {
				stack, names = stack[:1], names[:0]
			}
			rest = target + "/" + rest
			continue
		}
		stack, names = append(stack, n), append(names, part)
	}
	return "/" + strings.Join(names, "/"), stack[len(stack)-1]
}

func split(name string) (dir, base string) {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i], name[i+1:]
	}
	return "", name
}

// inodes turns the tree into the form that ext4.Layout takes, and uses the tree up. The
// tree is no deeper than maxDepth, so recursion is safe.
func (t *tree) inodes() *ext4.Inode {
	var fill func(n *node)
	fill = func(n *node) {
		if len(n.names) == 0 {
			return
		}
		n.inode.Entries = make([]ext4.Dirent, 0, len(n.names))
		for name, child := range n.names {
			n.inode.Entries = append(n.inode.Entries, ext4.Dirent{Name: name, Inode: child.inode})
			fill(child)
		}
		n.names = nil
	}
	fill(t.root)
	return t.root.inode
}
