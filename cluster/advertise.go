package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

const lookupTimeout = 5 * time.Second

// advertised finds the address under which the others reach this node.
func advertised(o Options, bind netip.Addr) (netip.Addr, error) {
	if o.AdvertiseAddr != "" {
		ip, err := advertiseOption(o)
		if err != nil {
			return ip, fmt.Errorf("advertise address %q: %w", o.AdvertiseAddr, err)
		}
		return ip, nil
	}
	if !bind.IsUnspecified() {
		return bind.WithZone(""), nil
	}
	if ip, ok := routeSource(bind); ok {
		return ip, nil
	}
	if ip, ok := interfaceAddr(bind); ok {
		return ip, nil
	}
	return netip.Addr{}, errors.New("this node has no address that others could reach: give it a network, or say the address with advertise_address")
}

func advertiseOption(o Options) (netip.Addr, error) {
	if _, err := netip.ParseAddr(o.AdvertiseAddr); err == nil {
		return usableIP(o.AdvertiseAddr)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	found, err := o.Resolver.LookupHost(ctx, o.AdvertiseAddr)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("neither an IP address nor a name that is known: %w", err)
	}
	for _, s := range found {
		if ip, err := usableIP(s); err == nil {
			return ip, nil
		}
	}
	return netip.Addr{}, errors.New("the name has no usable address")
}

// routeSource asks the routing table which of this node's addresses packets
// to the outside carry. That is right on nodes with several networks, where
// "the first private address" is often a bridge for containers.
func routeSource(bind netip.Addr) (netip.Addr, bool) {
	outside := []string{"192.0.2.1:9"} // for documentation only: nobody is there, and nothing is sent
	if bind.Is6() {
		outside = append(outside, "[2001:db8::1]:9")
	}
	for _, to := range outside {
		conn, err := (&net.Dialer{}).DialContext(context.Background(), "udp", to) // never blocks: nothing is sent
		if err != nil {
			continue
		}
		local := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap() //nolint:errcheck // the address of a UDP connection
		_ = conn.Close()                                                   // holds nothing
		if local.IsGlobalUnicast() {
			return local, true
		}
	}
	return netip.Addr{}, false
}

// interfaceAddr is for nodes without a default route.
func interfaceAddr(bind netip.Addr) (netip.Addr, bool) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, false
	}
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(n.IP)
		if ip = ip.Unmap(); ok && ip.IsGlobalUnicast() && (ip.Is4() || bind.Is6()) {
			return ip, true
		}
	}
	return netip.Addr{}, false
}
