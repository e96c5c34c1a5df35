package fanout

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	imagewolfv1 "github.com/imagewolf/imagewolf/api/v1"
)

// A crash ends the pulls: they begin anew with the next run.
func TestCrashEndsPulls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWorld(t).add("a", nil)
		n.set(func() { n.do = pause(time.Hour) })
		f := New(n.o)
		f.records = map[string]*record{"x": newRecord(
			&imagewolfv1.StartRequest{Request: &imagewolfv1.PrefetchRequest{Id: "x", Image: image}, Nodes: []string{"a"}}, time.Now(), "a")}
		crashed := make(chan error, 1)
		crashed <- errors.New("a panic")
		began := time.Now()
		if err := f.schedule(t.Context(), crashed); err == nil || time.Since(began) > time.Minute {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}
