package feed

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/queue"
)

func FuzzRead(f *testing.F) {
	page := queue.Page{ID: "abc", First: 1, Last: 2, Changed: time.Unix(1, 0), Events: []queue.Recorded{
		{Sequence: 1, Event: push("a"), Taken: time.Unix(1, 0)}, {Sequence: 2, Event: push("b"), Taken: time.Unix(2, 0)},
	}}
	for _, write := range []func(document) ([]byte, error){document.atom, document.rss} {
		doc, err := write(newDocument(httptest.NewRequest(http.MethodGet, "/feed/atom", nil), page))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(doc)
	}
	f.Add([]byte(`{"version":"https://jsonfeed.org/version/1","items":[{}]}`))
	f.Add([]byte(`<rss version="2.0"><channel><item></channel>`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		p, err := read(doc)
		if err != nil {
			return
		}
		if p.id == "" || len(p.id) > 64 {
			t.Errorf("id %q", p.id)
		}
		before := uint64(0)
		for _, e := range p.entries {
			if e.sequence <= before || e.sequence > p.last {
				t.Errorf("entry %d after %d, of %d", e.sequence, before, p.last)
			}
			before = e.sequence
			for _, c := range event.Check(e.event).Events {
				if again := event.Check(c); len(again.Events) != 1 || again.Events[0] != c {
					t.Errorf("%+v becomes %+v", c, again)
				}
			}
		}
	})
}
