package ext4

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"thaw/blockmap"
)

// planRandomly gives the inodes of a tree places in a plan of some layers, leaves some
// without, and plans inodes that are in no tree.
func planRandomly(r *rand.Rand, root *Inode) *Plan {
	blocks := make(map[uint32]uint32)
	var inodes []*Inode
	seen := make(map[*Inode]bool)
	var walk func(in *Inode)
	walk = func(in *Inode) {
		if seen[in] {
			return
		}
		seen[in] = true
		inodes = append(inodes, in)
		for _, run := range in.Data {
			blocks[run.Stream] = max(blocks[run.Stream], run.Block+run.Count)
		}
		for _, e := range in.Entries {
			walk(e.Inode)
		}
	}
	walk(root)
	p := new(Plan)
	layers := 1 + r.IntN(5)
	for layer := range layers {
		p.Layer(uint32(layer+1), blocks[uint32(layer+1)]+r.Uint32N(3))
		for _, in := range inodes {
			if r.IntN(layers+1) > 0 {
				continue
			}
			var entries int64
			for _, e := range in.Entries {
				if r.IntN(10) > 0 { // the rest comes with a later layer
					entries += EntrySize(e.Name)
				}
			}
			p.Add(in, entries)
		}
		for range r.IntN(20) {
			p.Add(symlink(strings.Repeat("gone", 1+r.IntN(100))), 0)
		}
	}
	return p
}

func TestPlannedTrees(t *testing.T) {
	n := uint64(20)
	if testing.Short() {
		n = 4
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 9))
			o := testOptions
			o.Size = r.Int64N(1 << (20 + r.IntN(14)))
			root := randomTree(r, 1<<r.IntN(12))
			o.Plan = planRandomly(r, root)
			fs := verify(t, root, o)

			// Each stream of the plan lies on the device as it is.
			offset := make(map[uint32]uint32)
			for _, run := range fs.Runs() {
				if run.Stream == 0 || int(run.Stream) > len(o.Plan.layers) {
					continue
				}
				if was, ok := offset[run.Stream]; ok && was != run.Device-run.Block {
					t.Fatalf("run %v is not where the stream begins, at %d", run, was)
				}
				offset[run.Stream] = run.Device - run.Block
			}
		})
	}
}

// What is planned does not move when the tree grows and shrinks: neither its number nor
// its blocks.
func TestPlannedPlacesStay(t *testing.T) {
	type state struct {
		plan *Plan
		root *Inode
		base map[string]*Inode
	}
	build := func() state {
		s := state{plan: new(Plan), root: dir(), base: make(map[string]*Inode)}
		s.plan.Layer(1, 400)
		sub := dir()
		var size int64
		for i := range uint32(200) {
			name := fmt.Sprint("file ", i)
			in := file(4096, Run{0, 1, 2 * i, 1})
			if i%50 == 0 {
				in = symlink(strings.Repeat("long", 100))
			}
			if i%7 == 0 && in.is(modeRegular) {
				in.Xattrs = []Xattr{{"user.large", bytes.Repeat([]byte{byte(i / 70)}, 300)}}
			}
			sub.Entries = append(sub.Entries, Dirent{name, in})
			size += EntrySize(name)
			s.base[name] = in
		}
		s.root.Entries = []Dirent{{"sub", sub}}
		s.base["sub"] = sub
		s.plan.Add(s.root, EntrySize("sub"))
		s.plan.Add(sub, size)
		for _, e := range sub.Entries {
			s.plan.Add(e.Inode, 0)
		}
		return s
	}
	o := testOptions
	lay := func(s state) *Filesystem {
		o.Plan = s.plan
		return verify(t, s.root, o)
	}
	first := build()
	before := lay(first)

	second := build()
	second.plan.Layer(2, 5)
	sub := second.base["sub"]
	for i := range 1000 {
		sub.Entries = append(sub.Entries, Dirent{fmt.Sprint("new ", i), file(0)})
	}
	second.plan.Add(sub, 1200*EntrySize("file 111"))
	// The directory gets other metadata, as a layer gives it.
	changed := &Inode{Mode: modeDir | 0o700, Entries: sub.Entries}
	changed.TakePlace(sub)
	second.root.Entries[0].Inode = changed
	second.base["sub"] = changed
	// And it loses a file.
	changed.Entries = changed.Entries[1:]
	after := lay(second)

	place := func(fs *Filesystem, in *Inode) node { return fs.nodes[in.index] }
	for name, in := range first.base {
		if name == "file 0" {
			continue
		}
		was, is := place(before, in), place(after, second.base[name])
		if was.number != is.number || was.tree != is.tree || was.xattr != is.xattr || name != "sub" && was.block != is.block {
			t.Errorf("%s has moved: inode %d at %d, %d, %d, and now %d at %d, %d, %d",
				name, was.number, was.block, was.tree, was.xattr, is.number, is.block, is.tree, is.xattr)
		}
		if name == "sub" && was.block == is.block {
			t.Error("the directory has outgrown its place and is still there")
		}
		if len(in.Data) > 0 && before.device(1, in.Data[0].Block) != after.device(1, in.Data[0].Block) {
			t.Errorf("the content of %s has moved", name)
		}
	}
	var meta [2]bytes.Buffer
	for i, fs := range []*Filesystem{before, after} {
		if err := fs.WriteMeta(&meta[i]); err != nil {
			t.Fatal(err)
		}
	}
	blocks := make(map[string]bool)
	for b := meta[0].Bytes(); len(b) > 0; b = b[blockSize:] {
		blocks[string(b[:blockSize])] = true
	}
	same := 0
	for b := meta[1].Bytes(); len(b) > 0; b = b[blockSize:] {
		if blocks[string(b[:blockSize])] {
			same++
		}
	}
	// Of the inode table only the directory's block differs, and that of the file.
	if n := meta[0].Len() / blockSize; same < n*6/10 {
		t.Errorf("%d of %d blocks of metadata are as they were", same, n)
	}
}

func TestPlanMisused(t *testing.T) {
	in := file(4096, Run{0, 1, 9, 1})
	twin := file(0)
	for name, c := range map[string]struct {
		plan func(p *Plan)
		want string
	}{
		"a stream that is too short": {func(p *Plan) { p.Layer(1, 9); p.Add(in, 0) }, "which has 9 in the plan"},
		"the same place twice":       {func(p *Plan) { p.Layer(1, 10); p.Add(in, 0); twin.TakePlace(in) }, "the same place"},
		"too much": {func(p *Plan) {
			for i := range uint32(5) {
				p.Layer(i+1, 1<<30)
			}
		}, "a device has at most"},
	} {
		in.place, twin.place = place{}, place{}
		o := testOptions
		o.Plan = new(Plan)
		c.plan(o.Plan)
		if _, err := Layout(dir(Dirent{"in", in}, Dirent{"twin", twin}), o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	in.place, twin.place = place{}, place{}
	other := new(Plan)
	other.Layer(1, 10)
	other.Layer(2, 0)
	other.Add(in, 0)
	o := testOptions
	o.Plan = new(Plan)
	o.Plan.Layer(1, 10)
	if _, err := Layout(dir(Dirent{"in", in}), o); err == nil || !strings.Contains(err.Error(), "another plan") {
		t.Errorf("a place in another plan: %v", err)
	}
	o.Plan = nil // then places mean nothing
	fs := layout(t, dir(Dirent{"in", in}), o)
	if runs := fs.Runs(); runs[len(runs)-1] == (blockmap.Run{}) || fs.nodes[1].number != firstInode {
		t.Errorf("without a plan: inode %d", fs.nodes[1].number)
	}
}
