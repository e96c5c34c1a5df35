package tracker

import (
	"hash/fnv"
	"math/rand/v2"
)

// hashString is the same on every node and in every run.
func hashString(s string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s)) // never fails
	return mix(h.Sum64())
}

// mix spreads every input bit over all output bits (the finalizer of
// splitmix64), which FNV alone does not.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// weight is the rendezvous weight of a node for a key: whoever weighs most
// has the job, and only that node's jobs move when it goes.
func weight(node, key uint64) uint64 { return mix(node ^ mix(key)) }

// dice returns random numbers that depend on nothing but the two keys.
func dice(a, b uint64) *rand.Rand { return rand.New(rand.NewPCG(a, b)) }
