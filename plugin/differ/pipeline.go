package differ

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

const (
	// blockSize is what the decoder hands on at once.
	blockSize = 1 << 20
	// blocksAhead is how far the decoder may be ahead of the slower of hashing
	// and unpacking. It evens out layers with many small files.
	blocksAhead = 8
)

// block is a part of the uncompressed layer, read by two goroutines.
type block struct {
	data []byte // blockSize bytes of room
	n    int
	refs atomic.Int32 // readers that still need it
}

// stream is an uncompressed layer as it comes out of the decoder. Read belongs
// to one goroutine, the one that unpacks.
type stream struct {
	d      *Differ
	ctx    context.Context // ends the stream early
	blocks chan *block     // closed by the decoder, after err is set
	err    error           // of the decoder; to be read after blocks is closed

	cur *block // being read
	off int    // bytes of cur that were read
}

// Read implements io.Reader. At the end of the layer it returns the decoder's
// error, so what was read without error is right only as far as the layer's
// checksum, which comes last, is.
func (s *stream) Read(p []byte) (int, error) {
	if err := s.next(); err != nil {
		return 0, err
	}
	n := copy(p, s.cur.data[s.off:s.cur.n])
	s.off += n
	return n, nil
}

// drain reads up to the end of the layer: what follows the end of the archive
// counts for its digest, and the compressed form's checksum is behind it.
func (s *stream) drain() error {
	for {
		err := s.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.off = s.cur.n
	}
}

// next makes cur a block with bytes left.
func (s *stream) next() error {
	if s.cur != nil && s.off < s.cur.n {
		return nil
	}
	if s.cur != nil {
		s.d.done(s.cur)
		s.cur = nil
	}
	select {
	case b, ok := <-s.blocks:
		if !ok {
			if s.err != nil {
				return s.err
			}
			return io.EOF
		}
		s.cur, s.off = b, 0
		return nil
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

func (d *Differ) done(b *block) {
	if b.refs.Add(-1) == 0 {
		d.blocks.Put(b)
	}
}

// unpack has apply read the uncompressed content of f, and returns its digest
// and size. One goroutine decodes and one hashes; both are gone when it returns.
func (d *Differ) unpack(ctx context.Context, f *os.File, compressed bool, apply func(context.Context, *stream) error) (digest.Digest, int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	s := &stream{d: d, ctx: ctx, blocks: make(chan *block, blocksAhead)}
	toHash := make(chan *block, blocksAhead)
	running.Go(func() {
		defer close(toHash)
		defer close(s.blocks)
		// A panic here would take the whole daemon along, and a broken layer
		// must not.
		defer func() {
			if p := recover(); p != nil {
				d.panicked()
				s.err = fmt.Errorf("decoder panicked: %v\n%s", p, debug.Stack())
			}
		}()
		s.err = d.decode(ctx, f, compressed, s.blocks, toHash)
	})
	digester := digest.Canonical.Digester()
	var size int64 // of the hashing goroutine, until hashed is closed
	hashed := make(chan struct{})
	running.Go(func() {
		defer close(hashed)
		for b := range toHash {
			_, _ = digester.Hash().Write(b.data[:b.n]) // a hash has no errors
			size += int64(b.n)
			d.done(b)
		}
	})

	err := apply(ctx, s)
	if err == nil {
		err = s.drain()
	}
	if err != nil {
		return "", 0, err
	}
	<-hashed
	return digester.Digest(), size, nil
}

// decode reads the uncompressed content of f and sends each block to all of
// outs. Readers put it back into the pool.
func (d *Differ) decode(ctx context.Context, f *os.File, compressed bool, outs ...chan<- *block) (err error) {
	r, closer, err := d.decoder(ctx, f, compressed)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := closer(); err == nil {
			err = cerr
		}
	}()
	for {
		b := d.blocks.Get().(*block) //nolint:errcheck // nothing else is put there
		b.n, err = fill(r, b.data)
		if b.n > 0 {
			b.refs.Store(int32(len(outs)))
			for _, out := range outs {
				select {
				case out <- b:
				case <-ctx.Done():
					return context.Cause(ctx) // the block is the garbage collector's
				}
			}
		} else {
			d.blocks.Put(b)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// fill reads until p is full or r ends. Unlike io.ReadFull it hands on io.EOF
// as it is: a decoder's io.ErrUnexpectedEOF means that the layer is cut short.
func fill(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}
