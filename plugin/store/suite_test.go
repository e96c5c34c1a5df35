package store

import (
	"context"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
)

func TestContentSuite(t *testing.T) {
	for name, f := range map[string]Filler{
		"plain":  nil,
		"filler": &filler{},
	} {
		t.Run(name, func(t *testing.T) {
			testsuite.ContentSuite(t, name, func(ctx context.Context, root string) (context.Context, content.Store, func() error, error) {
				s, err := Open(Options{Root: root, Filler: f})
				if err != nil {
					return ctx, nil, nil, err
				}
				return ctx, s, func() error {
					err := s.Close()
					checkRoot(t, root)
					return err
				}, nil
			})
		})
	}
}
