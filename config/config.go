// Package config holds the settings of an ImageWolf node: their types, their
// defaults, how they are read (defaults, then file, then environment, then
// flags) and whether they make sense together. One table, made from the struct
// tags here, serves the file, the environment, the flags and the printed
// example. It does not act on a setting: that is left to the package concerned.
package config

import (
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"strings"
	"time"
)

// DefaultFile is the file that is read when none is named. It may be absent.
const DefaultFile = "/etc/imagewolf/config.toml"

// ContentDir is the name that containerd gives the directory of its content
// store, under its own root.
const ContentDir = "io.containerd.content.v1.content"

// Config is what a node can be told. The zero value is not usable: start from
// Default or Load.
type Config struct {
	Root             string   `toml:"root" comment:"Containerd's content directory: <root of containerd>/io.containerd.content.v1.content.\nIts blobs are used where they are, and stay there when ImageWolf is removed. Absolute path."`
	Socket           string   `toml:"socket" comment:"Unix socket on which containerd finds ImageWolf: the address in its [proxy_plugins].\nAbsolute path, at most 107 bytes. Ignored for listening when systemd hands over the socket."`
	ContainerdSocket string   `toml:"containerd_socket" comment:"Unix socket of containerd itself. Layers of a kind that ImageWolf does not unpack\n(encrypted ones) are handed back through it. Absolute path."`
	SeedQuota        Size     `toml:"seed_quota" comment:"Disk space for blobs that containerd no longer needs, kept to serve other nodes;\nthe least recently used go first. Bytes with unit, such as \"500MB\" or \"20GiB\"; \"0\" keeps none."`
	LogLevel         string   `toml:"log_level" comment:"Least level that is logged: debug, info, warn or error."`
	LogFormat        string   `toml:"log_format" comment:"How log lines look: text or json."`
	Cluster          Cluster  `toml:"cluster" comment:"Who the other nodes are, and how they know each other.\nEvery node needs an identity: cluster_key_file (or IMAGEWOLF_CLUSTER_KEY), or the four\nfiles cert_file, key_file, ca_file and gossip_key_file. Without one the daemon does not start."`
	Swarm            Swarm    `toml:"swarm" comment:"Traffic between nodes."`
	Tracker          Tracker  `toml:"tracker" comment:"When a node waits for the others, and when it goes to the registry. The defaults suit\nclusters of any size; longer times ask the registry for less, shorter ones wait less."`
	Prefetch         Prefetch `toml:"prefetch" comment:"Images that this node pulls before anyone asks for them, through its own containerd."`
	Metrics          Metrics  `toml:"metrics" comment:"What the node counts, for Prometheus."`
	NodeAPI          NodeAPI  `toml:"node_api" comment:"Where the node is asked to prefetch images: by 'imagewolf prefetch', by CI, by the notifier."`
}

// Cluster says who the other nodes are and how they recognise each other.
type Cluster struct {
	Name             string            `toml:"name" comment:"Name of this node, unique in the cluster: letters, digits, '.', '-', '_', at most 253.\nEmpty: the host name."`
	GossipAddress    string            `toml:"gossip_address" comment:"Where membership gossip listens, tcp and udp: host:port. An empty host is every address."`
	DataAddress      string            `toml:"data_address" comment:"Where blobs and control messages are served, tcp, mutual TLS 1.3: host:port."`
	AdvertiseAddress string            `toml:"advertise_address" comment:"IP address or name under which the other nodes reach this one, without port.\nEmpty: the listening address, or the first private one of the machine."`
	Join             []string          `toml:"join" comment:"Other nodes, any of them, as host or host:port (default port: 7946).\nA name may have many DNS records, such as a headless service; names are asked again for as\nlong as the daemon runs. Empty: a cluster of one. At most 256."`
	Labels           map[string]string `toml:"labels,inline" comment:"Labels of this node, such as { zone = \"a\" }. Peers of the same zone are preferred.\nKeys: letters, digits, '.', '-', '_', '/', at most 63; values at most 63; all together at most 256 bytes."`
	ClusterKeyFile   string            `toml:"cluster_key_file" flag:"cluster-key-file" comment:"File with the cluster's key, as printed by 'imagewolf cluster-key generate'; the same on\nevery node. Not readable by other users."`
	ClusterKey       string            `toml:"cluster_key" flag:"cluster-key" secret:"true" comment:"The key itself, in place of cluster_key_file. Best given as IMAGEWOLF_CLUSTER_KEY; it is\nnot a flag, since every user of a machine sees the arguments of a process."`
	AcceptedKeyFiles []string          `toml:"accepted_cluster_key_files" flag:"cluster-accepted-key-files" comment:"Files with cluster keys that are accepted beside this node's own, while one key replaces\nanother: docs/configuration.md has the steps. At most 4. Not readable by other users."`
	AcceptedKeys     []string          `toml:"accepted_cluster_keys" flag:"cluster-accepted-keys" secret:"true" comment:"Such keys themselves. Best given as IMAGEWOLF_CLUSTER_ACCEPTED_KEYS, separated by commas."`
	CertFile         string            `toml:"cert_file" flag:"cluster-tls-cert-file" comment:"Certificates of your own, in place of a cluster key: this node's certificate (PEM), good for\nserver and client authentication. The files are read again when they change."`
	KeyFile          string            `toml:"key_file" flag:"cluster-tls-key-file" comment:"Private key of cert_file (PEM). Not readable by other users."`
	CAFile           string            `toml:"ca_file" flag:"cluster-tls-ca-file" comment:"Authority that signed every node's certificate (PEM). It should sign nothing else."`
	GossipKeyFile    string            `toml:"gossip_key_file" comment:"File with the secret that encrypts gossip when certificates are used: 32 bytes in base64 or\nhex ('openssl rand -base64 32'), the same on every node. Not readable by other users."`
	AcceptedGossip   []string          `toml:"accepted_gossip_key_files" comment:"Files with such secrets that are accepted beside this node's own, while one replaces another.\nAt most 4. Not readable by other users."`
	Insecure         bool              `toml:"insecure" comment:"Run with a key that is public knowledge, and so let anyone in. For trying out only."`
}

// Swarm limits the traffic between nodes.
type Swarm struct {
	UploadLimit   Rate     `toml:"upload_limit" comment:"Most that this node sends to other nodes, in bytes per second, such as \"100MiB/s\".\n\"0\": no limit; otherwise at least 256KiB/s."`
	DownloadLimit Rate     `toml:"download_limit" comment:"Most that this node takes from other nodes, in bytes per second. \"0\": no limit; otherwise\nat least 256KiB/s. Does not limit what is pulled from the registry."`
	IdleTimeout   Duration `toml:"idle_timeout" comment:"How long a blob stays ready to be served after the last byte of it moved; afterwards it\ntakes some milliseconds to get ready again. 1s to 24h."`
}

// Tracker holds the bounds on waiting for other nodes.
type Tracker struct {
	DecideTimeout Duration `toml:"decide_timeout" comment:"How long a node tries to reach the tracker of a blob before it asks the registry by itself.\nOne that there is a connection to has stall_timeout to answer;\nafter it the others have decide_timeout once more. 10ms to 30s, not above max_wait."`
	StallTimeout  Duration `toml:"stall_timeout" comment:"How long a transfer may stand still before a second source is sought;\nup to ten times as long, but not above two thirds of max_wait, where the line is slow or busy;\nwhere bytes of it are seen to come, four fifths of max_wait, or eight while all who wait get others.\n100ms to 1m, not above max_wait."`
	MaxWait       Duration `toml:"max_wait" comment:"How long a node waits without a single new byte before it asks the registry by itself,\nwhatever the others do; twice as long while bytes of other blobs come in.\n1s to 2m: containerd's CRI gives up on a pull after 5m without progress."`
}

// Prefetch says how images are pulled that nobody asked for yet.
type Prefetch struct {
	Namespace       string   `toml:"namespace" comment:"Namespace of containerd for images whose request names none. \"k8s.io\" is kubelet's."`
	Snapshotter     string   `toml:"snapshotter" comment:"Snapshotter that images are unpacked into: the one that containerd's CRI is set to.\nEmpty: containerd's default, overlayfs."`
	CertsDir        string   `toml:"certs_dir" comment:"Containerd's own registry configuration: hosts.toml and certificates by host.\nAbsolute path, several separated by ':', as in containerd's config_path. Empty: none."`
	CredentialFiles []string `toml:"credential_files" comment:"Files with credentials for private registries: Docker's config.json, or Kubernetes' .dockerconfigjson\nand .dockercfg. Absolute paths, at most 32. Read again when they change; they may come later."`
	Slots           int      `toml:"slots" comment:"How many images are pulled at the same time; the others wait. 1 to 16."`
	BandwidthLimit  Rate     `toml:"bandwidth_limit" comment:"Most that all prefetches of this node together take, in bytes per second. \"0\": no limit;\notherwise at least 256KiB/s. docs/prefetch.md says what it does not hold for."`
}

// Metrics says where Prometheus finds what the node counts.
type Metrics struct {
	Address string `toml:"address" comment:"Where GET /metrics is answered, in plain HTTP and to everyone who can reach it: host:port, such as\n\"127.0.0.1:7948\". Empty: nowhere."`
}

// NodeAPI says where requests to prefetch come in.
type NodeAPI struct {
	Socket      string `toml:"socket" comment:"Unix socket of the Node API. Absolute path, at most 107 bytes. Empty: none."`
	SocketMode  string `toml:"socket_mode" comment:"Mode of the socket's file: whoever can write to it can have images pulled on every node.\nThree octal digits with a zero before them, such as \"0660\"."`
	SocketGroup string `toml:"socket_group" comment:"Group of the socket's file, by name or number. Empty: the daemon's own."`
	Address     string `toml:"address" comment:"Where the Node API is served on the network as well, over TLS 1.3 with the node's certificate and\nto those only that have the token: host:port, such as \"0.0.0.0:7949\". Empty: nowhere."`
	TokenFile   string `toml:"token_file" comment:"File with the token for address, at least 16 bytes ('openssl rand -hex 32' makes one). Read again\nwhen it changes. Not readable by other users."`
}

// Mode returns SocketMode as a number.
func (a NodeAPI) Mode() (fs.FileMode, error) {
	if !socketMode.MatchString(a.SocketMode) {
		return 0, fmt.Errorf("%q is no mode of a socket: write three octal digits with a zero before them, of which the first is 6, such as \"0660\"", a.SocketMode)
	}
	mode, err := strconv.ParseUint(a.SocketMode, 8, 32)
	return fs.FileMode(mode), err
}

// Group returns the number of the group of the socket's file; -1 is the daemon's own. Its
// error is that this machine has no such group.
func (a NodeAPI) Group() (gid int, err error) {
	if a.SocketGroup == "" {
		return -1, nil
	}
	if gid, err := strconv.Atoi(a.SocketGroup); err == nil && gid >= 0 {
		return gid, nil
	}
	g, err := user.LookupGroup(a.SocketGroup)
	if err != nil {
		return 0, fmt.Errorf("%q is no group of this machine: 'groupadd --system %s' makes it", a.SocketGroup, a.SocketGroup)
	}
	return strconv.Atoi(g.Gid)
}

// Default returns the settings that hold where nothing else is said. This is
// the only place that knows them.
func Default() Config {
	return Config{
		Root:             "/var/lib/containerd/" + ContentDir,
		Socket:           "/run/imagewolf/imagewolf.sock",
		ContainerdSocket: "/run/containerd/containerd.sock",
		SeedQuota:        20 << 30,
		LogLevel:         "info",
		LogFormat:        "text",
		Cluster: Cluster{
			GossipAddress: "0.0.0.0:7946",
			DataAddress:   "0.0.0.0:7947",
			Join:          []string{},
			Labels:        map[string]string{},

			AcceptedKeyFiles: []string{},
			AcceptedKeys:     []string{},
			AcceptedGossip:   []string{},
		},
		Swarm: Swarm{IdleTimeout: Duration(time.Minute)},
		Tracker: Tracker{
			DecideTimeout: Duration(300 * time.Millisecond),
			StallTimeout:  Duration(2 * time.Second),
			MaxWait:       Duration(30 * time.Second),
		},
		Prefetch: Prefetch{
			Namespace: "k8s.io", CertsDir: "/etc/containerd/certs.d", CredentialFiles: []string{}, Slots: 2,
		},
		NodeAPI: NodeAPI{Socket: "/run/imagewolf/node.sock", SocketMode: "0600"},
	}
}

// Key returns the cluster's key, from the setting itself or from its file, or
// "" when the node has no key.
func (c Cluster) Key() (string, error) {
	if c.ClusterKeyFile == "" {
		return strings.TrimSpace(c.ClusterKey), nil
	}
	key, err := readKey(c.ClusterKeyFile)
	if err != nil {
		return "", fmt.Errorf("cluster.cluster_key_file: %w", err)
	}
	return key, nil
}

// Accepted returns the cluster keys that are accepted beside Key's, from the
// settings and the files that they name.
func (c Cluster) Accepted() ([]string, error) {
	var out []string
	for _, k := range c.AcceptedKeys {
		out = append(out, strings.TrimSpace(k))
	}
	for _, path := range c.AcceptedKeyFiles {
		key, err := readKey(path)
		if err != nil {
			return nil, fmt.Errorf("cluster.accepted_cluster_key_files: %w", err)
		}
		out = append(out, key)
	}
	return out, nil
}

func readKey(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	key := strings.TrimSpace(string(b))
	if key == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return key, nil
}
