package swarm

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"
)

// face is what the torrent client knows a peer by: an IP address that we make
// up, one for every (blob, peer) that is dialed and one for every connection
// that comes in.
//
// The client bans peers that sent a bad piece by IP address, for all torrents,
// for good. Behind one address there may be several nodes, and a node that was
// wrong about one blob is not wrong about the next; so real addresses are kept
// from it, and its ban hits one peer in one blob.
type face struct {
	ip   netip.Addr
	text string // ip and a port, what the client sees
	addr string // where to dial; empty for a connection that came in
	peer string // who it is: the address dialed, else the best known name
	conn *conn  // of one that came in

	blob atomic.Pointer[Blob] // set before first use; for one that came in, by the handshake
	gone atomic.Bool          // its connection is closed; only for one that came in
}

// facePort is arbitrary, but the client refuses port 0.
const facePort = "1"

// maxNames is how many peers' names are remembered.
const maxNames = 4096

var _ net.Addr = (*face)(nil)

// Network implements net.Addr.
func (*face) Network() string { return "tcp" }

// String returns the made-up address.
func (f *face) String() string { return f.text }

// newFace makes up an address, out of fd00::/8, that was never used before.
func (s *Swarm) newFace(addr, peer string) *face {
	var ip [16]byte
	ip[0] = 0xfd
	binary.BigEndian.PutUint64(ip[8:], s.lastFace.Add(1))
	f := &face{ip: netip.AddrFrom16(ip), addr: addr, peer: peer}
	f.text = net.JoinHostPort(f.ip.String(), facePort)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faces[f.ip.String()] = f
	return f
}

// faceAt returns the face with that text, nil if there is none (any more).
func (s *Swarm) faceAt(text string) *face {
	host, _, err := net.SplitHostPort(text)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faces[host]
}

// peerNamer is what a connection may be able to do: say who is at its other
// end, as proven by the handshake beneath it.
type peerNamer interface{ PeerName() string }

// peerName returns who is at the other end of c, "" if that is not known.
func peerName(c net.Conn) string {
	switch c := c.(type) {
	case peerNamer:
		return c.PeerName()
	case interface{ ConnectionState() tls.ConnectionState }:
		if certs := c.ConnectionState().PeerCertificates; len(certs) > 0 {
			return certs[0].Subject.CommonName
		}
	}
	return ""
}

// learn notes that the peer at addr is the one called name, so that it is
// recognized when it connects to us.
func (s *Swarm) learn(name, addr string) {
	if name == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.names) >= maxNames {
		clear(s.names) // they are learned again
	}
	s.names[name] = addr
}

// identify returns what a peer that connected to us is called here: the
// address it is dialed at if that is known, else its name, else the address it
// came from.
func (s *Swarm) identify(c net.Conn) string {
	name := peerName(c)
	if name == "" {
		return c.RemoteAddr().String()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if addr, ok := s.names[name]; ok {
		return addr
	}
	return name
}

// sweepFaces tells blobs which of their peers the client has banned, and
// forgets faces of connections that are closed. banned is everything the
// client ever banned.
func (s *Swarm) sweepFaces(banned []string) {
	s.mu.Lock()
	var hit []*face
	for _, ip := range banned {
		if f := s.faces[ip]; f != nil {
			hit = append(hit, f)
			delete(s.faces, ip)
		}
	}
	for ip, f := range s.faces {
		if f.gone.Load() {
			delete(s.faces, ip)
		}
	}
	s.mu.Unlock()
	for _, f := range hit {
		if b := f.blob.Load(); b != nil {
			b.ban(f.peer, "bad piece")
		}
	}
}
