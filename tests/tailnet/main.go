// Command control is what a tailnet needs besides its nodes, in one process on one address: a control server, a DERP relay and a STUN server.
//
// It makes tailnets for tests on hosts without Internet, out of the test control server that the tailscale module has for its own tests; headscale, which
// people would use, cannot be had everywhere. The nodes that join are real. Any node may join; there are no secrets here.
package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

const (
	controlPort = 8080
	derpPort    = 3340
	stunPort    = 3478
)

func main() {
	address := flag.String("address", "", "IPv4 address of this host that every node can reach")
	domain := flag.String("domain", "tailnet.example", "MagicDNS domain")
	flag.Parse()
	if err := run(*address, *domain); err != nil {
		log.Fatal(err)
	}
}

func run(address, domain string) error {
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("-address: %w", err)
	}
	if err := startRelay(netip.AddrPortFrom(ip, derpPort)); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	requests, err := net.ListenPacket("udp4", netip.AddrPortFrom(ip, stunPort).String())
	if err != nil {
		return fmt.Errorf("STUN: %w", err)
	}
	go serveSTUN(requests)

	where := netip.AddrPortFrom(ip, controlPort)
	server := &testcontrol.Server{
		ExplicitBaseURL:  "http://" + where.String(),
		MagicDNSDomain:   domain,
		DNSConfig:        &tailcfg.DNSConfig{Proxied: true},
		DERPMap:          relays(ip),
		AllNodesSameUser: true,
	}
	server.HoldMapRequest = func(request *tailcfg.MapRequest) func() {
		// One that joins is online until the test says otherwise.
		if node := server.Node(request.NodeKey); node != nil && node.Online == nil {
			setOnline(server, request.NodeKey, true)
		}
		return nil
	}
	routes := http.NewServeMux()
	routes.Handle("/", server)
	routes.HandleFunc("POST /rig/online", func(w http.ResponseWriter, r *http.Request) {
		if !tellOnline(server, r.FormValue("name"), r.FormValue("online") == "true") {
			http.Error(w, "no such node", http.StatusNotFound)
		}
	})
	return http.ListenAndServe(where.String(), routes)
}

func relays(ip netip.Addr) *tailcfg.DERPMap {
	node := &tailcfg.DERPNode{
		Name:             "1a",
		RegionID:         1,
		HostName:         ip.String(),
		IPv4:             ip.String(),
		IPv6:             "none",
		STUNPort:         stunPort,
		STUNTestIP:       ip.String(),
		DERPPort:         derpPort,
		InsecureForTests: true, // the relay's certificate is httptest's
	}
	region := &tailcfg.DERPRegion{RegionID: 1, RegionCode: "rig", Nodes: []*tailcfg.DERPNode{node}}
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: region}}
}

func startRelay(where netip.AddrPort) error {
	listener, err := net.Listen("tcp4", where.String())
	if err != nil {
		return err
	}
	relay := derpserver.New(key.NewNode(), log.Printf)
	server := httptest.NewUnstartedServer(derpserver.Handler(relay))
	server.Listener.Close()
	server.Listener = listener
	// DERP takes over the connection after an upgrade, which HTTP/2 has not.
	server.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	server.StartTLS()
	return nil
}

func serveSTUN(requests net.PacketConn) {
	buffer := make([]byte, 1500)
	for {
		n, from, err := requests.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		udp, isUDP := from.(*net.UDPAddr)
		if err != nil || !isUDP {
			continue
		}
		if transaction, err := stun.ParseBindingRequest(buffer[:n]); err == nil {
			requests.WriteTo(stun.Response(transaction, udp.AddrPort()), from)
		}
	}
}

// tellOnline tells every other node whether the named one is online; the test control server takes no notice of that by itself.
func tellOnline(server *testcontrol.Server, name string, online bool) bool {
	for _, node := range server.AllNodes() {
		if node.Hostinfo.Hostname() == name {
			setOnline(server, node.Key, online)
			return true
		}
	}
	return false
}

func setOnline(server *testcontrol.Server, which key.NodePublic, online bool) {
	if node := server.Node(which); node != nil {
		node.Online = &online
		server.UpdateNode(node)
	}
}
