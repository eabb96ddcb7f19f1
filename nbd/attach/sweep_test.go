package attach

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// Sweep removes the node of a killed process that has its token, and no other node.
func TestSweep(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d == nbdByIoctl {
			t.Log("such a node ends with its process")
			return
		}
		other := attachTo(t, d, newDevice(testSize), Options{})
		token := NewToken()
		s, err := startServer(t, d, newFile(t), "rw", "", token)
		if err != nil {
			t.Fatal(err)
		}
		if s.state.Token != token {
			t.Fatalf("the node has the token %s, want %s", s.state.Token, token)
		}
		s.kill()
		for range 2 { // the second time there is nothing
			if err := Sweep(aCtx(t), token); err != nil {
				t.Fatal(err)
			}
			if err := Remove(aCtx(t), s.state); !errors.Is(err, ErrGone) {
				t.Errorf("after a sweep: %v", err)
			}
		}
		f := open(t, other.Path, unix.O_RDONLY|unix.O_DIRECT)
		f.mustRead(blockmap.Range(0, 4096), newDevice(testSize).Content(blockmap.Range(0, 4096)))
	})
}

// A node that something is mounted on is not swept.
func TestSweepMounted(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != FUSE { // without a server, nobody can mount or unmount the others
			return
		}
		token := NewToken()
		s, err := startServer(t, d, newFile(t), "ro", "", token)
		if err != nil {
			t.Fatal(err)
		}
		f, err := openExclusive(s.state.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		s.kill()
		if err := Sweep(aCtx(t), token); !errors.Is(err, ErrBusy) {
			t.Errorf("a node that another program has for itself: %v", err)
		}
		f.Close()
		if err := Sweep(aCtx(t), token); err != nil {
			t.Error(err)
		}
	})
}

// Sweep removes what is left of a node of ublk at each step of its life: it was added; its
// parameters were set; it was stopped.
func TestSweepSteps(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != UBLK {
			return
		}
		c, err := openUBLK()
		if err != nil {
			t.Fatal(err)
		}
		defer c.close()
		for step := range 2 {
			token := NewToken()
			info := ublkInfo{queues: 1, depth: 64, maxIOBytes: ublkMaxIO, devID: ^uint32(0), pid: int32(os.Getpid()), flags: ublkFNeeded | ublkFRecovery, mark: ublkMark(token)}
			if err := exchange(aCtx(t), c, "ADD_DEV", ublkAdd, ^uint32(0), &info, int(unsafe.Sizeof(info))); err != nil {
				t.Fatal(err)
			}
			if step == 1 {
				p := ublkParams{len: ublkParamsLen, types: ublkParamBasic, logicalShift: 9, physicalShift: 12, optShift: 12, min: 12, maxSectors: 8, sectors: 4096}
				if err := exchange(aCtx(t), c, "SET_PARAMS", ublkSetParams, info.devID, &p, ublkParamsLen); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := c.info(aCtx(t), info.devID); err != nil || got.mark != ublkMark(token) {
				t.Fatalf("step %d: the device has the mark %x: %v", step, got.mark, err)
			}
			if err := Sweep(aCtx(t), NewToken()); err != nil {
				t.Error(err)
			}
			if _, err := c.info(aCtx(t), info.devID); err != nil {
				t.Fatalf("step %d: a sweep for another token: %v", step, err)
			}
			if err := Sweep(aCtx(t), token); err != nil {
				t.Error(err)
			}
			if _, err := c.info(aCtx(t), info.devID); !errors.Is(err, ErrGone) {
				t.Errorf("step %d: after a sweep: %v", step, err)
			}
		}
		n := attachTo(t, d, newDevice(testSize), Options{Token: NewToken()})
		if err := n.driver.(*ublkDevice).control.stop(aCtx(t), n.state.Number); err != nil {
			t.Fatal(err)
		}
		<-n.Gone()
		if err := Sweep(aCtx(t), n.state.Token); err != nil {
			t.Error(err)
		}
		if _, err := c.info(aCtx(t), n.state.Number); !errors.Is(err, ErrGone) {
			t.Errorf("a device that was stopped, after a sweep: %v", err)
		}
	})
}

// A node that is not below the /dev of this process, but that somebody has mounted who sees it
// elsewhere, is found to be mounted.
func TestMountedElsewhere(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		n := attachTo(t, d, newDevice(testSize), Options{})
		dev := t.TempDir()
		path := filepath.Join(dev, filepath.Base(n.Path))
		f, err := openExclusive(n.Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := notMounted(aCtx(t), path); !errors.Is(err, ErrBusy) {
			t.Errorf("it is in use: %v", err)
		}
		f.Close()
		if err := notMounted(aCtx(t), path); err != nil {
			t.Errorf("it is not in use: %v", err)
		}
		if err := notMounted(aCtx(t), filepath.Join(dev, "no-disk")); err != nil {
			t.Errorf("no disk, such as one of ublk that was never started: %v", err)
		}
		if left, err := os.ReadDir(dev); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}

// A process that cannot see the kernel's disks does not claim that none is left.
func TestSweepWithoutSys(t *testing.T) {
	old := sysBlock
	defer func() { sysBlock = old }()
	sysBlock = filepath.Join(t.TempDir(), "block")
	if err := Sweep(aCtx(t), NewToken()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without /sys: %v", err)
	}
}

func TestTokens(t *testing.T) {
	a, b := NewToken(), NewToken()
	if a == b || !ValidToken(a) {
		t.Errorf("tokens %s, %s", a, b)
	}
	for _, bad := range []string{"", "X", strings.Repeat("A", 64), strings.Repeat("a", 26), strings.Repeat("A", 25) + "/"} {
		if ValidToken(bad) {
			t.Errorf("%q is a token", bad)
		}
		if err := Sweep(t.Context(), bad); err == nil {
			t.Errorf("a sweep for %q succeeds", bad)
		}
		if bad == "" {
			continue // Attach makes one
		}
		if _, err := Attach(t.Context(), newDevice(testSize), Options{Token: bad}); err == nil {
			t.Errorf("a node with the token %q", bad)
		}
	}
}
