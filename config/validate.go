package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxSocketPath = 107       // sun_path holds 108 bytes with the final zero
	minRate       = 256 << 10 // below, a single request of a peer takes seconds
	maxJoin       = 256
	maxAccepted   = 4   // keys beside the node's own, as package cluster has it
	maxSlots      = 16  // of prefetches: each pulls several blobs
	maxCredFiles  = 32  // each is looked at for every refusal of a registry
	maxLabels     = 256 // bytes in all: labels travel in gossip's node metadata, which has 512
)

var (
	nodeName   = regexp.MustCompile(`^[A-Za-z0-9._-]{1,253}$`)
	labelKey   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$`)
	nsName     = regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`) // as containerd has it
	socketMode = regexp.MustCompile(`^06[0-7]{2}$`)
	labelValue = regexp.MustCompile(`^[A-Za-z0-9._/:-]{0,63}$`)
)

// problems gathers what is wrong, each as "key: what, and the way out".
type problems []error

func (p *problems) add(key, format string, args ...any) {
	*p = append(*p, fmt.Errorf(key+": "+format, args...))
}

// Validate returns everything that is wrong with the settings, made with
// errors.Join, each with its key and a way out; nil when a node can run on them.
// It looks at the files that are named, at nothing else outside.
func (c Config) Validate() error {
	var p problems
	p.paths(c)
	p.logging(c.LogLevel, c.LogFormat)
	p.cluster(c.Cluster)
	p.identity(c.Cluster)
	p.rate("swarm.upload_limit", c.Swarm.UploadLimit)
	p.rate("swarm.download_limit", c.Swarm.DownloadLimit)
	p.between("swarm.idle_timeout", c.Swarm.IdleTimeout, time.Second, 24*time.Hour)
	t := c.Tracker
	p.between("tracker.decide_timeout", t.DecideTimeout, 10*time.Millisecond, 30*time.Second)
	p.between("tracker.stall_timeout", t.StallTimeout, 100*time.Millisecond, time.Minute)
	p.between("tracker.max_wait", t.MaxWait, time.Second, 2*time.Minute)
	if t.DecideTimeout > t.MaxWait {
		p.add("tracker.decide_timeout", "%s is above tracker.max_wait (%s): lower the one or raise the other", t.DecideTimeout, t.MaxWait)
	}
	if t.StallTimeout > t.MaxWait {
		p.add("tracker.stall_timeout", "%s is above tracker.max_wait (%s): lower the one or raise the other", t.StallTimeout, t.MaxWait)
	}
	p.prefetch(c.Prefetch)
	p.metrics(c)
	p.nodeAPI(c)
	return errors.Join(p...)
}

func (p *problems) logging(level, format string) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, level) {
		p.add("log_level", "%q is none of debug, info, warn, error", level)
	}
	if !slices.Contains([]string{"text", "json"}, format) {
		p.add("log_format", "%q is neither text nor json", format)
	}
}

func (p *problems) metrics(c Config) {
	a := c.Metrics.Address
	if a == "" {
		return
	}
	p.listen("metrics.address", a)
	p.distinct("metrics.address", a, listener{"cluster.gossip_address", c.Cluster.GossipAddress}, listener{"cluster.data_address", c.Cluster.DataAddress})
}

func (p *problems) prefetch(c Prefetch) {
	if !nsName.MatchString(c.Namespace) || len(c.Namespace) > 76 {
		p.add("prefetch.namespace", "%q is no namespace of containerd: letters and digits, with '.', '-' and '_' between them, at most 76", c.Namespace)
	}
	for _, dir := range filepath.SplitList(c.CertsDir) {
		if !filepath.IsAbs(dir) {
			p.add("prefetch.certs_dir", "%q is not an absolute path: start it with /", dir)
		}
	}
	if len(c.CredentialFiles) > maxCredFiles {
		p.add("prefetch.credential_files", "%d files, at most %d: put the entries of several into one", len(c.CredentialFiles), maxCredFiles)
	}
	for i, path := range c.CredentialFiles {
		if !filepath.IsAbs(path) {
			p.add(fmt.Sprintf("prefetch.credential_files[%d]", i), "%q is not an absolute path: start it with /", path)
		}
	}
	if c.Slots < 1 || c.Slots > maxSlots {
		p.add("prefetch.slots", "%d is out of range: choose 1 to %d", c.Slots, maxSlots)
	}
	p.rate("prefetch.bandwidth_limit", c.BandwidthLimit)
}

func (p *problems) nodeAPI(c Config) {
	a := c.NodeAPI
	if a.Socket != "" {
		switch {
		case !filepath.IsAbs(a.Socket):
			p.add("node_api.socket", "%q is not an absolute path: start it with /", a.Socket)
		case len(a.Socket) > maxSocketPath:
			p.add("node_api.socket", "%d bytes are too many for a unix socket: choose a path of at most %d", len(a.Socket), maxSocketPath)
		case filepath.Clean(a.Socket) == filepath.Clean(c.Socket), filepath.Clean(a.Socket) == filepath.Clean(c.ContainerdSocket):
			p.add("node_api.socket", "is the same as socket or containerd_socket: the Node API needs one of its own")
		}
	}
	if _, err := a.Mode(); err != nil {
		p.add("node_api.socket_mode", "%w", err)
	}
	if a.TokenFile != "" {
		p.file("node_api.token_file", a.TokenFile, true)
	}
	if a.Address == "" {
		return
	}
	p.listen("node_api.address", a.Address)
	if a.TokenFile == "" {
		p.add("node_api.address", "given without node_api.token_file: anyone on the network could have images pulled; make a token with 'openssl rand -hex 32'")
	}
	p.distinct("node_api.address", a.Address, listener{"cluster.gossip_address", c.Cluster.GossipAddress},
		listener{"cluster.data_address", c.Cluster.DataAddress}, listener{"metrics.address", c.Metrics.Address})
}

// Warnings returns what is allowed and probably not meant, each with its key.
func (c Config) Warnings() []string {
	var out []string
	if _, err := c.NodeAPI.Group(); err != nil { // one that is made later: the Node API is tried again
		out = append(out, fmt.Sprintf("node_api.socket_group: %v; until then there is no Node API", err))
	}
	if filepath.Base(c.Root) != ContentDir {
		out = append(out, fmt.Sprintf("root: %s does not end in %s: containerd's builtin store will not find the blobs when ImageWolf is taken off",
			c.Root, ContentDir))
	}
	if c.Cluster.Insecure {
		out = append(out, "cluster.insecure: anyone on the network can join this cluster, read its images and send it data")
	}
	if mode, err := c.NodeAPI.Mode(); err == nil && mode&0o002 != 0 {
		out = append(out, "node_api.socket_mode: every user of this machine can have images pulled on every node")
	}
	if len(c.Cluster.Join) == 0 {
		out = append(out, "cluster.join: empty: unless another node joins this one it is alone and pulls everything from the registry")
	}
	return out
}

func (p *problems) paths(c Config) {
	for _, s := range []struct{ key, path string }{
		{"root", c.Root}, {"socket", c.Socket}, {"containerd_socket", c.ContainerdSocket},
	} {
		switch {
		case !filepath.IsAbs(s.path):
			p.add(s.key, "%q is not an absolute path: start it with /", s.path)
		case strings.HasSuffix(s.key, "socket") && len(s.path) > maxSocketPath:
			p.add(s.key, "%d bytes are too many for a unix socket: choose a path of at most %d", len(s.path), maxSocketPath)
		}
	}
	if c.Socket != "" && filepath.Clean(c.Socket) == filepath.Clean(c.ContainerdSocket) {
		p.add("socket", "is the same as containerd_socket: ImageWolf needs a socket of its own")
	}
}

func (p *problems) cluster(c Cluster) {
	if c.Name != "" && !nodeName.MatchString(c.Name) {
		p.add("cluster.name", "%q: use letters, digits, '.', '-' and '_', at most 253", c.Name)
	}
	p.listen("cluster.gossip_address", c.GossipAddress)
	p.listen("cluster.data_address", c.DataAddress)
	p.distinct("cluster.data_address", c.DataAddress, listener{"cluster.gossip_address", c.GossipAddress})
	if a := c.AdvertiseAddress; a != "" {
		if ip, err := netip.ParseAddr(a); err == nil && ip.IsUnspecified() {
			p.add("cluster.advertise_address", "%s is every address and none: name one that other nodes can reach, or leave it empty", a)
		} else if err != nil && !isHost(a) {
			p.add("cluster.advertise_address", "%q is no IP address and no name: write one of them, without a port", a)
		}
	}
	if len(c.Join) > maxJoin {
		p.add("cluster.join", "%d entries, at most %d: a few suffice, or one DNS name with many records", len(c.Join), maxJoin)
	}
	for i, j := range c.Join {
		if err := checkPeer(j); err != nil {
			p.add(fmt.Sprintf("cluster.join[%d]", i), "%q: %w", j, err)
		}
	}
	p.labels(c.Labels)
}

func (p *problems) labels(labels map[string]string) {
	total := 0
	for k, v := range labels {
		total += len(k) + len(v)
		if !labelKey.MatchString(k) {
			p.add("cluster.labels", "key %q: use letters, digits, '.', '-', '_' and '/', at most 63, beginning and ending with a letter or digit", k)
		}
		if !labelValue.MatchString(v) {
			p.add("cluster.labels", "value %q of %s: use letters, digits, '.', '-', '_', '/' and ':', at most 63", v, k)
		}
	}
	if total > maxLabels {
		p.add("cluster.labels", "%d bytes in all, at most %d: labels travel with every gossip message, keep the ones you select by", total, maxLabels)
	}
}

// identity checks that there is one way to know the cluster, and only one:
// settings that contradict each other are refused, not ranked.
func (p *problems) identity(c Cluster) {
	files := []struct {
		key, path string
		private   bool
	}{
		{"cluster.cert_file", c.CertFile, false},
		{"cluster.key_file", c.KeyFile, true},
		{"cluster.ca_file", c.CAFile, false},
		{"cluster.gossip_key_file", c.GossipKeyFile, true},
		{"cluster.cluster_key_file", c.ClusterKeyFile, true},
	}
	var missing []string
	for _, f := range files[:4] {
		if f.path == "" {
			missing = append(missing, f.key)
		}
	}
	hasKey := c.ClusterKey != "" || c.ClusterKeyFile != ""
	hasCerts := len(missing) < 4
	switch {
	case c.ClusterKey != "" && c.ClusterKeyFile != "":
		p.add("cluster.cluster_key", "given beside cluster.cluster_key_file: keep one of them")
	case hasKey && hasCerts:
		p.add("cluster.cluster_key", "given beside certificate files: a cluster has one or the other, remove one")
	case c.Insecure && (hasKey || hasCerts):
		p.add("cluster.insecure", "true beside a key or certificates: remove it to use them")
	case hasCerts && len(missing) > 0:
		p.add("cluster", "certificates are incomplete: %s missing", strings.Join(missing, ", "))
	case !hasKey && !hasCerts && !c.Insecure:
		p.add("cluster", "no identity: set cluster_key_file or IMAGEWOLF_CLUSTER_KEY ('imagewolf cluster-key generate' makes a key), "+
			"or cert_file, key_file, ca_file and gossip_key_file, or, to try it out where nobody else is, insecure = true")
	}
	for _, f := range files {
		if f.path != "" {
			p.file(f.key, f.path, f.private)
		}
	}
	p.accepted(c, hasKey, hasCerts)
}

// accepted checks the keys that are accepted beside the node's own.
func (p *problems) accepted(c Cluster, hasKey, hasCerts bool) {
	keys := len(c.AcceptedKeys) + len(c.AcceptedKeyFiles)
	if keys > 0 && !hasKey {
		p.add("cluster.accepted_cluster_keys", "given without cluster_key or cluster_key_file: keys are accepted beside the node's own, give that")
	}
	if len(c.AcceptedGossip) > 0 && !hasCerts {
		p.add("cluster.accepted_gossip_key_files", "given without gossip_key_file: secrets are accepted beside the node's own, give that")
	}
	if n := max(keys, len(c.AcceptedGossip)); n > maxAccepted {
		p.add("cluster", "%d keys are accepted beside the node's own, at most %d: take out those that no node has any more", n, maxAccepted)
	}
	for _, path := range c.AcceptedKeyFiles {
		p.file("cluster.accepted_cluster_key_files", path, true)
	}
	for _, path := range c.AcceptedGossip {
		p.file("cluster.accepted_gossip_key_files", path, true)
	}
}

func (p *problems) file(key, path string, private bool) {
	f, err := os.Open(path)
	if err != nil {
		p.add(key, "cannot be read: %w", err)
		return
	}
	defer f.Close() //nolint:errcheck // opened for reading: nothing can be lost
	info, err := f.Stat()
	switch {
	case err != nil:
		p.add(key, "cannot be read: %w", err)
	case !info.Mode().IsRegular():
		p.add(key, "%s is not a file", path)
	case private && info.Mode().Perm()&fs.FileMode(0o007) != 0:
		p.add(key, "%s is open to every user of the machine (mode %04o): chmod 0600 it, or mount the secret with mode 0400",
			path, info.Mode().Perm())
	}
}

func (p *problems) rate(key string, r Rate) {
	if r != 0 && r < minRate {
		p.add(key, "%s is too little to move a piece in time: 0 for no limit, or at least 256KiB/s", r)
	}
}

func (p *problems) between(key string, d Duration, low, high time.Duration) {
	if d.Duration() < low || d.Duration() > high {
		p.add(key, "%s is out of range: choose %s to %s", d, Duration(low), Duration(high))
	}
}

func (p *problems) listen(key, address string) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		p.add(key, "%q is not host:port (IPv6 in brackets, such as [::]:7946)", address)
		return
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		p.add(key, "%q: the port must be a number from 0 to 65535", address)
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "" {
		p.add(key, "%q: the host must be an IP address of this machine, or empty for every one", address)
	}
}

// listener is a setting that says where is listened on tcp.
type listener struct{ key, address string }

// distinct refuses an address that cannot be listened on beside the others: one port at
// one address, or where either is every address.
func (p *problems) distinct(key, address string, others ...listener) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "0" {
		return
	}
	for _, o := range others {
		h, same, err := net.SplitHostPort(o.address)
		if err == nil && same == port && (h == host || includes(h, host) || includes(host, h)) {
			p.add(key, "%s has the port of %s (%s): all listen on tcp, give it a port of its own", address, o.key, o.address)
			return
		}
	}
}

// includes says whether who listens at the first host takes the second one as well.
func includes(all, host string) bool {
	ip, err := netip.ParseAddr(all)
	if all == "" || err == nil && ip == netip.IPv6Unspecified() { // which is IPv4 as well
		return true
	}
	one, err := netip.ParseAddr(host)
	return err == nil && one.Is4() && ip == netip.IPv4Unspecified()
}

// checkPeer accepts host, host:port and [v6]:port.
func checkPeer(s string) error {
	host := s
	if h, port, err := net.SplitHostPort(s); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return errors.New("the port must be a number from 1 to 65535")
		}
		host = h
	} else if inner, ok := strings.CutPrefix(s, "["); ok {
		host = strings.TrimSuffix(inner, "]")
	}
	if _, err := netip.ParseAddr(host); err != nil && !isHost(host) {
		return errors.New("write a name or an IP address, with or without :port")
	}
	return nil
}

// isHost tells whether s may be a DNS name.
func isHost(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return true
}
