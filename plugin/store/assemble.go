package store

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// queueLimit is how many bytes of memory an ingest may hold that are not
	// written or not hashed yet. A Write that would go beyond it waits.
	queueLimit = 8 << 20
	// bigChunk and smallChunk are the sizes of the buffers that Write copies
	// into: big writes get big ones, and many small ones share a small one.
	bigChunk, smallChunk = 1 << 20, 64 << 10
	// flyEvery is after how many bytes the kernel is told to begin writing
	// them to the disk, so that the sync at the end has little left to do.
	flyEvery = 8 << 20
	readSize = 1 << 20
)

// chunk is bytes that a stream has written, on their way to file and hash.
type chunk struct {
	stream *stream
	gen    int // Ingest.gen when it was queued
	off    int64
	buf    []byte
	free   func() // gives buf back to where it came from; nil if it is not to be used again
}

// bufferPool keeps buffers of one size for the next use.
type bufferPool struct {
	size int
	pool sync.Pool
}

var bigPool, smallPool = bufferPool{size: bigChunk}, bufferPool{size: smallChunk}

// get returns an empty buffer, and what gives it back.
func (p *bufferPool) get() (b []byte, free func()) {
	kept, ok := p.pool.Get().(*[]byte)
	if !ok {
		kept = new(make([]byte, 0, p.size))
	}
	return *kept, func() { p.pool.Put(kept) }
}

// freeLocked gives back a chunk's memory. mu must be held.
func (in *Ingest) freeLocked(c *chunk) {
	in.held -= int64(cap(c.buf))
	if c.free != nil {
		c.free()
	}
	c.buf, c.free = nil, nil
	in.cond.Broadcast()
}

// addLocked makes a range present. wmu and mu must be held: the range has been
// written and nothing may write to it again.
func (in *Ingest) addLocked(lo, hi int64) {
	before := in.present.total
	in.present.add(lo, hi)
	if in.present.total == before {
		return
	}
	in.unflown += in.present.total - before
	in.progress = time.Now()
	in.hashLocked()
}

// queueLocked hands a chunk to the pump. mu must be held.
func (in *Ingest) queueLocked(c *chunk) {
	c.stream.pending++
	in.held += int64(cap(c.buf))
	in.queue = append(in.queue, c)
	if in.pumping {
		return
	}
	in.pumping = in.store.spawn(in.pump)
	if !in.pumping {
		in.queue = in.queue[:len(in.queue)-1]
		c.stream.pending--
		in.freeLocked(c)
		c.stream.failLocked(errClosed)
	}
}

// pump writes queued chunks until there are none.
func (in *Ingest) pump() {
	for {
		in.mu.Lock()
		if len(in.queue) == 0 {
			in.pumping, in.queue = false, nil
			in.changedLocked()
			in.mu.Unlock()
			return
		}
		c := in.queue[0]
		in.queue[0] = nil
		in.queue = in.queue[1:]
		in.mu.Unlock()
		in.writeChunk(c)
		in.afterWrite()
	}
}

// writeChunk writes what is missing of a chunk's range.
func (in *Ingest) writeChunk(c *chunk) {
	in.wmu.Lock()
	defer in.wmu.Unlock()
	end := c.off + int64(len(c.buf))
	in.mu.Lock()
	var gaps []span
	if c.gen == in.gen && c.stream.err == nil {
		gaps = in.present.gaps(c.off, end)
	}
	f := in.file
	in.mu.Unlock()
	var err error
	for _, g := range gaps {
		if f == nil {
			err = os.ErrClosed
		} else {
			_, err = f.WriteAt(c.buf[g.lo-c.off:g.hi-c.off], g.lo)
		}
		if err != nil {
			break
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	c.stream.pending--
	if err != nil {
		in.failedLocked(err)
		c.stream.failLocked(fmt.Errorf("write %d bytes at %d of %s: %w", len(c.buf), c.off, in.digest, err))
		gaps = nil
	}
	for _, g := range gaps {
		in.brought.add(g.lo, g.hi)
		in.addLocked(g.lo, g.hi)
	}
	// The hasher may take the bytes from memory if they are what the file
	// has, and if it will come to them soon.
	entire := len(gaps) == 1 && gaps[0] == span{c.off, end}
	if entire && end <= in.present.prefix() && c.off-in.hashed <= queueLimit {
		in.tail = append(in.tail, c)
		in.hashLocked()
	} else {
		in.freeLocked(c)
	}
	in.changedLocked()
}

// afterWrite starts writeback and keeps the sidecar when it is time to. No
// lock may be held.
func (in *Ingest) afterWrite() {
	in.mu.Lock()
	var fly *os.File
	if in.unflown >= flyEvery && !in.whole {
		in.unflown, fly = 0, in.file
	}
	save := !in.saving && in.present.total-in.savedAt >= sidecarEvery && in.savableLocked()
	in.saving = in.saving || save
	in.mu.Unlock()
	if fly != nil {
		startWriteback(fly)
	}
	if !save {
		return
	}
	err := in.save(false)
	in.mu.Lock()
	in.saving = false
	in.mu.Unlock()
	if err != nil {
		in.store.log.Warn("progress not kept", "digest", in.digest, "err", err)
	}
}

// startWriteback has the kernel begin to write a file's dirty pages. It is a
// hint: a file system that cannot is as good, only later.
func startWriteback(f *os.File) {
	c, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) {
		_ = unix.SyncFileRange(int(fd), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	})
}

// hashLocked lets the hasher run if there is something to hash. mu must be
// held.
func (in *Ingest) hashLocked() {
	if in.hashing || in.dead || in.whole || in.file == nil || in.hashed >= in.present.prefix() {
		return
	}
	in.hashing = in.store.spawn(in.hasher)
}

// hasher hashes the prefix as far as it reaches and, when that is the whole
// blob, finishes it.
func (in *Ingest) hasher() {
	var buf []byte
	in.mu.Lock()
	for !in.dead && !in.whole && in.file != nil {
		if in.hashed < in.present.prefix() {
			if in.store.ctx.Err() != nil {
				break
			}
			buf = in.hashSomeLocked(buf)
			continue
		}
		if in.hashed < in.size {
			break
		}
		in.finishing = true
		sum := digest.NewDigest(digest.SHA256, in.hash)
		in.mu.Unlock()
		in.finish(sum)
		in.mu.Lock()
	}
	in.hashing = false
	in.changedLocked()
	in.mu.Unlock()
}

// hashSomeLocked hashes the next bytes: from memory if they have just been
// written, else from the file, into buf, which it makes if need be and
// returns. mu must be held; it is let go of meanwhile.
func (in *Ingest) hashSomeLocked(buf []byte) []byte {
	at, end, gen, h, f := in.hashed, in.present.prefix(), in.gen, in.hash, in.file
	var c *chunk
	for len(in.tail) > 0 && c == nil {
		t := in.tail[0]
		if t.off > at {
			end = min(end, t.off)
			break
		}
		in.tail = in.tail[1:]
		if t.off+int64(len(t.buf)) <= at {
			in.freeLocked(t)
			continue
		}
		c = t
	}
	in.mu.Unlock()
	var err error
	var n int64
	if c != nil {
		n = c.off + int64(len(c.buf)) - at
		h.Write(c.buf[at-c.off:])
	} else {
		if buf == nil {
			buf = make([]byte, readSize)
		}
		n = min(end-at, int64(len(buf)))
		if _, err = io.ReadFull(io.NewSectionReader(f, at, n), buf[:n]); err == nil {
			h.Write(buf[:n])
		}
	}
	in.mu.Lock()
	if c != nil {
		in.freeLocked(c)
	}
	switch {
	case gen != in.gen || in.dead:
	case err != nil:
		in.finishing = true
		in.mu.Unlock()
		in.spoil(fmt.Errorf("read back %d bytes at %d of %s: %w", n, at, in.digest, err), false)
		in.mu.Lock()
	default:
		in.hashed += n
	}
	return buf
}

// finish turns the staging file, of which every byte is there, into a blob; or
// throws the bytes away. Called by the hasher with finishing set.
func (in *Ingest) finish(sum digest.Digest) {
	if sum != in.digest {
		in.spoil(fmt.Errorf("unexpected commit digest %s, expected %s: %w",
			sum, in.digest, errdefs.ErrFailedPrecondition), true)
		return
	}
	if err := in.land(); err != nil {
		in.spoil(fmt.Errorf("finish %s: %w", in.digest, err), false)
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.whole, in.finishing = true, false
	in.store.counter.Completed()
	in.changedLocked()
}

// land syncs the staging file and moves it into blobs/, in an order that
// leaves no moment at which a crash would leave a bad blob there.
func (in *Ingest) land() error {
	f := in.file // not closed or replaced while finishing is set
	if err := f.Sync(); err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != in.size {
		return fmt.Errorf("staging has %d bytes, not %d: %w", fi.Size(), in.size, errdefs.ErrDataLoss)
	}
	// Read-only, but for no more than the umask let it be.
	if err := f.Chmod(fi.Mode().Perm() &^ 0o333); err != nil {
		return err
	}
	path := in.store.blobPath(in.digest)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// A blob that the local store has put there meanwhile has the same bytes.
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	in.store.landed(in.digest, in.size)
	if err := os.Remove(f.Name() + sidecarSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		in.store.log.Warn("sidecar stays until the next start", "digest", in.digest, "err", err)
	}
	return nil
}

// spoil throws bytes away that are wrong, or that cannot be made a blob. Called
// by the hasher with finishing set.
//
// If they are wrong for the first time, and some came from the registry and
// some from Fill, the registry's are kept: its streams were sent there behind a
// prefix of Fill's, and containerd cannot be told that it has to begin before
// that after all. Fill may bring the rest once more, from others. Otherwise all
// go, and the streams whose bytes they were fail.
func (in *Ingest) spoil(err error, wrong bool) {
	in.store.log.Warn("bytes thrown away", "digest", in.digest, "size", in.size, "err", err)
	lost := false
	in.discard(func() (keep ranges, may bool) {
		in.finishing = false
		if wrong {
			in.failed, in.fault = in.failed+1, err
			in.store.counter.Mismatched()
		}
		if wrong && in.failed == 1 && in.filling && in.writingLocked() > 0 && in.brought.total < in.size {
			in.progress = time.Now()
			return in.brought.clone(), true
		}
		if !wrong {
			in.failedLocked(err)
		}
		for w := range in.streams {
			lost = lost || w.released
			if w.released {
				w.failLocked(err)
			}
		}
		if lost && wrong {
			in.store.counter.Failed()
		}
		return ranges{}, true
	})
}

// discard throws away all bytes but those that may, which is called with mu
// held, says to keep; or does nothing if it says so. No lock may be held.
func (in *Ingest) discard(may func() (keep ranges, may bool)) {
	in.wmu.Lock()
	defer in.wmu.Unlock()
	in.mu.Lock()
	keep, ok := may()
	if !ok {
		in.mu.Unlock()
		return
	}
	in.gen++
	in.present, in.brought, in.synced, in.savedAt, in.unflown = keep, keep.clone(), ranges{}, 0, 0
	in.hash, in.hashed = sha256.New(), 0
	for _, c := range in.tail {
		in.freeLocked(c)
	}
	in.tail = nil
	f := in.file
	err := os.Remove(in.store.stagingPath(in.digest) + sidecarSuffix)
	in.changedLocked()
	in.mu.Unlock()
	// Nobody writes before wmu is let go of.
	if f != nil && keep.total == 0 {
		err = errors.Join(err, f.Truncate(0))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		in.store.log.Warn("staging not emptied", "digest", in.digest, "err", err)
	}
}
