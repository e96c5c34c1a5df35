package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Every testdata/*.bad.toml has exactly the complaints listed here, in this
// order: first those of Load, then those of Validate. %s stands for the file.
var badFiles = map[string][]string{
	"syntax.bad.toml": {
		"%s:2:10: toml: unexpected character",
	},
	"unknown.bad.toml": {
		"%s:1:1: unknown key seed_qouta (did you mean seed_quota?)",
		"%s:2:1: unknown key max_wait (did you mean tracker.max_wait?)",
		"%s:5:1: unknown key cluster.joins (did you mean cluster.join?)",
		"%s:8:2: unknown key clutser (did you mean cluster?)",
		"%s:11:2: unknown key zzzzzzzzzzzzzzzz; 'imagewolf config default' prints every key there is",
	},
	"types.bad.toml": {
		"%s:1:1: root: must be text in quotes, not a number",
		"%s:2:1: seed_quota: \"lots\" is no size",
		"%s:4:1: cluster.join: must be a list such as [\"a\", \"b\"], not text",
		"%s:5:1: cluster.labels: zone must be text in quotes, not a number",
		"%s:6:1: cluster.insecure: must be true or false, not text",
		"%s:8:1: swarm.upload_limit: \"fast\" is no rate",
		"%s:9:1: swarm.idle_timeout: must be text in quotes, not a number",
		"%s:11:1: tracker.max_wait: \"30\" is no duration",
		"%s:12:1: unknown key tracker.speed; 'imagewolf config default' prints every key there is",
	},
	"table.bad.toml": {
		"%s:1:11: cluster: must be a table, written [cluster], not a number",
	},
	"values.bad.toml": {
		"root: \"content\" is not an absolute path",
		"socket: is the same as containerd_socket",
		"log_level: \"loud\" is none of debug, info, warn, error",
		"log_format: \"xml\" is neither text nor json",
		"cluster.name: \"a b\": use letters",
		"cluster.gossip_address: \"7946\" is not host:port",
		"cluster.data_address: \"node:http\": the port must be a number from 0 to 65535",
		"cluster.data_address: \"node:http\": the host must be an IP address",
		"cluster.advertise_address: 0.0.0.0 is every address and none",
		"cluster.join[1]: \"b:0\": the port must be a number from 1 to 65535",
		"cluster.join[2]: \"http://c\": the port must be a number",
		"cluster.labels: key \"a b\": use letters",
		"cluster: no identity: set cluster_key_file",
		"swarm.upload_limit: 10B/s is too little",
		"swarm.idle_timeout: 10ms is out of range: choose 1s to 24h",
		"tracker.max_wait: 10m is out of range: choose 1s to 2m",
		"prefetch.namespace: \"k8s/io\" is no namespace of containerd",
		"prefetch.certs_dir: \"certs.d\" is not an absolute path",
		"prefetch.credential_files[1]: \"b.json\" is not an absolute path",
		"prefetch.slots: 0 is out of range: choose 1 to 16",
		"prefetch.bandwidth_limit: 1000B/s is too little",
		"metrics.address: \"metrics\" is not host:port",
	},
	"timeouts.bad.toml": {
		"tracker.decide_timeout: 20s is above tracker.max_wait (10s)",
		"tracker.stall_timeout: 30s is above tracker.max_wait (10s)",
	},
	"identities.bad.toml": {
		"cluster.cluster_key: given beside certificate files",
		"cluster.cert_file: cannot be read: open /nonexistent/cert: no such file",
	},
	"certificates.bad.toml": {
		"cluster: certificates are incomplete: cluster.key_file, cluster.gossip_key_file missing",
		"cluster.cert_file: cannot be read: open /nonexistent/cert: no such file",
		"cluster.ca_file: /proc is not a file",
	},
	"insecure.bad.toml": {
		"cluster.insecure: true beside a key or certificates",
	},
	"metrics.bad.toml": {
		"metrics.address: 127.0.0.1:7947 has the port of cluster.data_address (0.0.0.0:7947)",
	},
	"node_api.bad.toml": {
		"node_api.socket: is the same as socket or containerd_socket",
		"node_api.socket_mode: \"rw-rw----\" is no mode of a socket",
		"node_api.address: given without node_api.token_file",
		"node_api.address: [::]:7946 has the port of cluster.gossip_address (0.0.0.0:7946)",
	},
	"node_api_files.bad.toml": {
		"node_api.socket: \"node.sock\" is not an absolute path",
		"node_api.token_file: cannot be read: open /nonexistent/token: no such file",
		"node_api.address: \"everywhere\" is not host:port",
	},
	"accepted.bad.toml": {
		"cluster: no identity: set cluster_key_file",
		"cluster.accepted_cluster_keys: given without cluster_key",
		"cluster.accepted_gossip_key_files: given without gossip_key_file",
		"cluster: 5 keys are accepted beside the node's own, at most 4",
		"cluster.accepted_cluster_key_files: cannot be read: open /nonexistent/key: no such file",
		"cluster.accepted_gossip_key_files: /proc is not a file",
	},
	"labels.bad.toml": {
		"cluster.labels: 259 bytes in all, at most 256",
	},
}

// complaints takes joined errors apart.
func complaints(err error) []string {
	if err == nil {
		return nil
	}
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return []string{err.Error()}
	}
	var out []string
	for _, e := range joined.Unwrap() {
		out = append(out, e.Error())
	}
	return out
}

// checked are settings that say what is wrong with them.
type checked interface{ Validate() error }

// checkBadFiles holds the files *.bad.toml of a directory to their complaints:
// first those of load, and if there is none those of Validate.
func checkBadFiles(t *testing.T, dir string, complaintsOf map[string][]string, load func(file string) (checked, error)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.bad.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(complaintsOf) {
		t.Errorf("%d files, and %d are expected", len(files), len(complaintsOf))
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			c, err := load(file)
			got := complaints(err)
			if err == nil {
				got = complaints(c.Validate())
			}
			want := complaintsOf[filepath.Base(file)]
			for i := range max(len(got), len(want)) {
				switch {
				case i >= len(got):
					t.Errorf("missing: %s", want[i])
				case i >= len(want):
					t.Errorf("too much: %s", got[i])
				case !strings.HasPrefix(got[i], strings.ReplaceAll(want[i], "%s", file)):
					t.Errorf("got  %s\nwant %s", got[i], want[i])
				}
			}
		})
	}
}

func TestBadFiles(t *testing.T) {
	checkBadFiles(t, "testdata", badFiles, func(file string) (checked, error) { return Load(Sources{File: file}) })
}

func TestBadEnvironmentAndFlags(t *testing.T) {
	_, err := Load(Sources{
		Env:   func(k string) (string, bool) { return "yes please", k == "IMAGEWOLF_CLUSTER_INSECURE" },
		Flags: func(k string) (string, bool) { return "fast", k == "swarm-upload-limit" || k == "cluster-labels" },
	})
	want := []string{
		"flag --cluster-labels: \"fast\" is no label: write key=value",
		"environment variable IMAGEWOLF_CLUSTER_INSECURE: \"yes please\" is neither true nor false",
		"flag --swarm-upload-limit: \"fast\" is no rate: write bytes per second with a unit, such as \"100MiB/s\", or 0 for no limit",
	}
	if got := complaints(err); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestKeyFileOfOthersIsRefused(t *testing.T) {
	c := Default()
	c.Cluster.ClusterKeyFile = write(t, "key", "k")
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(c.Cluster.ClusterKeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("got %v", err)
	}
}

func TestWarnings(t *testing.T) {
	c := Default()
	c.Cluster.Join = []string{"a"}
	if w := c.Warnings(); len(w) != 0 {
		t.Errorf("warnings about nothing: %q", w)
	}
	c.Root, c.Cluster.Insecure, c.Cluster.Join, c.NodeAPI.SocketGroup = "/srv/blobs", true, nil, "nobody-has-this"
	w := c.Warnings()
	for i, key := range []string{`node_api.socket_group: "nobody-has-this" is no group of this machine`, "root: ", "cluster.insecure: ", "cluster.join: "} {
		if i >= len(w) || !strings.HasPrefix(w[i], key) {
			t.Errorf("%s not among %q", key, w)
		}
	}
}

func TestHostsThatAreRight(t *testing.T) {
	c := Default()
	c.Cluster.Insecure = true
	c.Cluster.GossipAddress, c.Cluster.DataAddress = "[::1]:0", ":0"
	c.Cluster.AdvertiseAddress = "node-1.example"
	c.Cluster.Join = []string{"10.0.0.1", "10.0.0.1:7946", "::1", "[::1]", "[::1]:7946", "tasks.imagewolf", "a.b.svc.cluster.local.:7946"}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
}
