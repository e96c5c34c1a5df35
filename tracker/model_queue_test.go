package tracker

import "time"

// What happens in a model, and when.
const (
	eventCall    = iota
	eventSent    // node has sent the block at the head of its uplink's queue
	eventArrived // a block is at the downlink of link.ends[side]
	eventGot     // a piece is through it
	eventHave    // the others hear that node has more of link.seg
	eventTry     // link.ends[side] hears it from another zone
)

type event struct {
	at          time.Duration
	call        func()
	link        *modelLink
	node        int32
	kind        int8
	side, piece int8
	last        bool
}

// eventQueue is a binary heap by time.
type eventQueue []event

func (q *eventQueue) push(e event) {
	h := append(*q, e)
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 2
		if h[up].at <= e.at {
			break
		}
		h[i] = h[up]
		i = up
	}
	h[i] = e
	*q = h
}

func (q *eventQueue) pop() event {
	h := *q
	top, e := h[0], h[len(h)-1]
	h[len(h)-1] = event{}
	h = h[:len(h)-1]
	*q = h
	i := 0
	for {
		down := 2*i + 1
		if down >= len(h) {
			break
		}
		if down+1 < len(h) && h[down+1].at < h[down].at {
			down++
		}
		if h[down].at >= e.at {
			break
		}
		h[i] = h[down]
		i = down
	}
	if len(h) > 0 {
		h[i] = e
	}
	return top
}
