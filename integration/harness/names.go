package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"golang.org/x/net/dns/dnsmessage"
)

// NameServer answers every question for an address of any name with the same
// addresses.
type NameServer struct {
	// Asked counts the questions.
	Asked atomic.Int64

	conn   net.PacketConn
	addrs  []netip.Addr
	silent atomic.Bool
	ended  chan struct{}
}

// ServeNames starts a name server on the machine.
func (m *Machine) ServeNames(addrs ...string) (*NameServer, error) {
	s := &NameServer{ended: make(chan struct{})}
	for _, a := range addrs {
		addr, err := netip.ParseAddr(a)
		if err != nil {
			return nil, fmt.Errorf("name server: %w", err)
		}
		s.addrs = append(s.addrs, addr)
	}
	err := m.in(func() (err error) {
		s.conn, err = (&net.ListenConfig{}).ListenPacket(context.Background(), "udp", net.JoinHostPort(m.IP, "53"))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("name server: %w", err)
	}
	go s.serve()
	return s, nil
}

// SetSilent has it answer nothing, as one that is gone, or answer again.
func (s *NameServer) SetSilent(silent bool) { s.silent.Store(silent) }

// Close ends it.
func (s *NameServer) Close() error {
	err := s.conn.Close()
	<-s.ended
	return err
}

func (s *NameServer) serve() {
	defer close(s.ended)
	buf := make([]byte, 1500)
	for {
		n, from, err := s.conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		var q dnsmessage.Message
		if err != nil || q.Unpack(buf[:n]) != nil || len(q.Questions) != 1 {
			continue
		}
		s.Asked.Add(1)
		if s.silent.Load() {
			continue
		}
		if answer, err := s.answer(q); err == nil {
			_, _ = s.conn.WriteTo(answer, from) //nolint:errcheck // it is asked again
		}
	}
}

func (s *NameServer) answer(q dnsmessage.Message) ([]byte, error) {
	a := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: q.ID, Response: true, Authoritative: true, RecursionAvailable: true},
		Questions: q.Questions,
	}
	if q.Questions[0].Type == dnsmessage.TypeA {
		for _, addr := range s.addrs {
			a.Answers = append(a.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 1},
				Body:   &dnsmessage.AResource{A: addr.As4()},
			})
		}
	}
	return a.Pack()
}
