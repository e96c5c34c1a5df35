package store

import (
	"strings"
	"testing"
)

func TestStreaming(t *testing.T) {
	s := open(t, Options{})
	b, d := random(size, 1)
	_, other := random(size, 2)
	of := func(name string) func(string) bool {
		return func(ref string) bool { return strings.HasPrefix(ref, name+"/") }
	}
	all := func(string) bool { return true }
	if s.Streaming("", all) {
		t.Error("a stream before any was opened")
	}
	w, parked := writer(t, s, refFor("a", d), size), writer(t, s, refFor("b", other), size)
	for _, c := range []struct {
		name string
		got  bool
		want bool
	}{
		{"any", s.Streaming("", all), true},
		{"any of a", s.Streaming("", of("a")), true},
		{"any of c", s.Streaming("", of("c")), false},
		{"the blob's", s.Streaming(d, all), true},
		{"the blob's, of b", s.Streaming(d, of("b")), false},
		{"the other's, of b", s.Streaming(other, of("b")), true},
	} {
		if c.got != c.want {
			t.Errorf("%s: %t", c.name, c.got)
		}
	}
	if err := parked.Close(); err != nil {
		t.Fatal(err)
	}
	if s.Streaming(other, all) {
		t.Error("a closed stream counts")
	}
	write(t, w, b) // the blob is whole: what is left is to commit it
	if s.Streaming("", all) {
		t.Error("the stream of a whole blob counts")
	}
}
