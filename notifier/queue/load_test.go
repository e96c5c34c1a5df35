package queue

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/receive"
)

var _ receive.Queue = (*Queue)(nil)

const (
	repositories = 300
	platforms    = 30
	tags         = 4 // of each index: 10,200 events in all
	senders      = 8 // registries; each sends one at a time
)

// body is the envelope of one event, as Distribution sends it.
func body(repository, tag, mediaType string, d digest.Digest) string {
	return fmt.Sprintf(`{"events":[{"id":"%s/%s/%s","timestamp":"2026-08-20T09:14:26.4Z","action":"push","target":{"mediaType":%q,"digest":%q,`+
		`"size":1609,"length":1609,"repository":%q,"url":"https://registry.example.com/v2/%s/manifests/%s","tag":%q},`+
		`"request":{"id":"6df24a34","addr":"10.0.0.7:42961","host":"registry.example.com","method":"PUT","useragent":"docker/28.1.1"},`+
		`"actor":{"name":"ci"},"source":{"addr":"registry-0:5000","instanceID":"a53db899"}}]}`,
		repository, d, tag, mediaType, d, repository, repository, d, tag)
}

// burst returns what a registry sends when an index of many platforms is pushed
// to many repositories, and the images that this names.
func burst() (bodies []string, images map[string]bool) {
	images = map[string]bool{}
	add := func(repository, tag, mediaType string, d digest.Digest) {
		bodies = append(bodies, body(repository, tag, mediaType, d))
		images[event.Event{Registry: "registry.example.com", Repository: repository, Tag: tag, Digest: d}.Image()] = true
	}
	for r := range repositories {
		repository := fmt.Sprintf("apps/app-%03d", r)
		for p := range platforms {
			add(repository, "", "application/vnd.oci.image.manifest.v1+json", digest.FromString(fmt.Sprint(repository, p)))
		}
		for i := range tags {
			add(repository, fmt.Sprintf("1.%d", i), "application/vnd.oci.image.index.v1+json", digest.FromString(repository))
		}
	}
	return bodies, images
}

// heapObjects returns the bytes of objects on the heap, garbage among them.
func heapObjects() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// A burst of 10,200 deliveries over real HTTP into a real file: none is lost,
// each is answered soon, and memory does not grow much. Every tenth is sent
// twice, as a sender does that missed an answer.
func TestABurstOfTenThousand(t *testing.T) {
	c := config.DefaultNotifier()
	c.Queue = settings(t)
	c.Receiver["registry"] = config.Receiver{Type: "distribution", Auth: "bearer", Secret: "0123456789abcdef"}.WithDefaults("registry")
	q := open(t, c.Queue)
	h, err := receive.New(c, q, receive.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx, l) }()
	transport := &http.Transport{MaxIdleConnsPerHost: senders}
	defer func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	bodies, images := burst()
	var repeated atomic.Int64
	send := func(client *http.Client, body string) time.Duration {
		start := time.Now()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+l.Addr().String()+"/hooks/registry", strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return 0
		}
		req.Header.Set("Authorization", "Bearer 0123456789abcdef")
		res, err := client.Do(req)
		if err != nil {
			t.Error(err)
			return 0
		}
		_, err = io.Copy(io.Discard, res.Body)
		if err != nil || res.Body.Close() != nil || res.StatusCode != http.StatusOK {
			t.Errorf("answered %s: %v", res.Status, err)
		}
		return time.Since(start)
	}
	runtime.GC()
	before, start := heapObjects(), time.Now()
	var most atomic.Uint64
	took := make([][]time.Duration, senders)
	var wg sync.WaitGroup
	for s := range senders {
		wg.Go(func() {
			client := &http.Client{Transport: transport}
			for i := s; i < len(bodies); i += senders {
				took[s] = append(took[s], send(client, bodies[i]))
				if s == 0 {
					most.Store(max(most.Load(), heapObjects()))
				}
				if i%10 == 0 {
					took[s] = append(took[s], send(client, bodies[i]))
					repeated.Add(1)
				}
			}
		})
	}
	wg.Wait()
	all, grown := slices.Concat(took...), int64(most.Load())-int64(before)
	elapsed := time.Since(start)
	slices.Sort(all)
	at := func(share float64) time.Duration {
		return all[int(share*float64(len(all)-1))].Round(10 * time.Microsecond)
	}
	t.Logf("%d deliveries in %s (%.0f/s): half within %s, 99%% within %s, the last within %s; the heap grew by %d MiB at most",
		len(all), elapsed.Round(time.Millisecond), float64(len(all))/elapsed.Seconds(), at(0.5), at(0.99), at(1), grown>>20)
	if at(0.5) > 100*time.Millisecond {
		t.Errorf("half are answered within %s only", at(0.5))
	}
	if grown > 32<<20 {
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	if s := q.Stats(); s.Waiting != len(images) || s.Nothing[Duplicate] != uint64(repeated.Load()) {
		t.Errorf("%d images, %d sent twice: %+v", len(images), repeated.Load(), s)
	}

	work, stop := context.WithCancel(t.Context())
	defer stop()
	err = q.Run(work, func(_ context.Context, e event.Event) error {
		if !images[e.Image()] {
			t.Errorf("%s came twice, or was not sent", e.Image())
		}
		if delete(images, e.Image()); len(images) == 0 {
			stop()
		}
		return nil
	})
	if err != nil || len(images) > 0 {
		t.Errorf("%d images are lost: %v", len(images), err)
	}
}
