package node

import "time"

const (
	// handOverTime is how long a node goes on in the cluster, if it is needed there,
	// after it has ceased to serve containerd: a fetch that was cut short then has
	// brought what others have yet to take.
	handOverTime = 2 * time.Second
	// handOverLook is how often it looks whether it is.
	handOverLook = 50 * time.Millisecond
)

// needed says whether others take something from this node that it alone has.
func (n *Node) needed() bool {
	st := n.current()
	return st != nil && st.swarm.Needed(time.Now())
}

// linger returns when the node is not needed any more, at the latest after most.
func linger(needed func() bool, most time.Duration) {
	over := time.After(most)
	tick := time.NewTicker(handOverLook)
	defer tick.Stop()
	for needed() {
		select {
		case <-tick.C:
		case <-over:
			return
		}
	}
}
