package store

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// stage puts a staging file and its sidecar into a root, as an earlier life of
// the store would have left them.
func stage(t *testing.T, root string, d digest.Digest, data []byte, sidecar string) {
	t.Helper()
	dir := root + "/imagewolf/staging/"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if data != nil {
		if err := os.WriteFile(dir+d.Encoded(), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if sidecar != "" {
		if err := os.WriteFile(dir+d.Encoded()+".json", []byte(sidecar), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestResume(t *testing.T) {
	b, d := random(1000, 1)
	ref := refFor("a", d)
	refs := `"refs":[{"name":"` + ref + `","started":"2026-01-02T03:04:05Z","updated":"2026-01-02T03:04:06Z"}]`
	for _, tc := range []struct {
		name    string
		data    []byte
		sidecar string
		want    int64 // prefix that is gone on from
		known   bool  // the ref is
	}{
		{"same boot", b[:600], `{"version":1,"size":1000,"boot":"boot","present":[[0,600]],` + refs + `}`, 600, true},
		{"another boot", b[:600], `{"version":1,"size":1000,"boot":"old","present":[[0,600]],` + refs + `}`, 0, true},
		{"another boot, synced", b[:600], `{"version":1,"size":1000,"boot":"old","present":[[0,600]],"synced":[[0,500]],` + refs + `}`, 500, true},
		{"no boot", b[:600], `{"version":1,"size":1000,"boot":"","present":[[0,600]],` + refs + `}`, 0, true},
		{"gap", b[:600], `{"version":1,"size":1000,"boot":"boot","present":[[0,100],[200,600]],` + refs + `}`, 100, true},
		{"all there, not checked", b, `{"version":1,"size":1000,"boot":"boot","present":[[0,1000]],` + refs + `}`, 999, true},
		{"data too short", b[:599], `{"version":1,"size":1000,"boot":"boot","present":[[0,600]],` + refs + `}`, 0, false},
		{"no data", nil, `{"version":1,"size":1000,"boot":"boot","present":[[0,600]],` + refs + `}`, 0, false},
		{"no sidecar", b[:600], ``, 0, false},
		{"sidecar cut off", b[:600], `{"version":1,"size":1000,"boot":"bo`, 0, false},
		{"another version", b[:600], `{"version":2,"size":1000,"boot":"boot","present":[[0,600]],` + refs + `}`, 0, false},
		{"beyond the end", b[:600], `{"version":1,"size":1000,"boot":"boot","present":[[0,1001]],` + refs + `}`, 0, false},
		{"backwards", b[:600], `{"version":1,"size":1000,"boot":"boot","present":[[600,0]],` + refs + `}`, 0, false},
		{"another size", b[:600], `{"version":1,"size":2000,"boot":"boot","present":[[0,600]],` + refs + `}`, 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			stage(t, root, d, tc.data, tc.sidecar)
			s := open(t, Options{Root: root})
			st, err := s.Status(t.Context(), ref)
			if known := err == nil; known != tc.known {
				t.Fatalf("status %+v: %v", st, err)
			}
			if tc.known && st.StartedAt.Year() != 2026 {
				t.Errorf("started at %v", st.StartedAt)
			}
			w := writer(t, s, ref, 1000)
			if tc.want == 999 {
				wait(t, w) // for the check
				tc.want = 1000
			}
			if got := offset(t, w); got != tc.want {
				t.Fatalf("offset %d, want %d", got, tc.want)
			}
			write(t, w, b[tc.want:])
			commit(t, w, 1000, d)
		})
	}
}

// A process that is killed loses at most what came since the last sidecar; a
// store that is closed loses nothing, not even by a restart of the machine.
func TestResumeAfterKillAndClose(t *testing.T) {
	const n = 40 << 20
	b, d := random(n, 1)
	ref := refFor("a", d)
	root := t.TempDir()
	s := open(t, Options{Root: root})
	w := writer(t, s, ref, n)
	wait(t, w)
	in := w.(*stream).in
	for p := range (20 << 20) / (1 << 20) {
		write(t, w, b[p<<20:(p+1)<<20])
	}
	in.mu.Lock()
	for in.savedAt < sidecarEvery || in.saving {
		in.mu.Unlock()
		until(t, in, func(st State) bool { return st.Present == 20<<20 })
		in.afterWrite()
		in.mu.Lock()
	}
	in.mu.Unlock()

	finish := func(s *Store, least int64) {
		w := writer(t, s, ref, n)
		from := offset(t, w)
		if from < least || from > 20<<20 {
			t.Fatalf("goes on from %d", from)
		}
		write(t, w, b[from:])
		commit(t, w, n, d)
	}
	finish(open(t, Options{Root: crash(t, s)}), 16<<20)
	finish(open(t, Options{Root: crash(t, s), bootID: "other"}), 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	finish(open(t, Options{Root: root, bootID: "other"}), 20<<20)
}

// Bytes on the disk that rot between two lives are found out.
func TestResumeOfRottenBytes(t *testing.T) {
	b, d := random(1000, 1)
	root := t.TempDir()
	junk, _ := random(600, 2)
	stage(t, root, d, junk, `{"version":1,"size":1000,"boot":"boot","present":[[0,600]]}`)
	s := open(t, Options{Root: root})
	ref := refFor("a", d)
	w := writer(t, s, ref, 1000)
	_, err := w.Write(b[600:])
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = writer(t, s, ref, 1000)
	if got := offset(t, w); got != 0 {
		t.Fatalf("offset %d", got)
	}
	write(t, w, b)
	commit(t, w, 1000, d)
}

// What is in staging for a blob that is in blobs/ is of no use.
func TestLeftoversAreRemoved(t *testing.T) {
	b, d := random(1000, 1)
	_, d2 := random(1000, 2)
	root := t.TempDir()
	s := open(t, Options{Root: root})
	put(t, s, b)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	stage(t, root, d, b, `{"version":1,"size":1000,"boot":"boot","present":[[0,1000]],"refs":[{"name":"x"}]}`)
	stage(t, root, d2, b, "")
	for _, name := range []string{"1.trash", "2.tmp", "stranger"} {
		if err := os.WriteFile(root+"/imagewolf/staging/"+name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, Options{Root: root})
	if list, err := readDir(s.stagingDir()); err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	_, err := s.Status(t.Context(), "x")
	wantErr(t, err, errdefs.ErrNotFound)
}

func TestSweep(t *testing.T) {
	b, old := random(1000, 1)
	b2, young := random(1000, 2)
	b3, used := random(1000, 3)
	root := t.TempDir()
	now := time.Now()
	for d, data := range map[digest.Digest][]byte{old: b, young: b2, used: b3} {
		stage(t, root, d, data[:500], `{"version":1,"size":1000,"boot":"boot","present":[[0,500]],"refs":[{"name":"`+
			refFor("a", d)+`","updated":"`+now.Format(time.RFC3339)+`"}]}`)
	}
	s := open(t, Options{Root: root})
	for _, d := range []digest.Digest{old, used} {
		at := now.Add(-25 * time.Hour)
		if err := os.Chtimes(s.stagingPath(d)+".json", at, at); err != nil {
			t.Fatal(err)
		}
	}
	s.refs[refFor("a", old)].updated = now.Add(-25 * time.Hour)
	w := writer(t, s, refFor("a", used), 1000)
	s.sweep(now)
	if exists(t, s.stagingPath(old)) || !exists(t, s.stagingPath(young)) || !exists(t, s.stagingPath(used)) {
		t.Error("wrong staging removed")
	}
	_, err := s.Status(t.Context(), refFor("a", old))
	wantErr(t, err, errdefs.ErrNotFound)
	write(t, w, b3[500:])
	commit(t, w, 1000, used)
}

// The machine's clock is set, by a day: for the files of before that is as if they
// were a day older, or of tomorrow. Staging goes when it has rested long enough,
// neither at once nor never.
func TestSweepWhenTheClockIsSet(t *testing.T) {
	const day = 24 * time.Hour
	for name, by := range map[string]time.Duration{"forward": 30 * day, "back": -30 * day} {
		t.Run(name, func(t *testing.T) {
			b, d := random(1000, 1)
			_, before := random(1000, 2)
			_, between := random(1000, 3)
			now, root := time.Now(), t.TempDir()
			put := func(d digest.Digest) {
				stage(t, root, d, b[:500], `{"version":1,"size":1000,"boot":"boot","present":[[0,500]],"refs":[{"name":"`+
					refFor("a", d)+`","updated":"`+now.Add(max(0, -by)).Format(time.RFC3339)+`"}]}`)
			}
			put(d)
			put(before)
			set := func(d digest.Digest) {
				at := now.Add(-by)
				if err := os.Chtimes(stagedAt(root, d)+sidecarSuffix, at, at); err != nil {
					t.Fatal(err)
				}
			}
			if by < 0 {
				set(before) // the daemon starts after that
			}
			s := open(t, Options{Root: root})
			s.sweep(now)
			set(d)
			put(between) // and no sweep saw it before the clock was set
			set(between)
			s.sweep(now.Add(time.Second))
			for _, d := range []digest.Digest{d, before} {
				if !exists(t, s.stagingPath(d)) || s.refs[refFor("a", d)] == nil {
					t.Errorf("%s is gone at once", d)
				}
			}
			if !exists(t, s.stagingPath(between)) {
				t.Errorf("%s, of this process, is gone at once", between)
			}
			s.sweep(now.Add(2 * day))
			if exists(t, s.stagingPath(between)) {
				t.Errorf("%s, of this process, stays", between)
			}
			for _, d := range []digest.Digest{d, before} {
				if exists(t, s.stagingPath(d)) || s.refs[refFor("a", d)] != nil {
					t.Errorf("%s stays", d)
				}
			}
		})
	}
}

// stagedAt is where staging of a digest is below a root.
func stagedAt(root string, d digest.Digest) string { return (&Store{root: root}).stagingPath(d) }

// An ingest that nobody uses leaves memory, and keeps what it has.
func TestRetire(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	ref := refFor("a", d)
	w := writer(t, s, ref, size)
	in := w.(*stream).in
	write(t, w, b[:1000])
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for {
		in.mu.Lock()
		gone := in.file == nil
		in.mu.Unlock()
		if gone {
			break
		}
		s.work.Wait()
	}
	if len(s.ingests) != 0 {
		t.Error("still in memory")
	}
	if st, err := s.Status(t.Context(), ref); err != nil || st.Offset != 1000 {
		t.Errorf("status %+v: %v", st, err)
	}
	w = writer(t, s, ref, size)
	if got := offset(t, w); got != 1000 {
		t.Fatalf("offset %d", got)
	}
	if got := w.Digest(); got != digest.FromBytes(b[:1000]) {
		t.Errorf("digest %q", got)
	}
	write(t, w, b[1000:])
	commit(t, w, size, d)
	if len(s.ingests) != 0 || len(s.refs) != 0 {
		t.Error("still in memory")
	}
}

func FuzzSidecar(f *testing.F) {
	f.Add([]byte(`{"version":1,"size":1000,"boot":"b","present":[[0,10],[5,20]],"synced":[[1,2]],"refs":[{"name":"a"}]}`))
	f.Add([]byte(`{"version":1,"size":9223372036854775807,"present":[[9223372036854775806,9223372036854775807]]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		sc, present, synced, err := decodeSidecar(b)
		if err != nil {
			return
		}
		for _, r := range []ranges{present, synced} {
			if r.total > sc.Size || len(r.gaps(0, sc.Size)) == 0 != (r.total == sc.Size) {
				t.Fatalf("%v of %d", r.spans, sc.Size)
			}
		}
		sc.Present, sc.Synced = pairs(present), pairs(synced)
		again, err := json.Marshal(sc)
		if err != nil {
			if strings.Contains(err.Error(), "Time") { // a year that JSON cannot hold
				return
			}
			t.Fatal(err)
		}
		sc2, _, _, err := decodeSidecar(again)
		third, err2 := json.Marshal(sc2)
		if err != nil || err2 != nil || !bytes.Equal(again, third) {
			t.Fatalf("%s, then %s: %v, %v", again, third, err, err2)
		}
	})
}
