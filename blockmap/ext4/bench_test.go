package ext4

import (
	"fmt"
	"io"
	"testing"
)

// system makes a tree of n files in directories of 20, in two streams, of which
// every 50th file does not survive.
func system(n int) *Inode {
	root := dir()
	var block uint32
	var sub *Inode
	for i := range n {
		if i%20 == 0 {
			sub = dir()
			if i%400 == 0 {
				root.Entries = append(root.Entries, Dirent{fmt.Sprintf("package-%d", i), dir()})
			}
			parent := root.Entries[len(root.Entries)-1].Inode
			parent.Entries = append(parent.Entries, Dirent{fmt.Sprintf("module-%d", i), sub})
		}
		blocks := uint32(1 + i%7)
		in := file(int64(blocks)*blockSize-100, Run{0, 1 + uint32(i*2/n), block, blocks})
		if block += blocks; i%50 == 0 {
			block++
		}
		in.Mtime = Time{1_600_000_000 + int64(i), uint32(i)}
		sub.Entries = append(sub.Entries, Dirent{fmt.Sprintf("source_file_%d.py", i), in})
	}
	return root
}

func BenchmarkLayout(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprint("files=", n), func(b *testing.B) {
			root := system(n)
			o := testOptions
			o.Size = 8 << 30
			b.ReportAllocs()
			for b.Loop() {
				fs, err := Layout(root, o)
				if err != nil {
					b.Fatal(err)
				}
				if err := fs.WriteMeta(io.Discard); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
}

func BenchmarkLayoutOneDirectory(b *testing.B) {
	root := dir()
	for _, name := range names("file", 100_000) {
		root.Entries = append(root.Entries, Dirent{name, file(0)})
	}
	b.ReportAllocs()
	for b.Loop() {
		fs, err := Layout(root, testOptions)
		if err != nil {
			b.Fatal(err)
		}
		if err := fs.WriteMeta(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	wide := dir()
	for _, name := range names("d", 50_000) {
		wide.Entries = append(wide.Entries, Dirent{name, dir(Dirent{"f", file(0)})})
	}
	for name, root := range map[string]*Inode{"files": system(100_000), "directories": wide} {
		b.Run(name, func(b *testing.B) {
			fs := layout(b, root, testOptions)
			d := memoryImage(b, fs)
			b.ReportAllocs()
			for b.Loop() {
				if err := Check(d, d.size); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
