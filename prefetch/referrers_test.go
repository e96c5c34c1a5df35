package prefetch

import (
	"bytes"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pulledImage puts an index with one manifest into the registry and into the job's store.
func pulledImage(t *testing.T, r *fakeRegistry, o Options) (*job, []containerd.Image, ocispec.Descriptor) {
	t.Helper()
	manifest := r.manifest(t, "layer", nil)
	manifest.Platform = &ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	index := r.put(t, ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest},
	}, "manifests/1")
	j, store := newJob(t, Request{Image: r.host + "/app:1"}, o)
	fetcher, err := j.registry.resolver(t.Context()).Fetcher(t.Context(), j.target.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := walk(t.Context(), index, images.Handlers(remotes.FetchHandler(store, fetcher), images.ChildrenHandler(store))); err != nil {
		t.Fatal(err)
	}
	image := containerd.NewImageWithPlatform(j.client, images.Image{Name: j.target.name, Target: index}, platforms.Default())
	return j, []containerd.Image{image}, manifest
}

// kept returns the digests that a blob keeps alive by labels of referrers.
func kept(t *testing.T, j *job, d digest.Digest) []digest.Digest {
	t.Helper()
	info, err := j.client.ContentStore().Info(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	var out []digest.Digest
	for k, v := range info.Labels {
		if strings.HasPrefix(k, gcReferrer) {
			out = append(out, digest.Digest(v))
		}
	}
	slices.Sort(out)
	return out
}

func TestReferrers(t *testing.T) {
	for _, api := range []bool{true, false} {
		t.Run(fmt.Sprintf("api %t", api), func(t *testing.T) {
			r := newFakeRegistry(t)
			r.api = api
			j, pulled, manifest := pulledImage(t, r, Options{})
			index := pulled[0].Target()
			signature, sbom := r.manifest(t, "signature", &index), r.manifest(t, "sbom", &manifest)
			if err := j.referrers(t.Context(), pulled); err != nil {
				t.Fatalf("without any: %v", err)
			}
			r.refer(t, index, signature)
			r.refer(t, manifest, sbom)
			if err := j.referrers(t.Context(), pulled); err != nil {
				t.Fatal(err)
			}
			for subject, want := range map[digest.Digest]digest.Digest{index.Digest: signature.Digest, manifest.Digest: sbom.Digest} {
				if got := kept(t, j, subject); !slices.Equal(got, []digest.Digest{want}) {
					t.Errorf("%s keeps %v, want %s", subject, got, want)
				}
			}
			for _, text := range []string{"signature", "sbom"} {
				if _, err := j.client.ContentStore().Info(t.Context(), digest.FromString(text)); err != nil {
					t.Errorf("the layer of the %s: %v", text, err)
				}
			}
		})
	}
}

// Too many and too large ones are left out, and told of.
func TestReferrersAreBounded(t *testing.T) {
	r := newFakeRegistry(t)
	var log bytes.Buffer
	j, pulled, _ := pulledImage(t, r, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	index := pulled[0].Target()
	huge := r.manifest(t, "huge", &index)
	huge.Size = maxReferrerBytes + 1 // so it says
	many := []ocispec.Descriptor{huge}
	for i := range maxReferrers + 9 {
		many = append(many, r.manifest(t, fmt.Sprintf("signature %d", i), &index))
	}
	r.refer(t, index, many...)
	if err := j.referrers(t.Context(), pulled); err != nil {
		t.Fatal(err)
	}
	if got := len(kept(t, j, index.Digest)); got != maxReferrers-1 {
		t.Errorf("%d are kept, want %d", got, maxReferrers-1)
	}
	if got := strings.Count(log.String(), "a referrer is left out"); got != 11 {
		t.Errorf("told of %d that were left out, want 11", got)
	}
	if slices.ContainsFunc(r.requests(), func(s string) bool { return strings.Contains(s, huge.Digest.String()) }) {
		t.Error("the one that is too large was asked for")
	}

	r.refer(t, index, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha256:../../x", Size: 5})
	if err := j.referrers(t.Context(), pulled); err == nil {
		t.Error("a referrer whose digest is none")
	}
}
