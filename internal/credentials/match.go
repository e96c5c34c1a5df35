package credentials

import (
	"path"
	"slices"
	"strings"
)

// hub are the names under which Docker Hub is spoken of. Images say docker.io,
// containerd connects to registry-1.docker.io, and what 'docker login' writes
// down is index.docker.io.
var hub = []string{"index.docker.io", "docker.io", "registry-1.docker.io"}

// hubKey is how Docker's credential stores know the hub.
const hubKey = "https://index.docker.io/v1/"

// storeNames are the names by which a credential store is asked for a host.
func storeNames(host string) []string {
	if slices.Contains(hub, host) {
		return []string{hubKey}
	}
	return []string{host, "https://" + host}
}

// pattern is an entry's key, taken apart: what kubelet calls a glob. Patterns
// are within the labels of the host only.
type pattern struct {
	labels []string // of the host, without port
	port   string
	path   string // a whole path prefix of the repository, without slash at its ends
}

// parsePattern takes a key apart: host, host:port or a URL, with or without a
// path. Docker's historical /v1/ and /v2/ are none.
func parsePattern(key string) pattern {
	for _, scheme := range []string{"https://", "http://"} {
		key = strings.TrimPrefix(key, scheme)
	}
	host, p, _ := strings.Cut(key, "/")
	p = strings.Trim(p, "/")
	for _, version := range []string{"v1", "v2"} {
		if p == version {
			p = ""
		}
		p = strings.TrimPrefix(p, version+"/")
	}
	name, port := splitPort(host)
	return pattern{labels: strings.Split(name, "."), port: port, path: p}
}

// splitPort leaves IPv6 addresses in their brackets.
func splitPort(host string) (name, port string) {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		return host[:i], host[i+1:]
	}
	return host, ""
}

// wildcards counts the labels that are not plain.
func (p pattern) wildcards() (n int) {
	for _, l := range p.labels {
		if strings.ContainsAny(l, `*?[\`) {
			n++
		}
	}
	return n
}

// matches reports whether the pattern stands for the repository at the host.
// Unlike kubelet, it takes a path for whole elements: team is not team2.
func (p pattern) matches(host, repository string) bool {
	if p.path != "" && repository != p.path && !strings.HasPrefix(repository, p.path+"/") {
		return false
	}
	names := []string{host}
	if slices.Contains(hub, host) {
		names = hub
	}
	return slices.ContainsFunc(names, p.matchesHost)
}

func (p pattern) matchesHost(host string) bool {
	name, port := splitPort(host)
	labels := strings.Split(name, ".")
	if port != p.port || len(labels) != len(p.labels) {
		return false
	}
	for i, l := range p.labels {
		if strings.HasPrefix(name, "[") { // an address, not a pattern
			return l == labels[i]
		}
		if ok, err := path.Match(l, labels[i]); err != nil || !ok {
			return false
		}
	}
	return true
}
