package blocktest_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"thaw/blockmap/blocktest"
)

// A sector is lost or kept as a whole, also if it was being written during a sync.
func TestPowerCutTearsNoSector(t *testing.T) {
	const sector, page = 512, 4096
	for seed := range uint64(100) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fsys, path := blocktest.NewFS(), filepath.Join(t.TempDir(), "data")
		f, err := fsys.Open(path, true)
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		done := make(chan struct{})
		all.Go(func() {
			defer close(done)
			for i := range 200 {
				if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i)}, page), 0); err != nil {
					t.Error(err)
				}
			}
		})
		all.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := f.Sync(); err != nil {
					t.Error(err)
				}
				// What is lost from now on is what this sync has seen.
			}
		})
		all.Wait()
		f.Close()
		if err := fsys.PowerCut(rng); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(b); at += sector {
			if s := b[at : at+sector]; !bytes.Equal(s, bytes.Repeat(s[:1], sector)) {
				t.Fatalf("seed %d: the sector at %d is torn", seed, at)
			}
		}
	}
}
