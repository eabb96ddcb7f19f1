package attach

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A process can die when the kernel has made a node for it, and it has not kept the node's
// State yet. So whoever must not leave nodes behind keeps a token before it attaches, and
// the next process sweeps what has it. The kernel keeps the token with each node.

// NewToken makes a token that no other node has.
func NewToken() string { return rand.Text() }

var tokenForm = regexp.MustCompile(`^[A-Z2-7]{26,63}$`)

// ValidToken reports whether NewToken may have made a token.
func ValidToken(token string) bool { return tokenForm.MatchString(token) }

// Sweep removes what a process that was killed has left of the node with a token, whichever
// driver it has. It does so too where the process was about to remove the node. That there is
// none is no error, but that none can be seen is one. It fails with ErrBusy where the node is
// mounted, or another process serves it. A node of nbd that was made by ioctl ends with its
// process.
func Sweep(ctx context.Context, token string) error {
	if !ValidToken(token) {
		return fmt.Errorf("sweep: %.100q is no token", token)
	}
	if _, err := os.Stat(sysBlock); err != nil {
		return fmt.Errorf("sweep: look for nodes: %w: mount sysfs on /sys", err)
	}
	err := errors.Join(sweepUBLK(ctx, token), sweepNBD(ctx, token), sweepFUSE(ctx, token))
	if err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	return nil
}

func sweepUBLK(ctx context.Context, token string) error {
	numbers, err := numbered("/sys/class/ublk-char", "ublkc")
	if err != nil || len(numbers) == 0 {
		return err
	}
	c, err := openUBLK()
	if err != nil {
		return err
	}
	defer c.close()
	for _, id := range numbers {
		if err := c.sweep(ctx, id, token); err != nil && !errors.Is(err, ErrGone) {
			return fmt.Errorf("%s: %w", nodePath(UBLK, id), err)
		}
	}
	return nil
}

func (c *ublkControl) sweep(ctx context.Context, id uint32, token string) error {
	ctx, cancel := context.WithTimeout(ctx, ublkPatience)
	defer cancel()
	for {
		info, err := c.info(ctx, id)
		if err != nil {
			return err
		}
		if info.mark != ublkMark(token) {
			return nil
		}
		// The kernel forgets the process when it has noticed its end.
		if _, alive := processStart(int(info.pid)); info.pid <= 0 || !alive {
			return c.removeUnserved(ctx, id)
		}
		if sleep(ctx, 10*time.Millisecond) != nil {
			return fmt.Errorf("process %d serves it: %w", info.pid, ErrBusy)
		}
	}
}

func sweepNBD(ctx context.Context, token string) error {
	numbers, err := numbered(sysBlock, "nbd")
	if err != nil {
		return err
	}
	for _, number := range numbers {
		if mark, err := nbdMark(fmt.Sprintf("/sys/block/nbd%d/", number)); err != nil || mark != token {
			continue // it is not connected, or another's
		}
		path := nodePath(NBD, number)
		err := notMounted(ctx, path)
		if err == nil {
			err = disconnect(ctx, number)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func sweepFUSE(ctx context.Context, token string) error {
	numbers, err := numbered(sysBlock, "loop")
	if err != nil {
		return err
	}
	for _, number := range numbers {
		// Only a device of thaw is opened: to open another one may wait for its file.
		file, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", number))
		if err != nil || !strings.HasPrefix(filepath.Base(string(file)), fuseFilePrefix) {
			continue
		}
		s := State{Driver: FUSE, Number: number, Path: nodePath(FUSE, number), Token: token}
		l, err := openLoop(s, false) // not exclusively: it may be another's, and mounted
		if err == nil {
			l.f.Close()
			err = removeFUSE(ctx, s)
		}
		if err != nil && !errors.Is(err, ErrGone) {
			return fmt.Errorf("%s: %w", s.Path, err)
		}
	}
	return nil
}

// sysBlock is where the kernel lists disks. It is a variable for tests.
var sysBlock = "/sys/block"

// numbered returns, in order, the numbers n of what a directory has with the name prefix and
// n. It is empty where there is no directory.
func numbered(dir, prefix string) (numbers []uint32, err error) {
	list, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range list {
		if text, ok := strings.CutPrefix(e.Name(), prefix); ok {
			if n, err := strconv.ParseUint(text, 10, 20); err == nil {
				numbers = append(numbers, uint32(n))
			}
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}
