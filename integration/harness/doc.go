// Package harness runs whole ImageWolf nodes on one machine: a registry that
// counts and misbehaves on demand, images built from this machine's files,
// real containerd daemons, real imagewolf daemons, and networks between them.
//
// It serves the integration tests, the benchmarks and the demo. Everything it
// starts lives below one temporary directory, its Env, and is gone when the Env
// is closed, and also when the process that owns it dies without closing it.
//
// It needs root (snapshots are mounts) and knows nothing of the daemons' code:
// it meets them as an operator would, through binaries, files and sockets.
package harness
