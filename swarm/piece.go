package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"
	"github.com/containerd/errdefs"
)

// Data is a blob's own bytes, to which its torrents read and write.
// All methods are called from many goroutines at once, and Present also with
// the torrent client locked: it must be quick and must not call this package.
type Data interface {
	io.ReaderAt
	// WriteAt takes a chunk that is not verified yet. Bytes that are present
	// already are to be left alone and counted as written.
	io.WriterAt
	// MarkPresent says that the n bytes at off have the hash of their piece.
	MarkPresent(off, n int64) error
	// Present reports whether all n bytes at off are there.
	Present(off, n int64) bool
}

// buffers are what pieces are hashed through.
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

func getBuffer() *[]byte  { return buffers.Get().(*[]byte) } //nolint:errcheck // nothing else is put there
func putBuffer(b *[]byte) { buffers.Put(b) }

// gate lets Close wait until nothing touches a blob's Data any more: dropping
// a torrent does not wait for the chunks that its connections are reading and
// writing at that moment.
type gate struct {
	mu     sync.RWMutex // read-held while Data is in use
	closed bool         // guarded by mu
}

// enter reports whether Data may be used; if so, leave must follow.
func (g *gate) enter() bool {
	g.mu.RLock()
	if g.closed {
		g.mu.RUnlock()
		return false
	}
	return true
}

func (g *gate) leave() { g.mu.RUnlock() }

// close shuts the gate and returns when nobody is inside.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
}

var errClosed = errors.New("blob is closed")

// gatedReader reads Data through the gate.
type gatedReader struct{ b *Blob }

func (r gatedReader) ReadAt(p []byte, off int64) (int, error) {
	if !r.b.gate.enter() {
		return 0, errors.Join(errClosed, errdefs.ErrUnavailable)
	}
	defer r.b.gate.leave()
	return r.b.data.ReadAt(p, off)
}

// OpenTorrent gives the library the segment's part of the blob's file.
func (s *segment) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(p metainfo.Piece) storage.PieceImpl {
			return &piece{seg: s, index: p.Index(), off: s.off + p.Offset(), n: p.Length()}
		},
		Close: func() error { return nil },
	}, nil
}

// piece is one piece in the blob's file. The library makes one for every
// access.
type piece struct {
	seg   *segment
	index int
	off   int64 // in the blob
	n     int64
}

// ReadAt reads for an upload. It never fails: the library panics over a short
// read without an error, and over a read that fails after its torrent was
// dropped. Instead the connections are closed over which the bytes would go.
func (p *piece) ReadAt(buf []byte, off int64) (int, error) {
	b := p.seg.blob
	n, err := gatedReader{b}.ReadAt(buf, p.off+off)
	if n != len(buf) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		b.swarm.hangUp(b)
		b.fail(fmt.Errorf("read for a peer: %w", err))
		clear(buf)
		return len(buf), nil
	}
	p.seg.read[p.index].Add(int64(n))
	p.seg.sent.Store(sinceStart(time.Now()))
	b.uploaded.Add(int64(n))
	b.swarm.opts.Counter.Sent(n)
	b.touch()
	return n, nil
}

// WriteAt writes a chunk as it came.
func (p *piece) WriteAt(buf []byte, off int64) (int, error) {
	b := p.seg.blob
	if !b.gate.enter() {
		return 0, errClosed
	}
	defer b.gate.leave()
	n, err := b.data.WriteAt(buf, p.off+off)
	if err == nil && n != len(buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		b.fail(err)
	}
	return n, err
}

// WriteTo feeds the piece's bytes to the library's hash.
func (p *piece) WriteTo(w io.Writer) (int64, error) {
	buf := getBuffer()
	defer putBuffer(buf)
	src := io.NewSectionReader(gatedReader{p.seg.blob}, p.off, p.n)
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{src}, *buf)
	if err == nil && n != p.n {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		p.seg.unread(p.index)
		p.seg.blob.fail(err)
	}
	return n, err
}

// MarkComplete is called when the piece has the right hash. The library takes
// it for complete even if this fails, so a failure ends the whole blob.
func (p *piece) MarkComplete() error {
	b := p.seg.blob
	if !b.gate.enter() {
		return errClosed
	}
	defer b.gate.leave()
	p.seg.passed(p.index)
	if err := b.data.MarkPresent(p.off, p.n); err != nil {
		b.fail(err)
		return err
	}
	return nil
}

// MarkNotComplete is called when the piece does not have the right hash.
// There is nothing to mark, but somebody to blame.
func (p *piece) MarkNotComplete() error {
	p.seg.failed(p.index, time.Now())
	return nil
}

// Completion is called with the client locked.
func (p *piece) Completion() storage.Completion {
	b := p.seg.blob
	if b.Err() != nil || !b.gate.enter() {
		return storage.Completion{Ok: true}
	}
	defer b.gate.leave()
	return storage.Completion{Ok: true, Complete: b.data.Present(p.off, p.n)}
}

var (
	_ storage.ClientImpl = (*segment)(nil)
	_ storage.PieceImpl  = (*piece)(nil)
	_ io.WriterTo        = (*piece)(nil)
)
