package registry

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// decompressAll decompresses a file.
func decompressAll(b []byte) ([]byte, string, error) {
	r, kind, err := decompress(iotest.HalfReader(bytes.NewReader(b)))
	if err != nil || kind == "" {
		return nil, kind, err
	}
	defer r.Close()
	got, err := io.ReadAll(struct{ io.Reader }{r})
	return got, kind, err
}

// Any number of zeros behind a compressed file is padding; any other bytes there are
// reported.
func TestPadding(t *testing.T) {
	content := noise(300_000, 11)
	half := len(content) / 2
	for _, args := range [][]string{{"gzip", "-c"}, {"zstd", "-c", "--no-check"}, {"zstd", "-c", "--check"}, {"bzip2", "-c"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			one := tool(t, content, args...)
			two := slices.Concat(tool(t, content[:half], args...), tool(t, content[half:], args...))
			for _, n := range []int{0, 1, 2, 3, 4, 5, 510, 512, 10_240, 3 << 20} {
				for name, b := range map[string][]byte{"one stream": one, "two streams": two} {
					got, kind, err := decompressAll(append(bytes.Clone(b), make([]byte, n)...))
					if err != nil || kind != args[0] || !bytes.Equal(got, content) {
						t.Errorf("%s and %d zeros: %d bytes, %v", name, n, len(got), err)
					}
				}
			}
			for _, junk := range []string{"x", "xy", "\x00x", "\x00\x00x", "\x00\x00\x00\x00x", "\x00x\x00", "BZ", "\x1f\x8b", "more bytes", strings.Repeat("\x00", 2<<20) + "x"} {
				if got, _, err := decompressAll(append(bytes.Clone(one), junk...)); err == nil {
					t.Errorf("%d bytes, and %.20q behind its end are passed over", len(got), junk)
				} else if len(junk) > 2 && !errors.Is(err, errJunk) {
					t.Errorf("%.20q: %v", junk, err)
				}
			}
			// Zeros do not complete a truncated stream.
			for _, cut := range []int{1, 2, 3, 4, 5, 8, 20, 1000} {
				for _, n := range []int{0, 1, 4, 512} {
					if got, _, err := decompressAll(append(bytes.Clone(one[:len(one)-cut]), make([]byte, n)...)); err == nil && !bytes.Equal(got, content) {
						if n >= cut && slices.Contains(args, "--no-check") {
							continue // these may have been its bytes
						}
						t.Errorf("without its last %d bytes, but with %d zeros: %d bytes", cut, n, len(got))
					}
				}
			}
		})
	}
}

// An archive with padding is read; an archive with other bytes appended fails.
func TestPaddedArchive(t *testing.T) {
	plain, img, _ := layoutTar(t)
	for _, args := range [][]string{{"gzip", "-c"}, {"zstd", "-c"}, {"bzip2", "-c"}, {"xz", "-c"}} {
		b := tool(t, plain, args...)
		padded := append(bytes.Clone(b), make([]byte, 10_240-len(b)%10_240)...)
		c := newClient(t, Options{TempDir: t.TempDir()})
		got, err := openRepo(t, c, "oci-archive:"+tempFile(t, padded)).Resolve(t.Context(), nil)
		if err != nil || got.Digest != img.Digest {
			t.Errorf("%s: %v", args[0], err)
		}
		_, err = openRepo(t, c, "oci-archive:"+tempFile(t, append(b, "something"...))).Resolve(t.Context(), nil)
		if err == nil || args[0] != "xz" && !errors.Is(err, errJunk) || !strings.Contains(err.Error(), "compressed by "+args[0]) {
			t.Errorf("%s: %v", args[0], err)
		}
	}
}

// FuzzPadding checks that no decompressor accepts other content, or junk after the end.
func FuzzPadding(f *testing.F) {
	content := bytes.Repeat([]byte("thaw "), 1000)
	var files [][]byte
	for _, args := range [][]string{{"gzip", "-c"}, {"zstd", "-c"}, {"bzip2", "-c"}} {
		files = append(files, tool(f, content, args...))
	}
	f.Add(uint8(0), []byte{})
	f.Add(uint8(1), []byte{0, 0, 0})
	f.Add(uint8(2), []byte("\x00BZ"))
	f.Fuzz(func(t *testing.T, kind uint8, tail []byte) {
		b := append(bytes.Clone(files[int(kind)%len(files)]), tail...)
		got, name, err := decompressAll(b)
		zeros := len(bytes.Trim(tail, "\x00")) == 0
		if zeros && (err != nil || !bytes.Equal(got, content)) {
			t.Fatalf("%s with %d zeros: %v", name, len(tail), err)
		}
		if !zeros && err == nil && len(tail) < 8 {
			t.Fatalf("%s with %q", name, tail) // too short for another stream
		}
	})
}

func BenchmarkDecompress(b *testing.B) {
	content := bytes.Repeat(noise(1<<20, 3), 16)
	for _, args := range [][]string{{"gzip", "-1", "-c"}, {"zstd", "-1", "-c"}} {
		file := tool(b, content[:4<<20], args...)
		b.Run(args[0], func(b *testing.B) {
			b.SetBytes(4 << 20)
			for b.Loop() {
				r, _, err := decompress(bufio.NewReader(bytes.NewReader(file)))
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.Copy(io.Discard, struct{ io.Reader }{r})
				r.Close()
				if err != nil || n != 4<<20 {
					b.Fatal(fmt.Errorf("%d bytes: %w", n, err))
				}
			}
		})
	}
}
