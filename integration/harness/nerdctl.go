package harness

import (
	"context"
	"encoding/base64"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// nerdctlVersion is the version of nerdctl that the tests drive.
const nerdctlVersion = "2.3.5"

// Nerdctl returns the path of nerdctl, which is in the directory
// nerdctl-<version> beside the containerds.
func (b Binaries) Nerdctl() (string, error) {
	path := filepath.Join(b.Containerd, "nerdctl-"+nerdctlVersion, "nerdctl")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("place of nerdctl: %w", err)
	}
	return path, nil
}

// PullNerdctl pulls an image with `nerdctl pull`: through the transfer service
// on 2.x; on 1.7 it is nerdctl itself that talks to the registry. It returns
// what nerdctl showed meanwhile.
func (c *Containerd) PullNerdctl(ctx context.Context, ns, ref string, flags ...string) (shown string, err error) {
	path, err := c.env.Bin.Nerdctl()
	if err != nil {
		return "", err
	}
	// The defaults are places shared by all nodes of the machine, and what its
	// user has configured.
	env := []string{
		"NERDCTL_TOML=" + filepath.Join(c.Dir, "nerdctl.toml"),
		"DOCKER_CONFIG=" + c.dockerDir(),
	}
	args := append([]string{path, "--address", c.Socket(), "--namespace", ns,
		"--data-root", filepath.Join(c.Dir, "nerdctl"), "--hosts-dir", c.hostsDir(), "pull"}, flags...)
	return runOn(ctx, c.on, nil, env, append(args, ref)...)
}

// Login leaves a user's password for a registry where nerdctl looks for it, as
// `nerdctl login` and `docker login` do.
func (c *Containerd) Login(host, user, password string) error {
	dir := c.dockerDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("login: %w", err)
	}
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	text := fmt.Sprintf("{\"auths\": {%q: {\"auth\": %q}}}\n", host, auth)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		return fmt.Errorf("login: %w", err)
	}
	return nil
}

func (c *Containerd) dockerDir() string { return filepath.Join(c.Dir, "docker") }

// shownBytes matches one line of a blob that is under way, as nerdctl and ctr
// show it: kind and digest (the transfer service's cut short), the word for it,
// the bar, and two sizes.
var shownBytes = regexp.MustCompile(`(sha256:[0-9a-f]{21,64}):?\s+downloading\s+\|[^|]*\|\s+([0-9.]+) ?([KMG]i)?B\s*/`)

// ShownOffsets returns the offsets of a blob in what a pull showed, in the order
// shown, each once, rounded as shown.
func ShownOffsets(shown, digest string) []int64 {
	var out []int64
	for _, m := range shownBytes.FindAllStringSubmatch(shown, -1) {
		n, err := strconv.ParseFloat(m[2], 64)
		if err != nil || !strings.HasPrefix(digest, m[1]) {
			continue
		}
		unit := map[string]int{"": 0, "Ki": 1, "Mi": 2, "Gi": 3}[m[3]]
		offset := int64(n * math.Pow(1024, float64(unit)))
		if len(out) == 0 || out[len(out)-1] != offset {
			out = append(out, offset)
		}
	}
	return out
}
