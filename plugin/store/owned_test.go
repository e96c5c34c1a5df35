package store

import (
	"bytes"
	"sync/atomic"
	"testing"
)

func TestWriteOwnedAndSmallWrites(t *testing.T) {
	s := open(t, Options{})
	const n = 12 << 20
	b, d := random(n, 1)
	w := writer(t, s, refFor("a", d), n)
	wait(t, w)
	sizes := []int{1, 32, 4096, 70_000, 1 << 20, 3 << 20}
	var lent, freed atomic.Int32
	for at, i := 0, 0; at < n; i++ {
		end := min(n, at+sizes[i%len(sizes)])
		if i%2 == 0 {
			write(t, w, b[at:end])
		} else {
			lent.Add(1)
			p := bytes.Clone(b[at:end])
			m, err := w.(OwnedWriter).WriteOwned(p, func() {
				freed.Add(1)
				clear(p) // who looks at it now is wrong, and so is the digest
			})
			if err != nil || m != end-at {
				t.Fatal(m, err)
			}
		}
		at = end
		if got := offset(t, w); got != int64(at) {
			t.Fatalf("offset %d after %d bytes", got, at)
		}
	}
	in := w.(*stream).in
	in.mu.Lock()
	held := in.held
	in.mu.Unlock()
	if held != 0 {
		t.Errorf("%d bytes of memory still held", held)
	}
	if lent.Load() != freed.Load() {
		t.Errorf("%d of %d slices were given back", freed.Load(), lent.Load())
	}
	commit(t, w, n, d)
}

// TestOwnedAndThere gives back at once what another stream has brought already.
func TestOwnedAndThere(t *testing.T) {
	s := open(t, Options{})
	const n = 3 << 20
	b, d := random(n, 1)
	one := writer(t, s, refFor("a", d), n)
	wait(t, one)
	write(t, one, b[:1<<20])
	two := writer(t, s, refFor("b", d), n)
	for _, err := range []error{one.Close(), two.Truncate(0)} { // Close: what it wrote is in the file
		if err != nil {
			t.Fatal(err)
		}
	}
	write(t, two, b[:2<<20])
	in := two.(*stream).in
	for st, changed := in.Watch(); st.Prefix < 2<<20; st, changed = in.Watch() {
		<-changed
	}
	three := writer(t, s, refFor("c", d), n)
	if err := three.Truncate(0); err != nil {
		t.Fatal(err)
	}
	freed := false
	if _, err := three.(OwnedWriter).WriteOwned(b[:1<<20], func() { freed = true }); err != nil || !freed {
		t.Errorf("given back: %v; %v", freed, err)
	}
	if err := three.Close(); err != nil {
		t.Error(err)
	}
	write(t, two, b[2<<20:])
	commit(t, two, n, d)
}
