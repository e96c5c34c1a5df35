package differ

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// igzipMin is the size from which on starting a process for a layer pays.
const igzipMin = 1 << 20

// decoder returns a reader of the uncompressed content of f. The second result
// is to be called after the last Read; it waits for whatever the decoder
// started, and says what it had to say about the end of the data.
func (d *Differ) decoder(ctx context.Context, f *os.File, compressed bool) (io.Reader, func() error, error) {
	nothing := func() error { return nil }
	if !compressed {
		return f, nothing, nil
	}
	head := make([]byte, 4096)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	head = head[:n]
	switch compression.DetectCompression(head) {
	case compression.Gzip:
		if d.igzip != "" && worthIgzip(f, head) {
			return startIgzip(ctx, d.igzip, f)
		}
		// It has to be a bufio.Reader: for readers it does not know the decoder
		// falls back to a loop that is much slower.
		r, err := gzip.NewReader(bufio.NewReaderSize(f, blockSize))
		if err != nil {
			return nil, nil, err
		}
		return r, r.Close, nil
	case compression.Zstd:
		r, err := zstd.NewReader(f, zstd.WithDecoderLowmem(false))
		if err != nil {
			return nil, nil, err
		}
		return r, func() error { r.Close(); return nil }, nil
	default:
		return f, nothing, nil
	}
}

// worthIgzip reports whether igzip is likely faster than our own decoder for
// the gzip file f that begins with head. It is, by far, unless there is little
// to inflate: then all that counts is that it copies through a pipe.
func worthIgzip(f *os.File, head []byte) bool {
	fi, err := f.Stat()
	if err != nil || fi.Size() < igzipMin {
		return false
	}
	if stored(head) {
		return false
	}
	// The last four bytes are the uncompressed size, modulo 4 GiB and of the
	// last member only. If it is just about the file's own, the data is random.
	var tail [4]byte
	if _, err := f.ReadAt(tail[:], fi.Size()-4); err != nil {
		return false
	}
	whole := int64(binary.LittleEndian.Uint32(tail[:]))
	size := fi.Size() & (1<<32 - 1)
	return whole < size-size/16 || whole > size+size/16
}

// stored reports whether the first block in the gzip file that begins with head
// is stored, that is not compressed. It is false if head is too short to tell.
func stored(head []byte) bool {
	const (
		fixed                             = 10
		hasCRC, hasExtra, hasName, hasCom = 1 << 1, 1 << 2, 1 << 3, 1 << 4
	)
	if len(head) < fixed {
		return false
	}
	flags, p := head[3], head[fixed:]
	if flags&hasExtra != 0 {
		if len(p) < 2 {
			return false
		}
		n := 2 + int(binary.LittleEndian.Uint16(p))
		if n > len(p) {
			return false
		}
		p = p[n:]
	}
	for _, text := range []byte{hasName, hasCom} {
		if flags&text == 0 {
			continue
		}
		end := bytes.IndexByte(p, 0)
		if end < 0 {
			return false
		}
		p = p[end+1:]
	}
	if flags&hasCRC != 0 {
		p = p[min(2, len(p)):]
	}
	return len(p) > 0 && p[0]&0b110 == 0
}

// startIgzip has igzip read f itself, and returns the end of a pipe it writes
// to. It is killed when ctx ends.
func startIgzip(ctx context.Context, path string, f *os.File) (io.Reader, func() error, error) {
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	// Fewer switches between the two; what is refused is left as it is.
	_, _ = unix.FcntlInt(pw.Fd(), unix.F_SETPIPE_SZ, blockSize)
	var says bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "-d", "-c")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, pw, &says
	err = cmd.Start()
	_ = pw.Close()
	if err != nil {
		_ = pr.Close()
		return nil, nil, err
	}
	return pr, func() error {
		_ = pr.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("igzip: %w: %s", err, bytes.TrimSpace(says.Bytes()))
		}
		return nil
	}, nil
}
