package serve

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
)

// A client that a server seems to hear nothing of, as when the machine's clock is set
// back, keeps its connection: no server of this house pings.
func TestClientsAreNotPinged(t *testing.T) {
	for name, server := range map[string]func() *grpc.Server{
		"never idle":           func() *grpc.Server { return NewGRPC(0) },
		"idle for a long time": func() *grpc.Server { return NewGRPC(24 * time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := bufconn.Listen(1 << 16)
				srv := server()
				go func() { _ = srv.Serve(l) }() // ends with Stop
				defer srv.Stop()
				conn, err := l.DialContext(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				pings, ended := listen(t, conn)
				time.Sleep(10 * time.Hour)
				synctest.Wait()
				select {
				case <-ended:
					t.Error("the connection is closed")
				default:
				}
				if n := len(pings); n > 0 {
					t.Errorf("%d pings", n)
				}
			})
		})
	}
}

// listen speaks as much of HTTP/2 as keeps a server content, and answers no ping.
func listen(t *testing.T, conn net.Conn) (pings <-chan struct{}, ended <-chan struct{}) {
	t.Helper()
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	frames := http2.NewFramer(conn, conn)
	if err := frames.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	seen, end := make(chan struct{}, 1000), make(chan struct{})
	go func() {
		defer close(end)
		for {
			f, err := frames.ReadFrame()
			if err != nil {
				return
			}
			if f.Header().Type == http2.FramePing {
				seen <- struct{}{}
			}
		}
	}()
	return seen, end
}
