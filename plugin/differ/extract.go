package differ

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"
)

// extract unpacks the archive in s into mounts, and syncs their file system if
// told so. An overlay's upper directory and a bind mount's source are written
// to as they are: nothing has to be mounted then, and no mount stays behind
// that keeps the snapshot from being removed if the process is killed.
func extract(ctx context.Context, mounts []mount.Mount, s *stream, syncFs bool) error {
	into := func(root string, opts ...archive.ApplyOpt) error {
		if _, err := archive.Apply(ctx, root, s, opts...); err != nil {
			return err
		}
		if syncFs {
			return syncFileSystem(root)
		}
		return nil
	}
	if len(mounts) == 1 {
		m := mounts[0]
		// Device nodes, which whiteouts of overlayfs are, cannot be made in a
		// user namespace.
		if m.Type == "overlay" && !userns.RunningInUserNS() {
			if upper, lower := overlayDirs(m.Options); upper != "" {
				opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
				if len(lower) > 0 {
					opts = append(opts, archive.WithParents(lower))
				}
				return into(upper, opts...)
			}
		}
		if plainBind(m) {
			return into(m.Source)
		}
	}
	return mount.WithTempMount(ctx, mounts, func(root string) error { return into(root) })
}

// overlayDirs returns the upper and the lower directories of an overlay mount;
// the lower ones the topmost first.
func overlayDirs(options []string) (upper string, lower []string) {
	for _, o := range options {
		if v, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = v
		} else if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			lower = strings.Split(v, ":")
		}
	}
	return upper, lower
}

// plainBind reports whether writing to the mount is the same as writing to its
// source, as it is not if it is read-only or maps ids.
func plainBind(m mount.Mount) bool {
	return m.Type == "bind" && m.Target == "" && !slices.ContainsFunc(m.Options, func(o string) bool {
		return o != "bind" && o != "rbind" && o != "rw"
	})
}

func syncFileSystem(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open to sync: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync file system of %s: %w", path, err)
	}
	return nil
}
