package flatten

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"thaw/blockmap/ext4"
)

// tree is the file system that layers add up to. They are applied from the
// lowest up, each entry in tar order, by the rules of the OCI image spec
// (layer.md). Where it is silent, what happens is what happens when the layers
// are unpacked one over the other within a chroot:
//
//   - parents are found through symbolic links, which never leave the root;
//   - a parent that no layer lists is made, root's, mode 0755, time 0;
//   - an entry over one of another type replaces it; a directory over a
//     directory changes its metadata and keeps its content;
//   - a hard link is to what its target is at that point of that layer.
type tree struct {
	root  *node
	layer int // being applied, from 1
}

// node is a name in the tree. Hard links are several nodes of one inode.
type node struct {
	inode *ext4.Inode
	names map[string]*node // of a directory
	layer int              // that put the name there last
}

func (n *node) isDir() bool     { return n.inode.Mode&modeType == modeDir }
func (n *node) isSymlink() bool { return n.inode.Mode&modeType == modeSymlink }

func newTree() *tree { return &tree{root: newDir(0)} }

func newDir(layer int) *node {
	return &node{inode: &ext4.Inode{Mode: modeDir | 0o755}, layer: layer}
}

// maxFollow is how many symbolic links a path may lead through, as in Linux.
const maxFollow = 40

var errFollow = errors.New("too many levels of symbolic links")

// applyLayer puts a layer over those that are there. stream is the number of
// its stream.
func (t *tree) applyLayer(ctx context.Context, blob []byte, stream uint32) error {
	toc, err := openTOC(blob)
	if err != nil {
		return err
	}
	t.layer++
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
			return fmt.Errorf("layer entry %q: %w", e.name, err)
		}
	}
}

// apply adds an entry of the current layer. stream is the number of the
// layer's stream.
func (t *tree) apply(e *entry, stream uint32) error {
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
		for name := range dir.names {
			t.hideLower(dir, name)
		}
		return nil
	case kindHardLink:
		return t.link(e)
	}
	if e.name == "" {
		return t.setDir(t.root, e.inode)
	}
	dir, base := split(e.name)
	parent, err := t.walk(dir, true)
	if err != nil {
		return err
	}
	for i := range e.inode.Data {
		e.inode.Data[i].Stream = stream
	}
	if old := parent.names[base]; old != nil && old.isDir() && e.inode.Mode&modeType == modeDir {
		return t.setDir(old, e.inode)
	}
	t.put(parent, base, &node{inode: e.inode})
	return nil
}

// setDir changes the metadata of a directory.
func (t *tree) setDir(n *node, in *ext4.Inode) error {
	if in.Mode&modeType != modeDir {
		return errors.New("the root is not a directory")
	}
	n.inode, n.layer = in, t.layer
	return nil
}

func (t *tree) put(parent *node, base string, n *node) {
	n.layer = t.layer
	if parent.names == nil {
		parent.names = make(map[string]*node)
	}
	parent.names[strings.Clone(base)] = n
}

// link makes another name for a file that is there already.
func (t *tree) link(e *entry) error {
	if e.link == "" {
		return errors.New("a hard link to the root, which is a directory")
	}
	dir, base := split(e.link)
	from, err := t.walk(dir, false)
	if err != nil {
		return err
	}
	var target *node
	if from != nil {
		target = from.names[base]
	}
	if target == nil {
		return fmt.Errorf("a hard link to %q, which is not there", e.link)
	}
	if target.isDir() {
		return fmt.Errorf("a hard link to %q, which is a directory", e.link)
	}
	dir, base = split(e.name)
	if base == "" {
		return errors.New("the root is not a directory")
	}
	parent, err := t.walk(dir, true)
	if err != nil {
		return err
	}
	t.put(parent, base, &node{inode: target.inode})
	return nil
}

// hideLower removes what lower layers have put at and under a name: a layer's
// whiteouts do not touch its own files. A directory that stays for what the
// layer has put in it, and that the layer does not list, is made anew: so it
// does not matter where in the layer the whiteout stands.
func (t *tree) hideLower(dir *node, name string) {
	n := dir.names[name]
	if n == nil {
		return
	}
	for name := range n.names {
		t.hideLower(n, name)
	}
	switch {
	case n.layer == t.layer:
	case len(n.names) == 0:
		delete(dir.names, name)
	default:
		n.inode, n.layer = newDir(t.layer).inode, t.layer
	}
}

// walk finds the directory at a clean path, following symbolic links in every
// part of it. One that is not there is made, or nil if make is false.
func (t *tree) walk(path string, make bool) (*node, error) {
	rest, followed := path, 0
	stack := []*node{t.root}
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
				return nil, fmt.Errorf("%s: %w", path, errFollow)
			}
			target := n.inode.Target
			if strings.HasPrefix(target, "/") {
				stack = stack[:1]
			}
			if len(target)+len(rest) > maxPath {
				return nil, fmt.Errorf("%s: %w", path, errFollow)
			}
			rest = target + "/" + rest
			continue
		case !make:
			return nil, nil
		default:
			// Nothing is there, or a file, which cannot stay.
			n = newDir(t.layer)
			t.put(at, part, n)
		}
		stack = append(stack, n)
	}
	return stack[len(stack)-1], nil
}

// find gives what a path leads to when symbolic links are followed to the end,
// never out of the root, and the path that it has without them; nil where
// nothing is.
func (t *tree) find(path string) (real string, n *node) {
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
			if followed++; followed > maxFollow || len(target)+len(rest) > maxPath {
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

// inodes turns the tree into what ext4.Layout takes. The tree is used up.
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
