package node

import (
	"context"
	"time"

	"github.com/imagewolf/imagewolf/internal/serve"
)

const (
	// handOverTime is how long a node goes on in the cluster, if it is needed there,
	// after it has ceased to serve containerd: a fetch that was cut short then has
	// brought what others have yet to take.
	handOverTime = 2 * time.Second
	// handOverLook is how often it looks whether it is.
	handOverLook = 50 * time.Millisecond
)

// needed says whether others take something from this node that it alone has. It
// does not panic: a node that stops is to end well.
func (n *Node) needed() (yes bool) {
	err := n.guard(partSwarm, func() error {
		st := n.current()
		yes = st != nil && st.swarm.Needed(time.Now())
		return nil
	})
	if err != nil {
		n.log.Error("whether others need this node is not known: it goes", "err", err)
	}
	return yes
}

// linger returns when the node is not needed any more, at the latest after most, also
// if needed hangs.
func linger(needed func() bool, most time.Duration) {
	over, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	tick := time.NewTicker(handOverLook)
	defer tick.Stop()
	for serve.Within(over, needed) {
		select {
		case <-tick.C:
		case <-over.Done():
			return
		}
	}
}
