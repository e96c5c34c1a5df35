package integration

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/imagewolf/imagewolf/integration/harness"
	"github.com/imagewolf/imagewolf/prefetch"
)

const kubelets = "k8s.io"

// puller is what the node's daemon would pull with.
func puller(n *harness.Node, change ...func(*prefetch.Options)) *prefetch.Puller {
	o := prefetch.Options{ContainerdSocket: n.Socket(), CertsDir: filepath.Join(n.Dir, "certs")}
	for _, c := range change {
		c(&o)
	}
	return prefetch.New(o)
}

// reads returns the requests for content since the last Reset, as opposed to
// those that only ask what a tag says.
func reads() []harness.Request {
	return registry.Requests(func(r harness.Request) bool { return r.Method != http.MethodHead })
}

// noLease fails the test if a lease is left in the namespace.
func noLease(ctx context.Context, t *testing.T, n *harness.Node, ns string) {
	t.Helper()
	out, err := n.Ctr(ctx, ns, "leases", "ls", "-q")
	must(t, err)
	if strings.TrimSpace(out) != "" {
		t.Errorf("leases left on %s: %q", n.Name, out)
	}
}

// TestPrefetch: what a prefetch has pulled, kubelet finds by every name, pulls
// without a byte, and can start with the registry gone.
func TestPrefetch(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, n := image(ctx, t, 8, 8), w.Nodes[0]
		registry.Behave(harness.Behavior{Rate: 16 * mib})
		var seen []prefetch.Progress
		res, err := puller(n).Pull(ctx, prefetch.Request{Image: img.Ref}, func(p prefetch.Progress) { seen = append(seen, p) })
		must(t, err)
		if want := (prefetch.Result{Digest: digest.Digest(img.Manifest), Bytes: img.Bytes()}); res != want {
			t.Errorf("got %+v, want %+v", res, want)
		}
		progressed(t, seen, img.Bytes())
		sent(t, img.Bytes())
		whole(ctx, t, kubelets, img, n)
		noLease(ctx, t, n, kubelets)
		must(t, n.CollectGarbage(ctx))
		whole(ctx, t, kubelets, img, n)

		repo := strings.TrimSuffix(img.Ref, ":latest")
		byDigest := repo + "@" + img.Manifest
		for _, name := range []string{img.Ref, byDigest, img.Config} {
			found, err := n.ImageCRI(ctx, name)
			must(t, err)
			if found == nil || found.Id != img.Config || !slices.Equal(found.RepoTags, []string{img.Ref}) || !slices.Equal(found.RepoDigests, []string{byDigest}) {
				t.Errorf("CRI finds %v by %s", found, name)
			}
		}
		registry.Reset()
		must(t, n.PullCRI(ctx, img.Ref)) // as imagePullPolicy Always would
		must(t, n.PullCRI(ctx, byDigest))
		if r := reads(); len(r) > 0 {
			t.Errorf("kubelet's pull of a prefetched image reads from the registry: %v", r)
		}
		if len(registry.Requests(nil)) == 0 {
			t.Error("kubelet's pull did not ask what the tag says: the counter looks at the wrong registry")
		}
		registry.Reset()
		registry.Behave(harness.Behavior{Status: http.StatusServiceUnavailable})
		runs(ctx, t, kubelets, img, n)
		if r := registry.Requests(nil); len(r) > 0 {
			t.Errorf("running it took the registry: %v", r)
		}
		has(ctx, t, n, kubelets, repo+":other", true)
		has(ctx, t, n, kubelets, repo+"x", false)
		has(ctx, t, n, w.ns, repo, false)
	})
}

// progressed fails the test unless the reports rise to the whole.
func progressed(t *testing.T, seen []prefetch.Progress, size int64) {
	t.Helper()
	if len(seen) < 2 || seen[len(seen)-1] != (prefetch.Progress{Bytes: size, Total: size}) {
		t.Errorf("progress %v, want some, and all of %d at the end", seen, size)
	}
	between := false
	for i, p := range seen {
		if p.Bytes > p.Total || i > 0 && p.Bytes < seen[i-1].Bytes {
			t.Errorf("progress %v", seen)
		}
		between = between || p.Bytes > size/10 && p.Bytes < size
	}
	if !between {
		t.Errorf("progress %v shows nothing between nothing and all", seen)
	}
}

func has(ctx context.Context, t *testing.T, n *harness.Node, ns, image string, want bool) {
	t.Helper()
	got, err := puller(n).HasRepository(ctx, ns, image)
	must(t, err)
	if got != want {
		t.Errorf("an image of the repository of %s in %s: %t", image, ns, got)
	}
}

// TestPrefetchOnAll: prefetches of all nodes at once cost the registry one copy,
// and another namespace gets the user's name alone.
func TestPrefetchOnAll(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img := image(ctx, t, 8, 8)
		registry.Behave(harness.Behavior{Rate: 24 * mib})
		var g errgroup.Group
		for _, n := range w.Nodes {
			g.Go(func() error {
				_, err := puller(n).Pull(ctx, prefetch.Request{Image: img.Ref, Namespace: w.ns}, nil)
				return err
			})
		}
		must(t, g.Wait())
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, w.Nodes...)
		for _, n := range w.Nodes {
			noLease(ctx, t, n, w.ns)
			out, err := n.Ctr(ctx, w.ns, "images", "ls", "-q")
			must(t, err)
			if got := strings.Fields(out); !slices.Equal(got, []string{img.Ref}) {
				t.Errorf("image records %q, want %s alone", got, img.Ref)
			}
		}
		runs(ctx, t, w.ns, img, w.Nodes[3])
	})
}

// TestPrefetchMeetsPull: a pull that somebody asks for shares the blob that a
// slow prefetch has begun, is not slowed down by its limit, and costs nothing more.
func TestPrefetchMeetsPull(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, n := image(ctx, t, 24), w.Nodes[0]
		slow := puller(n, func(o *prefetch.Options) {
			o.BandwidthLimit, o.Foreground = mib, wanting{n, w.ns}
		})
		prefetched := make(chan error, 1)
		go func() {
			_, err := slow.Pull(ctx, prefetch.Request{Image: img.Ref, Namespace: w.ns}, nil)
			prefetched <- err
		}()
		reached(ctx, t, img.Layer(0), 1)
		began := time.Now()
		must(t, n.Pull(ctx, w.ns, img.Ref))
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("the pull took %v, as slow as the prefetch", took)
		}
		must(t, <-prefetched)
		sent(t, img.Bytes())
		whole(ctx, t, w.ns, img, n)
	})
}

// wanting is a Foreground by the ingests that containerd shows in a namespace.
type wanting struct {
	node *harness.Node
	ns   string
}

func (w wanting) Busy() bool { return false }

func (w wanting) Wants(d digest.Digest) bool {
	out, err := w.node.Ctr(context.Background(), w.ns, "content", "active")
	return err == nil && slices.Contains(strings.Fields(out), "layer-"+d.String())
}

// TestPrefetchOfPrivateImage: the credentials come from files, the right ones, and
// what is wrong with them is told.
func TestPrefetchOfPrivateImage(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, n := image(ctx, t, 8), w.Nodes[0]
		file := filepath.Join(t.TempDir(), ".dockerconfigjson")
		p := puller(n, func(o *prefetch.Options) { o.CredentialFiles = []string{file} })
		req := prefetch.Request{Image: img.Ref, Namespace: w.ns}
		registry.RequireAuth("wolf", "howl")
		refused := func(say ...string) {
			t.Helper()
			_, err := p.Pull(ctx, req, nil)
			if err == nil {
				t.Fatal("pulled all the same")
			}
			for _, s := range append(say, img.Ref, registry.Host, file) {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			noLease(ctx, t, n, w.ns)
		}
		refused("without credentials")
		write := func(user, password string) {
			t.Helper()
			auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
			must(t, os.WriteFile(file, fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, registry.Host, auth), 0o600))
		}
		write("wolf", "bark-bark")
		refused("wrong")
		write("wolf", "howl")
		_, err := p.Pull(ctx, req, nil)
		must(t, err)
		whole(ctx, t, w.ns, img, n)
	})
}

// TestPrefetchByDigest: the digest counts, whatever the tag says by then, and the
// tag's record points to it.
func TestPrefetchByDigest(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		first, n := image(ctx, t, 8), w.Nodes[0]
		repo := strings.TrimSuffix(strings.TrimPrefix(first.Ref, registry.Host+"/"), ":latest")
		second, err := registry.Push(ctx, repo, newLayer(t, harness.Gzip, harness.Random(mib)))
		must(t, err)
		if second.Ref != first.Ref || second.Manifest == first.Manifest {
			t.Fatal("the tag did not move")
		}
		res, err := puller(n).Pull(ctx, prefetch.Request{Image: first.Ref, Digest: digest.Digest(first.Manifest)}, nil)
		must(t, err)
		found, err := n.ImageCRI(ctx, first.Ref)
		must(t, err)
		if res.Digest.String() != first.Manifest || found == nil || found.Id != first.Config {
			t.Errorf("pulled %s, and the tag is %v", res.Digest, found)
		}
		whole(ctx, t, kubelets, first, n)
		sent(t, first.Bytes())

		// A later prefetch of the tag as it is moves the record.
		_, err = puller(n).Pull(ctx, prefetch.Request{Image: first.Ref}, nil)
		must(t, err)
		if found, err = n.ImageCRI(ctx, first.Ref); err != nil || found == nil || found.Id != second.Config {
			t.Errorf("the tag is %v, %v", found, err)
		}
	})
}

// TestPrefetchOfPlatforms: of an index the node's own platform, or those asked for.
func TestPrefetchOfPlatforms(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		other := map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]
		index, layers := pushIndex(ctx, t, runtime.GOARCH, other)
		n := w.Nodes[0]
		holds := func(ns string, want ...string) {
			t.Helper()
			blobs, err := n.Blobs(ctx, ns)
			must(t, err)
			for arch, layer := range layers {
				if _, here := blobs[layer]; here != slices.Contains(want, arch) {
					t.Errorf("in %s: layer for %s here: %t", ns, arch, here)
				}
			}
		}
		res, err := puller(n).Pull(ctx, prefetch.Request{Image: index.Name(), Namespace: w.ns}, nil)
		must(t, err)
		holds(w.ns, runtime.GOARCH)
		must(t, n.Complete(ctx, w.ns, index.Name()))

		both, err := puller(n).Pull(ctx, prefetch.Request{
			Image: index.Name(), Namespace: w.ns + "-both", Platforms: []string{"linux/" + other, "linux/" + runtime.GOARCH},
		}, nil)
		must(t, err)
		holds(w.ns+"-both", runtime.GOARCH, other)
		if res.Digest != both.Digest || both.Bytes < res.Bytes+mib {
			t.Errorf("own: %+v; both: %+v", res, both)
		}
		none, err := puller(n).Pull(ctx, prefetch.Request{Image: index.Name(), Namespace: w.ns, Platforms: []string{"linux/s390x"}}, nil)
		if err == nil || !strings.Contains(err.Error(), "not made for linux/s390x") || none.Digest != "" {
			t.Errorf("%+v, %v", none, err)
		}
		// What failed is beside the image, whose record is there: it says so.
		part, err := puller(n).Pull(ctx, prefetch.Request{Image: index.Name(), Namespace: w.ns + "-part", Platforms: []string{"linux/" + runtime.GOARCH, "linux/s390x"}}, nil)
		if err == nil || part.Digest != res.Digest {
			t.Errorf("%+v, %v", part, err)
		}
		must(t, n.Complete(ctx, w.ns+"-part", index.Name()))
	})
}

// pushIndex pushes an index of images for the architectures, and returns its name
// and each one's layer.
func pushIndex(ctx context.Context, t *testing.T, archs ...string) (name.Reference, map[string]string) {
	t.Helper()
	layers := map[string]string{}
	index := v1.ImageIndex(empty.Index)
	for _, arch := range archs {
		layer, err := random.Layer(mib, types.OCILayer)
		must(t, err)
		img, err := mutate.ConfigFile(mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1),
			&v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"}})
		must(t, err)
		img, err = mutate.Append(img, mutate.Addendum{Layer: layer, MediaType: types.OCILayer})
		must(t, err)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		d, err := layer.Digest()
		must(t, err)
		layers[arch] = d.String()
	}
	ref, err := name.ParseReference(fmt.Sprintf("%s/platforms-%d:latest", registry.Host, time.Now().UnixNano()), name.Insecure)
	must(t, err)
	must(t, remote.WriteIndex(ref, index, remote.WithContext(ctx), remote.WithAuth(authn.Anonymous)))
	registry.Reset()
	return ref, layers
}

// TestPrefetchOfReferrers: a signature comes along if asked for, lives as long as
// the image, and not longer.
func TestPrefetchOfReferrers(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, n := image(ctx, t, 1), w.Nodes[0]
		signature := pushReferrer(ctx, t, img)
		known := func() []string {
			t.Helper()
			must(t, n.CollectGarbage(ctx))
			blobs, err := n.Blobs(ctx, w.ns)
			must(t, err)
			var out []string
			for _, d := range signature {
				if _, here := blobs[d]; here {
					out = append(out, d)
				}
			}
			return out
		}
		req := prefetch.Request{Image: img.Ref, Namespace: w.ns}
		_, err := puller(n).Pull(ctx, req, nil)
		must(t, err)
		if got := known(); len(got) > 0 {
			t.Errorf("%v came unasked", got)
		}
		req.Referrers = true
		_, err = puller(n).Pull(ctx, req, nil)
		must(t, err)
		if got := known(); len(got) != len(signature) {
			t.Errorf("of %v %v are here", signature, got)
		}
		must(t, n.Remove(ctx, w.ns, img.Ref))
		if got := known(); len(got) > 0 {
			t.Errorf("the image is gone, and %v are left", got)
		}
	})
}

// pushReferrer pushes an artifact that refers to the image and returns the digests
// of its manifest and layer.
func pushReferrer(ctx context.Context, t *testing.T, img *harness.Image) []string {
	t.Helper()
	ref, err := name.ParseReference(img.Ref, name.Insecure)
	must(t, err)
	subject, err := remote.Head(ref, remote.WithContext(ctx))
	must(t, err)
	layer, err := random.Layer(1000, "application/vnd.dev.cosign.simplesigning.v1+json")
	must(t, err)
	artifact, err := mutate.Append(mutate.MediaType(mutate.ConfigMediaType(empty.Image, "application/vnd.example.signature"), types.OCIManifestSchema1),
		mutate.Addendum{Layer: layer, MediaType: "application/vnd.dev.cosign.simplesigning.v1+json"})
	must(t, err)
	signed, ok := mutate.Subject(artifact, *subject).(v1.Image)
	if !ok {
		t.Fatal("no image with a subject")
	}
	manifest, err := signed.Digest()
	must(t, err)
	blob, err := layer.Digest()
	must(t, err)
	must(t, remote.Write(ref.Context().Digest(manifest.String()), signed, remote.WithContext(ctx)))
	registry.Reset()
	return []string{manifest.String(), blob.String()}
}

// TestPrefetchEnds: one that is given up leaves no lease, and the next goes on
// from where it was.
func TestPrefetchEnds(t *testing.T) {
	each(t, func(ctx context.Context, t *testing.T, w *world) {
		img, n := image(ctx, t, 24), w.Nodes[0]
		registry.Behave(harness.Behavior{Digest: img.Layer(0), StallAfter: 12 * mib})
		short, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() {
			_, err := puller(n).Pull(short, prefetch.Request{Image: img.Ref, Namespace: w.ns}, nil)
			done <- err
		}()
		reached(ctx, t, img.Layer(0), 12*mib)
		// What the registry has sent may be on its way to the store for a while.
		staging := filepath.Join(n.ContentDir(), "imagewolf", "staging", digest.Digest(img.Layer(0)).Encoded())
		must(t, harness.Poll(ctx, 10*time.Millisecond, func() error {
			info, err := os.Stat(staging)
			if err == nil && info.Size() < 8*mib {
				err = fmt.Errorf("%d bytes are staged", info.Size())
			}
			return err
		}))
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
		noLease(ctx, t, n, w.ns)
		registry.Behave(harness.Behavior{})
		_, err := puller(n).Pull(ctx, prefetch.Request{Image: img.Ref, Namespace: w.ns}, nil)
		must(t, err)
		whole(ctx, t, w.ns, img, n)
		if gets := registry.Gets(img.Layer(0)); len(gets) != 2 || from(t, gets[1]) < 4*mib {
			t.Errorf("the second pull did not go on: %v", gets)
		}
	})
}
