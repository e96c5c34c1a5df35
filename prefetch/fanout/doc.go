// Package fanout takes requests to prefetch an image, has the selected nodes
// pull it, and tells what became of that.
//
// Any node can be asked (service Node). It checks the request, selects members
// of the cluster, and tells each of them (service Prefetcher), again and again
// those that do not answer, until the request's time is up. Each selected node
// has the request in its own queue: as many pulls at a time as it has slots,
// higher priority first, then the oldest. A pull that fails is tried again a few
// times.
//
// Of several requests that move one image record (a tag) the youngest is to have the
// last word, in whatever order they come and are tried again: see supersede.go.
//
// The record of a request, with the names of all nodes that were selected, is
// with each of them and with the node that took it. So any member can tell about
// any request: it asks one that knows it who was selected, and then each of
// those. Nothing depends on the node that took a request but that nodes which
// did not answer then are told later.
//
// Where only some nodes may pull at a time (concurrency), each knows from the
// list whom it follows: the node so many places before it. It asks that one
// whether it has ended, and begins when it has, or when it does not answer.
//
// Everything is in one bbolt file, from a request's arrival until a day after
// its end on this node:
//
//	requests   id   JSON of stored
//
// What was under way when the process ended begins anew. Everything that others
// can make a node hold is bounded: see the constants in check.go.
//
// The package knows neither how an image is pulled nor how members are reached:
// package node connects it to who does.
package fanout
